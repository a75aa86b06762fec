"""One GPU through cuda-python: its memory and its stream. Running an engine needs no torch."""

import dataclasses
from typing import Any

import numpy as np

from cfpp_rt.errors import InputError, MissingExtraError


@dataclasses.dataclass(frozen=True)
class Memory:
    """A block of device memory: its address and its size in bytes."""

    pointer: int
    bytes: int


class Device:
    """One GPU with a stream of its own.

    architecture: "sm89" etc., as the bundles name their folders.

    Raises MissingExtraError without cuda-bindings, InputError without a GPU or driver.
    """

    def __init__(self, index: int = 0):
        try:
            from cuda.bindings import runtime
        except ImportError as error:
            raise MissingExtraError("cuda-bindings", "tensorrt", "running engines") from error
        self.runtime: Any = runtime
        try:
            self.check(runtime.cudaSetDevice(index))
        except RuntimeError as error:
            raise InputError(f"device {index} must be a CUDA GPU with its driver: {error}") from error
        major, minor = (
            self.check(runtime.cudaDeviceGetAttribute(getattr(runtime.cudaDeviceAttr, name), index))
            for name in ("cudaDevAttrComputeCapabilityMajor", "cudaDevAttrComputeCapabilityMinor")
        )
        self.architecture = f"sm{major}{minor}"
        self.stream = self.check(runtime.cudaStreamCreate())
        self._buffers: list[Memory] = []

    def check(self, result: tuple[Any, ...]) -> Any:
        """Return the values of a CUDA call without its status. Raises RuntimeError that names the error of the call."""
        status, *values = result
        if status != self.runtime.cudaError_t.cudaSuccess:
            _, text = self.runtime.cudaGetErrorString(status)
            raise RuntimeError(f"CUDA error {int(status)}: {text.decode()}")
        return values[0] if values else None

    def allocate(self, size: int) -> Memory:
        """Return zeroed memory: a kernel may read the unwritten part of a cache, which must be finite."""
        buffer = Memory(int(self.check(self.runtime.cudaMalloc(size))), size)
        self._buffers.append(buffer)
        self.check(self.runtime.cudaMemsetAsync(buffer.pointer, 0, size, self.stream))
        return buffer

    def write(self, buffer: Memory, values: np.ndarray) -> None:
        """Copy an array to device memory and wait until it is there."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyHostToDevice
        self.check(self.runtime.cudaMemcpyAsync(buffer.pointer, values.ctypes.data, values.nbytes, kind, self.stream))
        self.synchronize()  # the caller may change or free the array afterwards

    def read(self, buffer: Memory, values: np.ndarray) -> None:
        """Copy device memory to an array and wait until it is there."""
        kind = self.runtime.cudaMemcpyKind.cudaMemcpyDeviceToHost
        self.check(self.runtime.cudaMemcpyAsync(values.ctypes.data, buffer.pointer, values.nbytes, kind, self.stream))
        self.synchronize()

    def synchronize(self) -> None:
        """Wait until the stream is idle."""
        self.check(self.runtime.cudaStreamSynchronize(self.stream))

    def close(self) -> None:
        """Free all memory and the stream."""
        for buffer in self._buffers:
            self.check(self.runtime.cudaFree(buffer.pointer))
        self._buffers.clear()
        self.check(self.runtime.cudaStreamDestroy(self.stream))
