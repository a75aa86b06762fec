"""What each group of queries sees of the KV cache, checked once on the host and laid out for the device."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ring import Range


@dataclasses.dataclass(frozen=True)
class TokenRanges:
    """Token ranges [first, last) of a cache, per group of queries; the same for every row of the batch.

    host: per group its ranges, for attention that gathers keys. device: int32 [B, G, R, 2], contiguous, for kernels
    that read them as they run; a group with fewer than R ranges is filled up with (0, 0). most_keys: tokens that the
    group which sees most of them sees.
    """

    host: tuple[tuple[Range, ...], ...]
    device: Tensor
    most_keys: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        most = max(sum(last - first for first, last in ranges) for ranges in self.host)
        object.__setattr__(self, "most_keys", most)

    @classmethod
    def of(
        cls, groups: Sequence[Sequence[Range]], *, capacity: int, batch: int, device: torch.device | str
    ) -> "TokenRanges":
        """Raises InputError unless every group sees something and its ranges are within 0..capacity and disjoint."""
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
                raise InputError(f"ranges of group {index} must hold at least one token, got none")
        if not groups:
            raise InputError("ranges must be given for at least one group, got none")
        width = max(len(ranges) for ranges in groups)
        padded = [[*ranges, *[(0, 0)] * (width - len(ranges))] for ranges in groups]
        host = tuple(tuple((int(first), int(last)) for first, last in ranges) for ranges in groups)
        return cls(host, torch.tensor([padded] * batch, dtype=torch.int32, device=device))

    def __len__(self) -> int:
        """Number of groups."""
        return len(self.host)

    def last(self, groups: int) -> "TokenRanges":
        """Those of the last `groups` >= 1 groups."""
        if groups == len(self):
            return self
        return TokenRanges(self.host[-groups:], self.device[:, -groups:].contiguous())
