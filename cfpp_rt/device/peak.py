"""Measurement of the peak rate of a device, to which shares of peak such as MFU refer."""

import statistics
import time
from collections.abc import Callable

import torch

_WARM_UPS, _REPEATS, _MIN_SECONDS = 2, 10, 0.5


def peak_matmul_flops(device: torch.device, dtype: torch.dtype, shape: tuple[int, int, int] | None = None) -> float:
    """Return the FLOP/s that one large matrix product reaches on `device`: the median of at least ten.

    shape: (rows, inner, columns) of the product. Default: 8192 each on CUDA, 2048 each on a CPU.
    """
    rows, inner, columns = shape or 3 * (8192 if device.type == "cuda" else 2048,)
    a = torch.randn(rows, inner, device=device).to(dtype)
    b = torch.randn(inner, columns, device=device).to(dtype)
    out = torch.empty(rows, columns, device=device, dtype=dtype)
    seconds: list[float] = []
    begin = time.perf_counter()
    while len(seconds) < _WARM_UPS + _REPEATS or time.perf_counter() - begin < _MIN_SECONDS:
        seconds.append(_time(lambda: torch.mm(a, b, out=out), device))
    return 2 * rows * inner * columns / statistics.median(seconds[_WARM_UPS:])


def _time(call: Callable[[], object], device: torch.device) -> float:
    """Return the seconds of one call: by CUDA events on a GPU, else by the clock of the host."""
    if device.type != "cuda":
        begin = time.perf_counter()
        call()
        return time.perf_counter() - begin
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    call()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1000
