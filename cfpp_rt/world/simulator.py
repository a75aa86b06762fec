"""The rules of the world: an exact simulator, deterministic by seed, for many episodes at a time.

The arena is 6 x 6 tiles of 8 pixels. Positions are in half tiles (4 pixels). Agent and crate are one tile large and
move half a tile per frame. Walls and the closed gate stop them. The agent pushes the crate. `interact` opens and
closes the gate, unless something stands in it. The coin is taken when the agent or the crate touches it, and then
reappears on a random free tile: the only event that frame and action do not determine.
"""

import dataclasses

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.errors import InputError

ACTIONS = ("none", "up", "down", "left", "right", "interact")
NONE, UP, DOWN, LEFT, RIGHT, INTERACT = range(6)

TILES = 6  # tiles of a side
CELLS = 2 * TILES  # half tiles of a side
_LAST = CELLS - 2  # largest position of a thing of one tile
_MOVES = np.array([(0, 0), (-1, 0), (1, 0), (0, -1), (0, 1), (0, 0)])
_WALLS = (4, 9)  # range of the number of wall tiles, exclusive at the end

Cells = NDArray[np.int64]


@dataclasses.dataclass
class State:
    """The states of B episodes. Positions are (row, column) of upper left corners.

    walls: bool [B, 6, 6].
    gate, coin: int64 [B, 2] in tiles.
    gate_open: bool [B].
    agent, crate: int64 [B, 2] in half tiles, 0..10.
    """

    walls: NDArray[np.bool_]
    gate: Cells
    gate_open: NDArray[np.bool_]
    coin: Cells
    agent: Cells
    crate: Cells

    def copy(self) -> "State":
        """Return a copy that shares no arrays."""
        return State(**{field.name: getattr(self, field.name).copy() for field in dataclasses.fields(self)})


class Simulator:
    """B episodes, each with its own seed; an episode does not depend on the others.

    state: current state; `step` advances it.
    """

    def __init__(self, seeds: list[int]):
        if not seeds or any(not 0 <= seed < 2**63 for seed in seeds):
            raise InputError(f"seeds must be integers in 0..2**63 - 1, at least one, got {seeds}")
        self._rngs = [np.random.Generator(np.random.Philox(key=[seed, 2])) for seed in seeds]
        starts = [_start(rng) for rng in self._rngs]
        self.state = State(*(np.stack(parts) for parts in zip(*starts, strict=True)))

    def step(self, actions: Cells) -> State:
        """Advance all episodes by one frame; return the state. Raise InputError for actions not [B] in 0..5."""
        state, rows = self.state, np.arange(len(self._rngs))
        actions = np.asarray(actions)
        is_integer = np.issubdtype(actions.dtype, np.integer)
        if actions.shape != rows.shape or not is_integer or actions.min() < 0 or actions.max() >= len(ACTIONS):
            raise InputError(f"actions must be [{len(rows)}] integers in 0..{len(ACTIONS) - 1}, got {actions}")

        standing = _overlap(2 * state.gate, state.agent) | _overlap(2 * state.gate, state.crate)
        state.gate_open = state.gate_open ^ ((actions == INTERACT) & ~standing)
        solid = self._solid()
        moves = _MOVES[actions]
        target = state.agent + moves
        pushed = state.crate + moves
        pushes = _overlap(target, state.crate)
        moved = _free(solid, target) & (~pushes | _free(solid, pushed))
        state.crate = np.where((moved & pushes)[:, None], pushed, state.crate)
        state.agent = np.where(moved[:, None], target, state.agent)

        taken = _overlap(2 * state.coin, state.agent) | _overlap(2 * state.coin, state.crate)
        for row in rows[taken]:
            state.coin[row] = _free_tile(self._rngs[row], *(part[row] for part in self._in_the_way()))
        return state

    def _solid(self) -> NDArray[np.bool_]:
        """Return the half tiles that block movement, with a border of one: bool [B, 14, 14]."""
        state = self.state
        tiles = state.walls.copy()
        tiles[np.arange(len(tiles)), state.gate[:, 0], state.gate[:, 1]] = ~state.gate_open
        cells = tiles.repeat(2, axis=1).repeat(2, axis=2)
        return np.pad(cells, ((0, 0), (1, 1), (1, 1)), constant_values=True)

    def _in_the_way(self) -> tuple[NDArray[np.bool_], Cells, Cells, Cells]:
        return self.state.walls, self.state.gate, self.state.agent, self.state.crate


def _overlap(one: Cells, other: Cells) -> NDArray[np.bool_]:
    """Return where two things of one tile, at [B, 2] each, share a half tile: bool [B]."""
    return np.asarray((abs(one - other) < 2).all(axis=1))


def _free(solid: NDArray[np.bool_], position: Cells) -> NDArray[np.bool_]:
    """Return where a thing of one tile fits at a position [B, 2]: bool [B]."""
    rows = np.arange(len(solid))[:, None, None]
    cells = (position + 1)[:, :, None] + np.arange(2)  # + 1: the border
    cells = cells.clip(0, solid.shape[1] - 1)  # positions beyond the border are as solid as the border
    return ~solid[rows, cells[:, 0, :, None], cells[:, 1, None, :]].any(axis=(1, 2))


def _free_tile(rng: np.random.Generator, walls: NDArray[np.bool_], gate: Cells, agent: Cells, crate: Cells) -> Cells:
    tiles = np.argwhere(~walls)
    free = (tiles != gate).any(axis=1)
    for thing in (agent, crate):
        free &= ~_overlap(2 * tiles, thing)
    return tiles[free][rng.integers(free.sum())]


def _start(rng: np.random.Generator) -> tuple[object, ...]:
    """Draw the start of an episode. Free tiles, including the gate, are connected; things stand on different tiles."""
    while True:
        walls = np.zeros((TILES, TILES), dtype=bool)
        walls.flat[rng.permutation(walls.size)[: rng.integers(*_WALLS)]] = True
        if _connected(~walls):
            break
    tiles = rng.permutation(np.argwhere(~walls))
    inner = [tile for tile in tiles if 0 < tile[0] < TILES - 1 and 0 < tile[1] < TILES - 1]
    crate = inner[0] if inner else tiles[0]  # a crate at the edge could never be pushed away from it
    gate, agent, coin = [tile for tile in tiles if (tile != crate).any()][:3]
    return walls, gate, np.bool_(rng.random() < 0.5), coin, 2 * agent, 2 * crate


def _connected(free: NDArray[np.bool_]) -> bool:
    reached = np.zeros_like(free)
    reached[tuple(np.argwhere(free)[0])] = True
    while True:
        padded = np.pad(reached, 1)
        near = padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]
        grown = reached | near & free
        if (grown == reached).all():
            return bool((reached == free).all())
        reached = grown
