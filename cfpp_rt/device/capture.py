"""Capture of fixed work as a CUDA graph."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

Work = Callable[[], Any]
# Maps work on buffers at fixed addresses to a function that repeats it. The result is in the same memory every time and
# is overwritten by the next run.
Capture = Callable[[Work], Work]

_WARM_UPS = 2  # the first run compiles, loads and allocates, which is not allowed during capture


class CudaCapture:
    """Captures CUDA graphs on a separate stream. All share one memory pool, so they must not run at the same time."""

    def __init__(self, device: torch.device):
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._pool = torch.cuda.graph_pool_handle()

    def __call__(self, run: Work) -> Work:
        current = torch.cuda.current_stream(self._device)
        self._stream.wait_stream(current)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(self._stream):
            try:
                for _ in range(_WARM_UPS):
                    run()
                # With "thread_local", other threads may still do what capture forbids, such as allocating.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = run()
                graph.capture_end()
            except BaseException:
                self._abort(graph)
                raise
        current.wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def _abort(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed, and repair the state of torch.

        If CUDA has invalidated the capture, torch ends it but leaves its allocator in the pool and its random number
        generator in capture mode. The pool is released here; the generator recovers at the next capture that succeeds.
        """
        with suppress(RuntimeError):
            graph.capture_end()
        self._stream.synchronize()  # memory that the warm-up still uses is about to be freed
        index = torch.cuda.current_device()
        with suppress(RuntimeError):  # the allocator has left the pool already
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        zero, another = torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
        another.capture_begin(capture_error_mode="thread_local")
        zero.zero_()
        another.capture_end()
