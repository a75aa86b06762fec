"""Reuse of expensive resources: a pool hands each to one holder at a time and takes it back when the holder is done."""

import dataclasses
import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

import torch

Resource = TypeVar("Resource")


@dataclasses.dataclass
class _Lease(Generic[Resource]):
    key: Hashable
    resource: Resource
    holder: "weakref.ref[object]"

    @property
    def free(self) -> bool:
        """True if the holder is gone, or says by its attribute `closed` that it is done."""
        holder = self.holder()
        return holder is None or bool(getattr(holder, "closed", False))


class LeasePool(Generic[Resource]):
    """Resources on one device, such as captured CUDA graphs with their buffers, kept for the next holder.

    A holder has its resource until it is garbage-collected or its attribute `closed` is true. Safe to call from
    several threads.
    """

    def __init__(self, device: torch.device):
        self._device = device
        self._leases: list[_Lease[Resource]] = []
        self._lock = threading.RLock()

    def acquire(self, holder: object, key: Hashable, make: Callable[[], Resource]) -> Resource:
        """Return a free resource of this key; without one, free those of other keys and make one.

        Raises what `make` raises.
        """
        with self._lock:
            lease = next((lease for lease in self._leases if lease.key == key and lease.free), None)
            if lease is None:
                self.release()
                lease = _Lease(key, make(), weakref.ref(holder))
                self._leases.append(lease)
                self._empty_cache()  # memory of the warm-up, on a stream that is not used again
                return lease.resource
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # the holder before may have used another stream
            lease.holder = weakref.ref(holder)
            return lease.resource

    @property
    def resources(self) -> list[Resource]:
        """The resources that are allocated, free ones included."""
        return [lease.resource for lease in self._leases]

    def release(self) -> None:
        """Drop the resources without a holder and return their memory to the device."""
        with self._lock:
            count = len(self._leases)
            self._leases = [lease for lease in self._leases if not lease.free]
            if len(self._leases) < count:
                self._empty_cache()

    def _empty_cache(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
