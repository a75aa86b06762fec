"""Angles of the rotary embedding along one axis, for any position. Needs numpy alone; every runtime uses it.

Pair j of an axis with n pairs turns by position * 10000^(-j / n). Angles are computed in float64 and stored as float32
(cos, sin), so positions have no upper bound.
"""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

THETA = 10000.0


def pairs_of(head_dim: int) -> tuple[int, int]:
    """Return how many channel pairs of a head turn with the frame, and with the row or column: 22 and 21 of 64."""
    half = head_dim // 2
    return half - 2 * (half // 3), half // 3


def axis_table(positions: Sequence[int], pairs: int) -> NDArray[np.float32]:
    """Return (cos, sin) of every pair at each position, float32 [len(positions), pairs, 2]."""
    frequencies = THETA ** (-np.arange(pairs, dtype=np.float64) / max(pairs, 1))
    angles = np.asarray(positions, dtype=np.float64)[:, None] * frequencies
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1).astype(np.float32)
