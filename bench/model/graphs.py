"""Time what CUDA graphs save, frame by frame while the window fills.

Rolls out a student with random weights, one request to each backend, interleaved. `eager` launches every op from
Python, with the attention that the table chooses; `kernel` does the same with this project's attention kernel, whose
token ranges are in device memory; `graphed` replays that as CUDA graphs. Printed per number of visible frames: ms until
a latent frame is done (`frame_ms`), and ms until the host has enqueued all of it (`host_ms`; without the check for NaN,
which waits). `capture_s` is what the first rollout of a configuration pays for cache, warm-up and capture together.
kernel and graphed must produce the same bits.

    python -m cfpp_rt.bench.model.graphs [--model wan-1.3b] [--device cuda] [--frames 21] [--steps 1000,500 1000]
"""

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


def graphs_by_backend(model: CausalWanTransformer) -> dict[str, CudaGraphCache | None]:
    """Return the CUDA graph cache of each backend; None runs every op from Python."""
    return {
        "eager": None,
        "kernel": CudaGraphCache(model, lambda device: lambda run: run),  # the same buffers and calls, nothing captured
        "graphed": CudaGraphCache(model),
    }


def one_request(
    start: Start, cuda_graphs: CudaGraphCache | None, device: torch.device
) -> tuple[list[float], list[float], Tensor]:
    """Return the ms of every frame, the ms of its part on the host, and the latents."""
    rollout = start(cuda_graphs)
    frame_ms, host_ms, made = [], [], []
    harness.synchronize(device)
    for _ in range(rollout.latent_frames or 0):
        begin = time.perf_counter()
        block = next(rollout)
        enqueued = time.perf_counter()
        harness.synchronize(device)
        frame_ms.append(1000 * (time.perf_counter() - begin))
        host_ms.append(1000 * (enqueued - begin))
        made.append(block.values)
    return frame_ms, host_ms, torch.cat(made, dim=1)


def measure(start: Start, model: CausalWanTransformer, repeats: int, facts: dict[str, Any]) -> list[dict[str, Any]]:
    """Time one list of sampling steps, print the table and return its rows."""
    device, rows = model.device, []
    running, latents = graphs_by_backend(model), {}
    for name, cuda_graphs in list(running.items()):
        harness.synchronize(device)
        begin = time.perf_counter()
        rollout = start(cuda_graphs)
        harness.synchronize(device)
        seconds = time.perf_counter() - begin
        if cuda_graphs is not None and rollout.why_no_cuda_graphs is not None:
            print(f"{name} is left out: {rollout.why_no_cuda_graphs}")
            del running[name]
        elif name == "graphed":
            print(f"cache, warm-up and capture: {seconds:.2f} s")
            rows.append({"bench": "graphs_capture", **facts, "capture_s": seconds})
        del rollout
    times: dict[str, list[tuple[list[float], list[float]]]] = {name: [] for name in running}
    for number in range(repeats + 1):
        for name, cuda_graphs in running.items():
            frame_ms, host_ms, latents[name] = one_request(start, cuda_graphs, device)
            if number > 0:  # the first request warms up
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
    parser = harness.parser(__doc__, device=True, json=True)
    parser.set_defaults(device="cuda")
    parser.add_argument("--model", choices=SIZES, default="wan-1.3b")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--size", default="480x832", metavar="HxW", help="height x width (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=21, help="latent frames of a request (default: %(default)s)")
    parser.add_argument(
        "--steps", nargs="+", default=["1000,500", "1000"], metavar="LIST", help="lists of sampling steps"
    )
    parser.add_argument("--repeats", type=int, default=3, help="requests to each backend, after one that warms up")
    arguments = parser.parse_args()
    device = parse_device(arguments.device)
    height, width = parse_size(arguments.size)
    sizes = SIZES[arguments.model]
    model = random_model(sizes, seed=0, dtype=DTYPES[arguments.dtype], device=str(device))
    text, rows = random_prompt_embeds("a lighthouse in a storm", sizes), []
    for steps in arguments.steps:
        config = RolloutConfig(steps=tuple(int(step) for step in steps.split(",")))

        def start(cuda_graphs: CudaGraphCache | None, config: RolloutConfig = config) -> Rollout:
            size = (height // 8, width // 8)
            options: dict[str, Any] = {"latent_size": size, "latent_frames": arguments.frames, "check_finite": False}
            return Rollout(model, text, config, cuda_graphs=cuda_graphs, **options)

        print(f"{arguments.model} {arguments.dtype} {arguments.size} on {device}, steps {steps}, fused refresh")
        facts = {"model": arguments.model, "dtype": arguments.dtype, "size": arguments.size, "steps": steps}
        rows += measure(start, model, arguments.repeats, facts)
    harness.record(rows, arguments.json, device)
    if not all(row.get("same_bits", True) for row in rows):
        raise SystemExit("cfpp: a replayed CUDA graph differs from the passes that it captured")


if __name__ == "__main__":
    main()
