"""The training log: a CSV file, and TensorBoard on request."""

import csv
from pathlib import Path
from typing import Any

from cfpp_rt.errors import MissingExtraError
from cfpp_rt.io.atomic import write_atomically


class Log:
    """The file log.csv of a folder, with one row per step. A resumed run drops rows logged after its checkpoint.

    step: step of the checkpoint, 0 for a new run.
    tensorboard: write the numbers to folder/tensorboard, too. Raise MissingExtraError if it is not installed.
    """

    def __init__(self, folder: Path, step: int, *, tensorboard: bool = False):
        self.path = folder / "log.csv"
        self.rows: list[dict[str, Any]] = []
        self.columns = ["step"]
        self._board: Any = _open_board(folder / "tensorboard", step) if tensorboard else None
        if step and self.path.exists():
            with self.path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
            self.columns = list(self.rows[0]) if self.rows else ["step"]

    def add(self, step: int, row: dict[str, float]) -> None:
        """Add the row of a step; `flush` writes it."""
        self.rows.append({"step": step, **{name: f"{value:.6g}" for name, value in row.items()}})
        self.columns += [name for name in row if name not in self.columns]
        if self._board is not None:
            for name, value in row.items():
                self._board.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write log.csv."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)
        if self._board is not None:
            self._board.flush()


def _open_board(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingExtraError("tensorboard", "tensorboard", "logging to TensorBoard") from error
    return SummaryWriter(str(folder), purge_step=step + 1 if step else None)
