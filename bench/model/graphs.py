"""What do CUDA graphs save, frame by frame as the window fills?

Rolls a student of random weights out, one request to each contender in turns: `eager` launches every op from Python,
with the attention that the table names; `kernel` the same with this project's attention kernel, whose ranges lie on the
device; `graphed` replays it. Per number of visible frames: ms until a latent frame is done (`frame_ms`), and ms until
the host has asked for all of it (`host_ms`; no check for NaN, which waits). `capture_s` is what the first rollout of a
setting pays for cache, warm-up and capture together. kernel and graphed must make the same bits.

    python -m cfpp_rt.bench.model.graphs [--model wan-1.3b] [--device cuda] [--frames 21] [--steps 1000,500 1000]
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.bench import harness
from cfpp_rt.config import MODELS, RolloutConfig
from cfpp_rt.model.transformer import CausalWanTransformer, random_model
from cfpp_rt.options import parse_device, parse_size
from cfpp_rt.random_weights import SMALL, random_prompt_embeds
from cfpp_rt.runtime.cuda_graphs import CudaGraphCache
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import DTYPES

SIZES = {**MODELS, "small": SMALL}
Start = Callable[[CudaGraphCache | None], Rollout]


def contenders(model: CausalWanTransformer) -> dict[str, CudaGraphCache | None]:
    """The graphs that each rolls out with."""
    return {
        "eager": None,
        "kernel": CudaGraphCache(model, lambda device: lambda run: run),  # the same buffers and calls, nothing captured
        "graphed": CudaGraphCache(model),
    }


def one_request(
    start: Start, graphs: CudaGraphCache | None, device: torch.device
) -> tuple[list[float], list[float], Tensor]:
    """Milliseconds of every frame, of its host's part, and the latents."""
    rollout = start(graphs)
    frame_ms, host_ms, made = [], [], []
    harness.synchronize(device)
    for _ in range(rollout.latent_frames or 0):
        begin = time.perf_counter()
        block = next(rollout)
        asked = time.perf_counter()
        harness.synchronize(device)
        frame_ms.append(1000 * (time.perf_counter() - begin))
        host_ms.append(1000 * (asked - begin))
        made.append(block.values)
    return frame_ms, host_ms, torch.cat(made, dim=1)


def measure(start: Start, model: CausalWanTransformer, repeats: int, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows of one list of steps, printed."""
    device, rows = model.device, []
    running, latents = contenders(model), {}
    for name, graphs in list(running.items()):
        harness.synchronize(device)
        begin = time.perf_counter()
        rollout = start(graphs)
        harness.synchronize(device)
        seconds = time.perf_counter() - begin
        if graphs is not None and rollout.why_no_cuda_graphs is not None:
            print(f"{name} is left out: {rollout.why_no_cuda_graphs}")
            del running[name]
        elif name == "graphed":
            print(f"cache, warm-up and capture: {seconds:.2f} s")
            rows.append({"bench": "graphs_capture", **facts, "capture_s": seconds})
        del rollout
    times: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in running}
    for turn in range(repeats + 1):
        for name, graphs in running.items():
            frame_ms, host_ms, latents[name] = one_request(start, graphs, device)
            if turn > 0:  # the first one warms up
                times[name].append((frame_ms, host_ms))
    print(f"{'visible':>8}" + "".join(f"{f'{name} ms':>12}{'host ms':>9}" for name in running))
    for index in range(len(next(iter(times.values()))[0][0])):
        cells = ""
        for name, requests in times.items():
            frame, host = (statistics.median(request[i][index] for request in requests) for i in range(2))
            cells += f"{frame:>12.2f}{host:>9.2f}"
            row = {"contender": name, "visible_frames": index + 1, "frame_ms": frame, "host_ms": host}
            rows.append({"bench": "graphs", **facts, **row})
        print(f"{index + 1:>8}{cells}")
    if {"kernel", "graphed"} <= set(latents):
        same = torch.equal(latents["kernel"], latents["graphed"])
        print(f"kernel and graphed made the same bits: {same}")
        rows.append({"bench": "graphs_agree", **facts, "same_bits": same})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="wan-1.3b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", default="480x832", metavar="HxW")
    parser.add_argument("--frames", type=int, default=21, help="latent frames of a request")
    parser.add_argument("--steps", nargs="+", default=["1000,500", "1000"], metavar="LIST")
    parser.add_argument("--repeats", type=int, default=3, help="requests to each contender, after one that warms up")
    parser.add_argument("--json", metavar="PATH", help="append the rows as JSON lines")
    arguments = parser.parse_args()
    device = parse_device(arguments.device)
    height, width = parse_size(arguments.size)
    sizes = SIZES[arguments.model]
    model = random_model(sizes, seed=0, dtype=DTYPES[arguments.dtype], device=str(device))
    text, rows = random_prompt_embeds("a lighthouse in a storm", sizes), []
    for steps in arguments.steps:
        config = RolloutConfig(steps=tuple(int(step) for step in steps.split(",")))

        def start(graphs: CudaGraphCache | None, config: RolloutConfig = config) -> Rollout:
            size = (height // 8, width // 8)
            options: dict[str, Any] = {"latent_size": size, "frames": arguments.frames, "check_finite": False}
            return Rollout(model, text, config, cuda_graphs=graphs, **options)

        print(f"{arguments.model} {arguments.dtype} {arguments.size} on {device}, steps {steps}, fused refresh")
        facts = {"model": arguments.model, "dtype": arguments.dtype, "size": arguments.size, "steps": steps}
        rows += measure(start, model, arguments.repeats, facts)
    harness.record(rows, arguments.json, device)
    if not all(row.get("same_bits", True) for row in rows):
        raise SystemExit("cfpp: a replayed graph computes something else than its passes")


if __name__ == "__main__":
    main()
