"""A contact sheet: frames of a video side by side in one PNG, an overview of the video."""

from pathlib import Path

import numpy as np

from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.io.video import FrameWriter, import_pillow

_GAP = 4  # pixels between frames
_BACKGROUND = 255


class SheetWriter(FrameWriter):
    """Writer of a contact sheet with columns * rows frames, evenly spaced from the first to the last.

    path: a .png file, which appears when the writer is closed.
    num_frames: number of frames that will be written.
    columns, rows: size of the sheet in frames, smaller if there are fewer frames.
    row: the row of the batch to write.

    Raises InputError for another suffix or sizes below 1, MissingExtraError without Pillow.
    """

    def __init__(self, path: str | Path, num_frames: int, *, columns: int = 8, rows: int = 4, row: int = 0):
        super().__init__(row)
        if Path(path).suffix.lower() != ".png":
            raise InputError(f"{path}: a contact sheet must be named .png")
        if min(num_frames, columns, rows) < 1:
            raise InputError(f"num_frames, columns and rows must be >= 1, got {num_frames}, {columns} and {rows}")
        self._image = import_pillow()
        self._path, self._columns = path, min(columns, num_frames)
        self._wanted = set(np.linspace(0, num_frames - 1, min(columns * rows, num_frames)).round().astype(int).tolist())
        self._selected: list[np.ndarray] = []

    def _put(self, frame: np.ndarray, index: int) -> None:
        if index in self._wanted:
            self._selected.append(frame)

    def _finish(self) -> None:
        if not self._selected:
            return
        height, width = self._selected[0].shape[:2]
        rows = -(-len(self._selected) // self._columns)
        size = (rows * (height + _GAP) - _GAP, self._columns * (width + _GAP) - _GAP, 3)
        sheet = np.full(size, _BACKGROUND, dtype=np.uint8)
        for i, frame in enumerate(self._selected):
            y, x = i // self._columns * (height + _GAP), i % self._columns * (width + _GAP)
            sheet[y : y + height, x : x + width] = frame
        with write_atomically(self._path) as path:
            self._image.fromarray(sheet).save(path, format="PNG")
