"""Token ranges of the KV cache per group of queries, checked once on the host and stored on the device."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cfpp_rt.core.frame_ring import Range
from cfpp_rt.device.transfer import to_device
from cfpp_rt.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenRanges:
    """Visible token ranges [first, last) of the KV cache, per group of queries.

    host: the ranges of each group, the same for every row of the batch, for attention that gathers keys. None = they
        are known only to the device, because one CUDA graph serves all frames, or differ between rows.
    device: int32 [B, G, R, 2], contiguous, for kernels that read the ranges when they run. A group with fewer than R
        ranges is padded with (0, 0).
    by_row: the ranges of each part of a joined batch, if they differ; host is then None.
    max_keys: largest number of tokens that a group attends to; 0 if the ranges are known only to the device.
    """

    host: tuple[tuple[Range, ...], ...] | None
    device: Tensor
    by_row: tuple["TokenRanges", ...] = ()
    max_keys: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        own = max(sum(last - first for first, last in ranges) for ranges in self.host) if self.host else 0
        object.__setattr__(self, "max_keys", max([own, *(part.max_keys for part in self.by_row)]))

    @classmethod
    def on_device(cls, device: Tensor) -> "TokenRanges":
        """Return the ranges in a buffer that is rewritten between runs. device: int32 [B, G, R, 2], contiguous."""
        return cls(None, device)

    @classmethod
    def of(
        cls, groups: Sequence[Sequence[Range]], *, capacity: int, batch: int, device: torch.device | str, width: int = 1
    ) -> "TokenRanges":
        """Check the ranges of each group and copy them to the device.

        groups: the ranges [first, last) of each group, in any order.
        capacity: number of tokens of the cache.
        batch: B; every row has the same ranges.
        width: least number R of ranges per group in the tensor `device`.

        Raises InputError unless every group has at least one token and its ranges are disjoint and in 0..capacity.
        """
        for index, ranges in enumerate(groups):
            end = 0
            for first, last in sorted(ranges):
                if not 0 <= first < last <= capacity:
                    raise InputError(
                        f"ranges of group {index} must be [first, last) within 0..{capacity} and not empty, "
                        f"got {[first, last]}"
                    )
                if first < end:
                    raise InputError(f"ranges of group {index} must not overlap, got {list(ranges)}")
                end = last
            if not ranges:
                raise InputError(f"ranges of group {index} must contain at least one token, got none")
        if not groups:
            raise InputError("ranges must be given for at least one group, got none")
        width = max(width, *(len(ranges) for ranges in groups))
        padded = [[*ranges, *[(0, 0)] * (width - len(ranges))] for ranges in groups]
        host = tuple(tuple((int(first), int(last)) for first, last in ranges) for ranges in groups)
        return cls(host, to_device(torch.tensor([padded] * batch, dtype=torch.int32), device))

    @classmethod
    def join(cls, rows: Sequence["TokenRanges"]) -> "TokenRanges":
        """Return the ranges of batches that are concatenated to one. All have the same number of groups and width R."""
        device = torch.cat([part.device for part in rows])
        same = all(part.host == rows[0].host for part in rows)
        return cls(rows[0].host, device) if same else cls(None, device, tuple(rows))

    def __len__(self) -> int:
        """Return the number of groups."""
        return self.device.shape[1]

    def last(self, groups: int) -> "TokenRanges":
        """Return the ranges of the last `groups` >= 1 groups."""
        if groups == len(self):
            return self
        host = None if self.host is None else self.host[-groups:]
        by_row = tuple(part.last(groups) for part in self.by_row)
        return TokenRanges(host, self.device[:, -groups:].contiguous(), by_row)
