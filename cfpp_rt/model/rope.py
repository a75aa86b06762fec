"""Rotary position tables over (frame, row, column), small enough to be made for any position.

A head's D/2 channel pairs are split between time, rows and columns: n_row = n_col = (D/2) // 3, the rest is time
(22, 21, 21 for D = 128). Pair j of an axis with n pairs turns by position * 10000^(-j / n). Angles are computed in
float64 and stored as float32 (cos, sin), so positions have no upper bound.
"""

import dataclasses
from collections.abc import Sequence

import torch

THETA = 10000.0
_SPAN = 256  # frames whose time table is made together
_SPANS_KEPT = 4


def _axis_table(positions: torch.Tensor, pairs: int) -> torch.Tensor:
    frequencies = THETA ** (-torch.arange(pairs, dtype=torch.float64) / pairs)
    angles = positions.to(torch.float64)[:, None] * frequencies
    return torch.stack([angles.cos(), angles.sin()], dim=-1).float()


@dataclasses.dataclass(frozen=True)
class RotaryTables:
    """Tables of one latent size. rows: float32 [rows, n_row, 2]; columns: float32 [columns, n_col, 2], on `device`."""

    rows: torch.Tensor
    columns: torch.Tensor
    time_pairs: int
    _spans: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(cls, head_dim: int, rows: int, columns: int, device: torch.device | str = "cpu") -> "RotaryTables":
        third = head_dim // 2 // 3
        return cls(
            rows=_axis_table(torch.arange(rows), third).to(device),
            columns=_axis_table(torch.arange(columns), third).to(device),
            time_pairs=head_dim // 2 - 2 * third,
        )

    def time(self, frames: Sequence[int]) -> torch.Tensor:
        """Table of absolute latent frame indices, float32 [len(frames), n_time, 2]."""
        spans = [self._span(frame // _SPAN) for frame in frames]
        return torch.stack([span[frame % _SPAN] for frame, span in zip(frames, spans, strict=True)])

    def _span(self, index: int) -> torch.Tensor:
        """Table of a span of frames: made together, since making it for each pass costs more than a small kernel."""
        if index not in self._spans:
            if len(self._spans) >= _SPANS_KEPT:
                del self._spans[min(self._spans)]
            frames = torch.arange(index * _SPAN, (index + 1) * _SPAN)
            self._spans[index] = _axis_table(frames, self.time_pairs).to(self.rows.device)
        return self._spans[index]

    def sequence(self, frames: Sequence[int]) -> torch.Tensor:
        """(cos, sin) of every token of these frames, frame-major, then row, then column: float32 [S, D / 2, 2]."""
        time, rows, columns = self.time(frames), self.rows, self.columns
        grid = (len(time), len(rows), len(columns))
        axes = (time[:, None, None], rows[None, :, None], columns[None, None, :])
        return torch.cat([axis.expand(*grid, -1, -1) for axis in axes], dim=3).flatten(0, 2)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Turn the channel pairs of x [..., D] by table, float32 (cos, sin) [..., D / 2, 2]; float32, differentiable."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
