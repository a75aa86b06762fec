"""A contact sheet: pictures of a video side by side in one PNG, to see at a glance how it goes on."""

from pathlib import Path

import numpy as np

from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.io.video import FrameWriter, import_pillow

_GAP = 4  # pixels between pictures
_GROUND = 255


class SheetWriter(FrameWriter):
    """Every picture is looked at, columns * rows of them are kept, evenly spread from the first to the last.

    path: a .png file, which appears when the writer is closed. frames: pictures that will be written in all. columns,
    rows: of the sheet, fewer where there are fewer pictures. Raises InputError for a path or sizes that do not do,
    MissingExtraError without Pillow.
    """

    def __init__(self, path: str | Path, frames: int, *, columns: int = 8, rows: int = 4, row: int = 0):
        super().__init__(row)
        if Path(path).suffix.lower() != ".png":
            raise InputError(f"{path}: a contact sheet must be named .png")
        if min(frames, columns, rows) < 1:
            raise InputError(f"frames, columns and rows must be >= 1, got {frames}, {columns} and {rows}")
        self._image = import_pillow()
        self._path, self._columns = path, min(columns, frames)
        self._wanted = set(np.linspace(0, frames - 1, min(columns * rows, frames)).round().astype(int).tolist())
        self._kept: list[np.ndarray] = []

    def _put(self, picture: np.ndarray, index: int) -> None:
        if index in self._wanted:
            self._kept.append(picture)

    def _finish(self) -> None:
        if not self._kept:
            return
        height, width = self._kept[0].shape[:2]
        rows = -(-len(self._kept) // self._columns)
        size = (rows * (height + _GAP) - _GAP, self._columns * (width + _GAP) - _GAP, 3)
        sheet = np.full(size, _GROUND, dtype=np.uint8)
        for i, picture in enumerate(self._kept):
            y, x = i // self._columns * (height + _GAP), i % self._columns * (width + _GAP)
            sheet[y : y + height, x : x + width] = picture
        with write_atomically(self._path) as path:
            self._image.fromarray(sheet).save(path, format="PNG", optimize=True)
