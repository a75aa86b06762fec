"""Rotary position tables over (frame, row, column), small enough to be made for any position.

A head's D/2 channel pairs are split between time, rows and columns: n_row = n_col = (D/2) // 3, the rest is time
(22, 21, 21 for D = 128). The angles are those of `cfpp_rt.core.rope_angles`.
"""

import dataclasses
from collections.abc import Sequence

import torch

from cfpp_rt.core.rope_angles import axis_table, pairs_of

_SPAN = 256  # latent frames whose time table is made together
_SPANS_KEPT = 4


@dataclasses.dataclass(frozen=True)
class RotaryTables:
    """Rotary tables of one latent size: (cos, sin) per channel pair, on the device.

    rows: float32 [rows, n_row, 2]. columns: float32 [columns, n_col, 2]. time_pairs: channel pairs of the time axis.
    """

    rows: torch.Tensor
    columns: torch.Tensor
    time_pairs: int
    _spans: dict[int, torch.Tensor] = dataclasses.field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def build(cls, head_dim: int, rows: int, columns: int, device: torch.device | str = "cpu") -> "RotaryTables":
        """Make the tables of a latent of `rows` x `columns` tokens."""
        time_pairs, third = pairs_of(head_dim)
        row_table, column_table = (torch.from_numpy(axis_table(range(size), third)) for size in (rows, columns))
        return cls(row_table.to(device), column_table.to(device), time_pairs)

    def time(self, frames: Sequence[int]) -> torch.Tensor:
        """Return the table of absolute latent frame indices, float32 [len(frames), n_time, 2]."""
        spans = [self._span(frame // _SPAN) for frame in frames]
        return torch.stack([span[frame % _SPAN] for frame, span in zip(frames, spans, strict=True)])

    def _span(self, index: int) -> torch.Tensor:
        """Return the table of a span of frames, made together: per pass it would cost more than a small kernel."""
        if index not in self._spans:
            if len(self._spans) >= _SPANS_KEPT:
                del self._spans[min(self._spans)]
            frames = range(index * _SPAN, (index + 1) * _SPAN)
            self._spans[index] = torch.from_numpy(axis_table(frames, self.time_pairs)).to(self.rows.device)
        return self._spans[index]

    def sequence(self, frames: Sequence[int]) -> torch.Tensor:
        """Return (cos, sin) of every token, frame-major, then row, then column: float32 [S, D / 2, 2]."""
        time, rows, columns = self.time(frames), self.rows, self.columns
        grid = (len(time), len(rows), len(columns))
        axes = (time[:, None, None], rows[None, :, None], columns[None, None, :])
        return torch.cat([axis.expand(*grid, -1, -1) for axis in axes], dim=3).flatten(0, 2)


def rotate(x: torch.Tensor, table: torch.Tensor) -> torch.Tensor:
    """Rotate the channel pairs of x [..., D] by table, float32 (cos, sin) [..., D / 2, 2]; float32, differentiable."""
    first, second = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = table.unbind(-1)
    return torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1).flatten(-2)
