"""Rendering of the world: states to frames of 48 x 48 pixels."""

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.world.simulator import CELLS, TILES, State

TILE = 8  # side of a tile in pixels
STEP = TILE // 2  # distance in pixels that a thing moves in one frame
SIZE = TILE * TILES

_COLOURS = {
    ".": None,
    "f": (46, 52, 64),
    "F": (59, 66, 82),
    "w": (136, 100, 84),
    "W": (170, 128, 104),
    "m": (94, 72, 66),
    "b": (56, 189, 248),
    "B": (14, 116, 184),
    "o": (255, 255, 255),
    "k": (15, 23, 42),
    "c": (202, 138, 4),
    "C": (120, 72, 10),
    "y": (253, 224, 71),
    "Y": (234, 179, 8),
    "g": (34, 197, 94),
    "r": (239, 68, 68),
    "R": (153, 27, 27),
}

_SPRITE_ROWS = {
    "wall": "WWWmWWWW wwwmwwww wwwmwwww mmmmmmmm WWWWWWmW wwwwwwmw wwwwwwmw mmmmmmmm",
    "agent": ".bbbbbb. bbbbbbbb bookkoob bokkkkob bbbbbbbb BbBBBBbB .BBBBBB. .kk..kk.",
    "crate": "CCCCCCCC CcccccCC CccccCcC CcccCccC CccCcccC CcCccccC CCcccccC CCCCCCCC",
    "coin": "........ ..YYYY.. .YyyyyY. .YyYYyY. .YyYYyY. .YyyyyY. ..YYYY.. ........",
    "closed": "g......g RrRrRrRr RrRrRrRr RrRrRrRr RrRrRrRr RrRrRrRr RrRrRrRr g......g",
    "open": "gg....gg g......g ........ ........ ........ ........ g......g gg....gg",
}


def _sprite(rows: str) -> tuple[NDArray[np.uint8], NDArray[np.bool_]]:
    """Return the colours [8, 8, 3] of a sprite and the mask of the pixels that it covers [8, 8]."""
    letters = [list(row) for row in rows.split()]
    colours = np.array([[_COLOURS[letter] or (0, 0, 0) for letter in row] for row in letters], dtype=np.uint8)
    return colours, np.array([[letter != "." for letter in row] for row in letters])


SPRITES = {name: _sprite(rows) for name, rows in _SPRITE_ROWS.items()}
_FLOOR = np.array([_COLOURS["f"], _COLOURS["F"]], dtype=np.uint8)[
    np.add.outer(np.arange(CELLS), np.arange(CELLS)).repeat(STEP, 0).repeat(STEP, 1) % 2
]


def render(state: State) -> NDArray[np.uint8]:
    """Render the states of B episodes: uint8 [B, 48, 48, 3], RGB."""
    frames = np.broadcast_to(_FLOOR, (len(state.agent), *_FLOOR.shape)).copy()
    colours, _ = SPRITES["wall"]
    walls = state.walls.repeat(TILE, 1).repeat(TILE, 2)
    frames[walls] = np.broadcast_to(np.tile(colours, (TILES, TILES, 1)), frames.shape)[walls]
    everywhere = np.ones(len(frames), dtype=bool)
    _draw(frames, "closed", TILE * state.gate, ~state.gate_open)
    _draw(frames, "coin", TILE * state.coin, everywhere)
    _draw(frames, "crate", STEP * state.crate, everywhere)
    _draw(frames, "agent", STEP * state.agent, everywhere)
    _draw(frames, "open", TILE * state.gate, state.gate_open)  # drawn last, so that what stands in it does not hide it
    return frames


def _draw(frames: NDArray[np.uint8], name: str, corners: NDArray[np.int64], where: NDArray[np.bool_]) -> None:
    colours, covers = SPRITES[name]
    y, x = np.nonzero(covers)
    rows = np.nonzero(where)[0][:, None]
    frames[rows, corners[where, 0, None] + y, corners[where, 1, None] + x] = colours[y, x]
