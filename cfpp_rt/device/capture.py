"""Capture of a fixed piece of work as a CUDA graph."""

from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch

Work = Callable[[], Any]
# Captures work over buffers that never move, and returns a function that runs it again: the result lies in the same
# memory every time, and is overwritten by the next run.
Capture = Callable[[Work], Work]

_WARM_UPS = 2  # the first run compiles, loads and allocates, which must not happen during capture


class CudaCapture:
    """Captures work as CUDA graphs, on a CUDA stream of its own and in one memory pool; no two of them run at once."""

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
                # Other threads may go on with what capture forbids, such as allocating.
                graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
                result = run()
                graph.capture_end()
            except BaseException:
                self._give_up(graph)
                raise
        current.wait_stream(self._stream)

        def replay() -> Any:
            graph.replay()
            return result

        return replay

    def _give_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """End a capture that failed.

        Where CUDA has invalidated the capture, torch ends it but goes on as if it had not: its allocator stays in the
        pool, which this call ends, and its random numbers stay in capture mode until another capture ends well.
        """
        with suppress(RuntimeError):
            graph.capture_end()
        self._stream.synchronize()  # what warming up still reads and writes is about to be freed
        index = torch.cuda.current_device()
        with suppress(RuntimeError):  # the allocator has left the pool already
            torch._C._cuda_endAllocateToPool(index, self._pool)
            torch._C._cuda_releasePool(index, self._pool)
        zero, another = torch.zeros(1, device=self._device), torch.cuda.CUDAGraph()
        another.capture_begin(capture_error_mode="thread_local")
        zero.zero_()
        another.capture_end()
