"""Contact sheets: the selected frames, their positions, and that no file stays after an error."""

import numpy as np
import pytest
import torch

from cfpp_rt.errors import InputError
from cfpp_rt.io.contact_sheet import SheetWriter
from cfpp_rt.values import Frames

Image = pytest.importorskip("PIL.Image")


def video(count):
    """Frames [1, count, 4, 6, 3] whose brightness is their index."""
    return torch.arange(count, dtype=torch.uint8)[None, :, None, None, None].expand(1, count, 4, 6, 3)


@pytest.mark.parametrize(
    ("count", "selected"), [(1, [0]), (3, [0, 1, 2]), (6, [0, 1, 2, 3, 4, 5]), (101, [0, 20, 40, 60, 80, 100])]
)
def test_evenly_spread_frames_row_by_row(tmp_path, count, selected):
    with SheetWriter(tmp_path / "sheet.png", count, columns=3, rows=2) as writer:
        for start in range(0, count, 4):
            writer.write(Frames(video(count)[:, start : start + 4], start))
    sheet = np.array(Image.open(tmp_path / "sheet.png"))
    columns, rows = min(3, count), -(-len(selected) // 3)
    assert sheet.shape == (8 * rows - 4, 10 * columns - 4, 3)
    for i, index in enumerate(selected):
        y, x = 8 * (i // 3), 10 * (i % 3)
        assert (sheet[y : y + 4, x : x + 6] == index).all()


def test_an_error_leaves_no_file(tmp_path):
    with pytest.raises(RuntimeError), SheetWriter(tmp_path / "sheet.png", 2) as writer:
        writer.write(Frames(video(1), 0))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("path", "num_frames", "message"), [("a.jpg", 4, "named .png"), ("a.png", 0, "must be >= 1")])
def test_bad_input(tmp_path, path, num_frames, message):
    with pytest.raises(InputError, match=message):
        SheetWriter(tmp_path / path, num_frames)
