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
    """Visible token ranges [first, end) of the KV cache, per group of queries.

    host_ranges: the ranges of each group, the same for every row of the batch, for attention that gathers keys. None if
        rows differ, or if the ranges are known only to the device because one CUDA graph serves all frames.
    tensor: int32 [B, G, R, 2], contiguous, for kernels that read the ranges when they run. A group with fewer than R
        ranges is padded with (0, 0).
    parts: the ranges of each part of a joined batch, if they differ; host_ranges is then None.
    max_keys: largest number of tokens that a group attends to; 0 if the ranges are known only to the device.
    """

    host_ranges: tuple[tuple[Range, ...], ...] | None
    tensor: Tensor
    parts: tuple["TokenRanges", ...] = ()
    max_keys: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        own = max(sum(end - first for first, end in ranges) for ranges in self.host_ranges) if self.host_ranges else 0
        object.__setattr__(self, "max_keys", max([own, *(part.max_keys for part in self.parts)]))

    @classmethod
    def on_device(cls, tensor: Tensor) -> "TokenRanges":
        """Return ranges whose tensor, int32 [B, G, R, 2] and contiguous, is rewritten between runs."""
        return cls(None, tensor)

    @classmethod
    def of(
        cls,
        groups: Sequence[Sequence[Range]],
        *,
        capacity_tokens: int,
        batch: int,
        device: torch.device | str,
        width: int = 1,
    ) -> "TokenRanges":
        """Check the ranges of each group and copy them to the device.

        groups: the ranges [first, end) of each group, in any order.
        capacity_tokens: number of tokens of the cache.
        batch: B; every row has the same ranges.
        width: least number R of ranges per group in the attribute `tensor`.

        Raises InputError unless every group has at least one token and its ranges are disjoint and within
        0..capacity_tokens.
        """
        for index, ranges in enumerate(groups):
            covered = 0
            for first, end in sorted(ranges):
                if not 0 <= first < end <= capacity_tokens:
                    raise InputError(
                        f"ranges of group {index} must be [first, end) within 0..{capacity_tokens} and not empty, "
                        f"got {[first, end]}"
                    )
                if first < covered:
                    raise InputError(f"ranges of group {index} must not overlap, got {list(ranges)}")
                covered = end
            if not ranges:
                raise InputError(f"ranges of group {index} must contain at least one token, got none")
        if not groups:
            raise InputError("ranges must be given for at least one group, got none")
        width = max(width, *(len(ranges) for ranges in groups))
        padded = [[*ranges, *[(0, 0)] * (width - len(ranges))] for ranges in groups]
        host_ranges = tuple(tuple((int(first), int(end)) for first, end in ranges) for ranges in groups)
        return cls(host_ranges, to_device(torch.tensor([padded] * batch, dtype=torch.int32), device))

    @classmethod
    def join(cls, parts: Sequence["TokenRanges"]) -> "TokenRanges":
        """Return the ranges of batches that are concatenated to one; all have the same number of groups and width R."""
        tensor = torch.cat([part.tensor for part in parts])
        same = all(part.host_ranges == parts[0].host_ranges for part in parts)
        return cls(parts[0].host_ranges, tensor) if same else cls(None, tensor, tuple(parts))

    def __len__(self) -> int:
        """Return the number of groups."""
        return self.tensor.shape[1]

    def tail(self, groups: int) -> "TokenRanges":
        """Return the ranges of the last `groups` >= 1 groups."""
        if groups == len(self):
            return self
        host_ranges = None if self.host_ranges is None else self.host_ranges[-groups:]
        parts = tuple(part.tail(groups) for part in self.parts)
        return TokenRanges(host_ranges, self.tensor[:, -groups:].contiguous(), parts)
