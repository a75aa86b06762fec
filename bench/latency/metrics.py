"""Metrics of `cfpp bench`: run requests to the backends interleaved, and summarize their times."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from cfpp_rt.bench.latency.workload import Workload
from cfpp_rt.bench.roofline import block_flops
from cfpp_rt.device.timing import Timings, percentile

# Metric: (explanation, True if less of it is better). docs/benchmark.md explains them at length.
METRICS = {
    "ttff_ms": ("time to first frame: start of the request to its first decoded frame", True),
    "frame_ms_p50": ("interval per frame in steady state, median", True),
    "frame_ms_p90": ("  90th percentile", True),
    "frame_ms_p99": ("  99th percentile", True),
    "fps": ("frames per second of one video, from the request to the last frame", False),
    "encode_text_ms": ("text encoder, once per request", True),
    "diffuse_ms": ("passes of one block, steady state", True),
    "refresh_ms": ("clean pass of one block, if it is a stage of its own", True),
    "decode_ms": ("latents of one block to frames, steady state", True),
    "cold_start_s": ("start of a process to its first frame", True),
    "peak_memory_mib": ("largest memory of that process over the request", True),
    "percent_of_roof": ("FLOP/s of a block's passes, in % of the peak matrix rate (as MFU)", False),
}
_STEADY = 2  # blocks before the steady state: the first may take more steps and pays for work that is done once


@dataclasses.dataclass(frozen=True)
class Block:
    """Time of one block: visible latent frames (its own included), sampling steps, ms of all its passes."""

    visible: int
    steps: int
    ms: float


def run_interleaved(
    workload: Workload, backends: Sequence[str], repeats: int, log: Callable[[str], None]
) -> dict[str, list[Timings]]:
    """Run `repeats` requests to each backend, interleaved, after a short warm-up each; return their times by backend.

    A "compiled" backend that cannot run is left out, and `log` receives the reason.
    """
    times: dict[str, list[Timings]] = {}
    for backend in backends:
        try:
            for _ in islice(workload.stream(backend), _STEADY + 1):  # of a full-length request: graphs fit its cache
                pass
            times[backend] = []
        except Exception as error:
            if backend != "compiled":
                raise
            log(f"compiled is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    for seed in range(repeats):
        for backend, done in times.items():
            stream = workload.stream(backend, seed)
            for _ in stream:
                pass
            done.append(stream.timings)
    return times


def blocks(workload: Workload, timings: Timings) -> list[Block]:
    """Return the blocks of one request in order."""
    config, n = workload.config, workload.config.frames_per_block
    refresh = [0.0, *timings.stages.get("refresh", [])]  # of the block before; the first block has none
    made = []
    for index, diffuse in enumerate(timings.stages["diffuse"]):
        visible = (index + 1) * n if config.window is None else min((index + 1) * n, config.window)
        steps = config.first_steps if index == 0 and config.first_steps else config.steps
        made.append(Block(visible, len(steps), diffuse + (refresh[index] if len(refresh) > 1 else 0.0)))
    return made


def summarize(workload: Workload, requests: Sequence[Timings], peak: float) -> dict[str, float]:
    """Return the metrics of several requests to one backend.

    Intervals and stages are pooled over the requests; all other metrics are medians. peak: TFLOP/s.
    """
    out = {"ttff_ms": statistics.median(1000 * (timings.first_s or 0.0) for timings in requests)}
    intervals = [interval for timings in requests for interval in timings.frame_ms()]
    if intervals:
        out |= {f"frame_ms_p{p}": percentile(intervals, p) for p in (50, 90, 99)}
    out["fps"] = statistics.median(timings.summary()["fps"] for timings in requests)
    for stage in ("encode_text", "diffuse", "refresh", "decode"):
        skipped = {"encode_text": 0, "refresh": _STEADY - 1}.get(stage, _STEADY)
        steady = [ms for timings in requests for ms in list(timings.stages.get(stage, ()))[skipped:]]
        if steady:
            out[f"{stage}_ms"] = statistics.median(steady)
    shares = [
        _percent_of_peak(workload, block, peak) for timings in requests for block in blocks(workload, timings)[_STEADY:]
    ]
    if shares:
        out["percent_of_roof"] = statistics.median(shares)
    return out


def window_fill(workload: Workload, requests: Sequence[Timings], peak: float) -> list[dict[str, Any]]:
    """Return one row per number of visible frames and of steps: ms of a block's passes, and their percent of peak."""
    kinds: dict[tuple[int, int], list[Block]] = {}
    for timings in requests:
        for block in blocks(workload, timings):
            kinds.setdefault((block.visible, block.steps), []).append(block)
    return [
        {
            "visible_frames": visible,
            "block_steps": steps,
            "block_ms": statistics.median(block.ms for block in made),
            "percent_of_roof": statistics.median(_percent_of_peak(workload, block, peak) for block in made),
        }
        for (visible, steps), made in sorted(kinds.items())
    ]


def _percent_of_peak(workload: Workload, block: Block, peak: float) -> float:
    batch, model_config = workload.facts["batch"], workload.pipeline.model.config
    flops = batch * block_flops(model_config, workload.config, workload.tokens, block.visible, steps=block.steps)
    return 100 * flops / block.ms / 1e9 / peak


def table(results: dict[str, dict[str, float]]) -> str:
    """Return a table with one line per metric, one column per backend, and how the backends compare with ours."""
    lines = [" " * 17 + "".join(f"{name:>12}" for name in results)]
    for metric, (explanation, _) in METRICS.items():
        values = [result.get(metric) for result in results.values()]
        if any(value is not None for value in values):
            cells = "".join(f"{'-' if value is None else f'{value:,.{_digits(value)}f}':>12}" for value in values)
            lines.append(f"  {metric:<15}{cells}  {explanation}")
    ours = results.get("ours", {}).get("frame_ms_p50")
    for name, result in results.items():
        if ours and name != "ours" and "frame_ms_p50" in result:
            lines.append(f"  {name} takes {result['frame_ms_p50'] / ours:.2f} x the time of ours per frame")
    return "\n".join(lines)


def _digits(value: float) -> int:
    return 0 if value >= 1000 else 1 if value >= 10 else 2
