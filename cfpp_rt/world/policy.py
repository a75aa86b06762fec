"""The policy that plays when data is made: it wanders, holds keys for a while, and moves towards crate and coin."""

import numpy as np

from cfpp_rt.world.simulator import DOWN, INTERACT, LEFT, NONE, RIGHT, UP, Cells, State

_CHANGE = 0.25  # probability per frame of changing the key


class Wanderer:
    """A random policy for many episodes, repeatable by its seed."""

    def __init__(self, seed: int, episodes: int):
        self._rng = np.random.Generator(np.random.Philox(key=[seed, 3]))
        self._held = self._rng.integers(0, 5, episodes)

    def __call__(self, state: State) -> Cells:
        """Return the actions [B] of the next step."""
        count, rng = len(self._held), self._rng
        change = rng.random(count) < _CHANGE
        kind = rng.random(count)
        other = rng.integers(UP, RIGHT + 1, count)
        for low, high, goal in ((0.3, 0.7, state.crate), (0.7, 0.86, 2 * state.coin)):
            other = np.where((kind >= low) & (kind < high), _towards(goal - state.agent, rng.random(count)), other)
        other = np.where(kind >= 0.94, NONE, other)
        self._held = np.where(change, other, self._held)
        return np.where(rng.random(count) < 0.07, INTERACT, self._held)


def _towards(way: Cells, uniform: np.ndarray) -> Cells:
    """Return keys that shorten the way [B, 2], more often along the longer axis. uniform: [B] in 0..1."""
    vertical = uniform * abs(way).sum(axis=1) < abs(way[:, 0])
    return np.where(vertical, np.where(way[:, 0] < 0, UP, DOWN), np.where(way[:, 1] < 0, LEFT, RIGHT))
