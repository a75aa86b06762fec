"""The latency of contenders in the words of the benchmark: requests in turns, and what became of their times."""

import dataclasses
import statistics
from collections.abc import Callable, Sequence
from itertools import islice
from typing import Any

from cfpp_rt.bench.latency.workload import Subject
from cfpp_rt.bench.roofline import block_flops
from cfpp_rt.device.timing import Timings, percentile

# The words of a row, what each means, and whether less of it is better. The same everywhere: see docs/benchmark.md.
WORDS = {
    "ttff_ms": ("start of the request to its first decoded picture", True),
    "frame_ms_p50": ("interval per picture, steady state, median", True),
    "frame_ms_p90": ("  90th percentile", True),
    "frame_ms_p99": ("  99th percentile", True),
    "fps": ("pictures of a video per second, request to last picture", False),
    "encode_text_ms": ("text encoder, once per request", True),
    "diffuse_ms": ("passes of one block, steady state", True),
    "refresh_ms": ("clean pass of one block, where it is a stage of its own", True),
    "decode_ms": ("latents to pixels of one block, steady state", True),
    "cold_start_s": ("start of a process to its first picture", True),
    "peak_memory_mib": ("of that process, over the whole request", True),
    "percent_of_roof": ("arithmetic of a block in its time, of the matrix rate", False),
}
_STEADY = 2  # blocks left out of steady state: the first may take more steps, and pays for what is made once


@dataclasses.dataclass(frozen=True)
class Block:
    """One block's making: latent frames seen (itself included), denoising steps, ms of all its passes."""

    visible: int
    steps: int
    ms: float


def in_turns(subject: Subject, contenders: Sequence[str], repeats: int, say: Callable[[str], None]) -> dict:
    """The `Timings` of `repeats` requests to each contender, one request each in turns, after a short warm-up each.

    A contender that cannot run is left out: `say` tells why, and it has no times.
    """
    times: dict[str, list[Timings]] = {}
    for contender in contenders:
        try:
            for _ in islice(subject.stream(contender), _STEADY + 1):  # of a whole request: graphs are of its cache
                pass
            times[contender] = []
        except Exception as error:
            if contender != "compiled":
                raise
            say(f"compiled is left out: {type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
    for seed in range(repeats):
        for contender, done in times.items():
            stream = subject.stream(contender, seed)
            for _ in stream:
                pass
            done.append(stream.timings)
    return times


def blocks(subject: Subject, timings: Timings) -> list[Block]:
    """The blocks of one request in order."""
    rollout, n = subject.rollout, subject.rollout.frames_per_block
    refresh = [0.0, *timings.stages.get("refresh", [])]  # of the block before: the first has none
    made = []
    for index, diffuse in enumerate(timings.stages["diffuse"]):
        visible = (index + 1) * n if rollout.window is None else min((index + 1) * n, rollout.window)
        steps = rollout.first_steps if index == 0 and rollout.first_steps else rollout.steps
        made.append(Block(visible, len(steps), diffuse + (refresh[index] if len(refresh) > 1 else 0.0)))
    return made


def words(subject: Subject, requests: Sequence[Timings], roof: float) -> dict[str, float]:
    """The words of several requests to one contender: intervals and stages pooled, the rest medians. roof: TFLOP/s."""
    out = {"ttff_ms": statistics.median(1000 * (timings.first_s or 0.0) for timings in requests)}
    intervals = [interval for timings in requests for interval in timings.frame_ms()]
    if intervals:
        out |= {f"frame_ms_p{p}": percentile(intervals, p) for p in (50, 90, 99)}
    out["fps"] = statistics.median(timings.pictures / timings.deliveries[-1][0] for timings in requests)
    for stage in ("encode_text", "diffuse", "refresh", "decode"):
        skipped = {"encode_text": 0, "refresh": _STEADY - 1}.get(stage, _STEADY)
        steady = [ms for timings in requests for ms in list(timings.stages.get(stage, ()))[skipped:]]
        if steady:
            out[f"{stage}_ms"] = statistics.median(steady)
    shares = [_share(subject, block, roof) for timings in requests for block in blocks(subject, timings)[_STEADY:]]
    if shares:
        out["percent_of_roof"] = statistics.median(shares)
    return out


def window_fill(subject: Subject, requests: Sequence[Timings], roof: float) -> list[dict[str, Any]]:
    """One row per number of visible frames and of steps: ms of a block's passes, and their share of the roof."""
    kinds: dict[tuple[int, int], list[Block]] = {}
    for timings in requests:
        for block in blocks(subject, timings):
            kinds.setdefault((block.visible, block.steps), []).append(block)
    return [
        {
            "visible_frames": visible,
            "block_steps": steps,
            "block_ms": statistics.median(block.ms for block in made),
            "percent_of_roof": statistics.median(_share(subject, block, roof) for block in made),
        }
        for (visible, steps), made in sorted(kinds.items())
    ]


def _share(subject: Subject, block: Block, roof: float) -> float:
    batch, sizes = subject.words["batch"], subject.pipeline.model.config
    flops = batch * block_flops(sizes, subject.rollout, subject.tokens, block.visible, steps=block.steps)
    return 100 * flops / block.ms / 1e9 / roof


def table(found: dict[str, dict[str, float]]) -> str:
    """Words down, contenders across; beside each other contender how many times ours it is."""
    lines = [" " * 17 + "".join(f"{name:>12}" for name in found)]
    for word, (meaning, _) in WORDS.items():
        values = [result.get(word) for result in found.values()]
        if any(value is not None for value in values):
            cells = "".join(f"{'-' if value is None else f'{value:,.{_digits(value)}f}':>12}" for value in values)
            lines.append(f"  {word:<15}{cells}  {meaning}")
    ours = found.get("ours", {}).get("frame_ms_p50")
    for name, result in found.items():
        if ours and name != "ours" and "frame_ms_p50" in result:
            lines.append(f"  {name} takes {result['frame_ms_p50'] / ours:.2f} x the time of ours per picture")
    return "\n".join(lines)


def _digits(value: float) -> int:
    return 0 if value >= 1000 else 1 if value >= 10 else 2
