"""Timings of a stream, under the metric names that docs/benchmark.md defines."""

import dataclasses
import time
from collections import deque
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch

_MAX_KEPT = 10_000  # durations of each kind: a stream without end must not grow


def percentile(values: Iterable[float], percent: float) -> float:
    """Return a percentile of at least one value, linear between neighbours. percent: 0..100."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    low = int(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (position - low)


@dataclasses.dataclass
class Timings:
    """Timings of one stream, filled while it runs; in milliseconds unless named otherwise. The newest 10,000 are kept.

    stages: durations of each stage, in order: encode_text, encode_image, diffuse (all passes of a block; with the
    fused refresh the clean pass of the block before is inside), refresh (separate mode only), decode.
    deliveries: (seconds since the stream was requested, frames delivered) for each `Frames`; seconds inside `outside`
    are not counted. outside_s: those seconds. num_frames: frames delivered so far.
    """

    device: torch.device
    started: float = dataclasses.field(default_factory=time.perf_counter)
    stages: dict[str, deque[float]] = dataclasses.field(default_factory=dict)
    deliveries: deque[tuple[float, int]] = dataclasses.field(default_factory=lambda: deque(maxlen=_MAX_KEPT))
    first_s: float | None = None
    num_frames: int = 0
    outside_s: float = 0.0
    _running: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = dataclasses.field(default_factory=list, repr=False)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time the body, the device's queue included, and mark it as a named range for a profiler.

        On a GPU events time it without waiting: the stage is in `stages` after the next delivery.
        """
        if self.device.type == "cuda":
            stream = torch.cuda.current_stream(self.device)
            started = stream.record_event(torch.cuda.Event(enable_timing=True))
            with _span(name, self.device):
                yield
            self._running.append((name, started, stream.record_event(torch.cuda.Event(enable_timing=True))))
            return
        begin = time.perf_counter()
        with _span(name, self.device):
            yield
        self._note(name, 1000 * (time.perf_counter() - begin))

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Exclude the body, the caller's work on the frames, from the intervals between deliveries."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self.outside_s += time.perf_counter() - begin

    def _note(self, name: str, ms: float) -> None:
        self.stages.setdefault(name, deque(maxlen=_MAX_KEPT)).append(ms)

    def deliver(self, num_frames: int) -> None:
        """Note that frames are in host memory. Stages of blocks computed ahead may still run and are noted later."""
        running, self._running = self._running, []
        for name, started, ended in running:
            if ended.query():
                self._note(name, started.elapsed_time(ended))
            else:
                self._running.append((name, started, ended))
        now = time.perf_counter() - self.started - self.outside_s
        self.deliveries.append((now, num_frames))
        self.first_s = now if self.first_s is None else self.first_s
        self.num_frames += num_frames

    def frame_ms(self) -> list[float]:
        """Return the intervals per frame between deliveries in steady state: the first two deliveries are left out."""
        kept = list(self.deliveries)
        steady = zip(kept[1:], kept[2:], strict=False)
        return [1000 * (now - before) / num_frames for (before, _), (now, num_frames) in steady]

    def summary(self) -> dict[str, float]:
        """Return ttff_ms, frame_ms_p50/p90/p99, fps (frames per second, request to last frame) and stage medians.

        None of them counts time inside `outside`.
        """
        if self.first_s is None:
            return {}
        out = {"ttff_ms": 1000 * self.first_s}
        intervals = self.frame_ms()
        if intervals:
            out |= {f"frame_ms_p{p}": percentile(intervals, p) for p in (50, 90, 99)}
        out["fps"] = self.num_frames / self.deliveries[-1][0]
        out |= {f"{name}_ms": percentile(values, 50) for name, values in self.stages.items()}
        return out


def _span(name: str, device: torch.device) -> AbstractContextManager[object]:
    """Return a range of torch's profiler while that runs, else an NVTX range on a GPU, else nothing."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(name)
    return torch.cuda.nvtx.range(name) if device.type == "cuda" else nullcontext()


def peak_memory_mib(device: torch.device) -> float:
    """Return the peak memory so far in MiB: allocated on a GPU, resident set of the process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held when it started this process
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) / 2**10
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
