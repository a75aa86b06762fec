"""What each group of queries sees of the KV cache, checked once on the host and laid out for the device."""

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from cfpp_rt.core.frame_ring import Range
from cfpp_rt.device.transfer import to_device
from cfpp_rt.errors import InputError


@dataclasses.dataclass(frozen=True)
class TokenRanges:
    """Token ranges [first, last) of a cache, per group of queries; the same for every row of the batch, or joined.

    host: per group its ranges, for attention that gathers keys; None = only the device knows them, as where one graph
    serves all frames. device: int32 [B, G, R, 2], contiguous, for kernels that read them as they run; a group with
    fewer than R ranges is filled up with (0, 0). most_keys: tokens that the group which sees most of them sees; 0 where
    host is None and rows are not joined. by_row: those of each row where they differ, and host is None then.
    """

    host: tuple[tuple[Range, ...], ...] | None
    device: Tensor
    by_row: tuple["TokenRanges", ...] = ()
    most_keys: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        most = max(sum(last - first for first, last in ranges) for ranges in self.host) if self.host else 0
        most = max([most, *(own.most_keys for own in self.by_row)])
        object.__setattr__(self, "most_keys", most)

    @classmethod
    def on_device(cls, device: Tensor) -> "TokenRanges":
        """Ranges in a buffer that is rewritten between runs: int32 [B, G, R, 2], contiguous."""
        return cls(None, device)

    @classmethod
    def of(
        cls, groups: Sequence[Sequence[Range]], *, capacity: int, batch: int, device: torch.device | str, width: int = 1
    ) -> "TokenRanges":
        """Raises InputError unless every group sees something and its ranges are within 0..capacity and disjoint.

        width: R is this at least.
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
                raise InputError(f"ranges of group {index} must hold at least one token, got none")
        if not groups:
            raise InputError("ranges must be given for at least one group, got none")
        width = max(width, *(len(ranges) for ranges in groups))
        padded = [[*ranges, *[(0, 0)] * (width - len(ranges))] for ranges in groups]
        host = tuple(tuple((int(first), int(last)) for first, last in ranges) for ranges in groups)
        return cls(host, to_device(torch.tensor([padded] * batch, dtype=torch.int32), device))

    @classmethod
    def join(cls, rows: Sequence["TokenRanges"]) -> "TokenRanges":
        """Ranges of batches that are joined to one, row after row: as many groups in each, of the same width R."""
        device = torch.cat([own.device for own in rows])
        same = all(own.host == rows[0].host for own in rows)
        return cls(rows[0].host, device) if same else cls(None, device, tuple(rows))

    def __len__(self) -> int:
        """Number of groups."""
        return self.device.shape[1]

    def last(self, groups: int) -> "TokenRanges":
        """Those of the last `groups` >= 1 groups."""
        if groups == len(self):
            return self
        host = None if self.host is None else self.host[-groups:]
        by_row = tuple(own.last(groups) for own in self.by_row)
        return TokenRanges(host, self.device[:, -groups:].contiguous(), by_row)
