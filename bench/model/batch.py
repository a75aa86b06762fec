"""What do streams cost each other: latency and pictures per second against the number of streams in one pass?

For 1, 2, ... streams of a student with random weights, each at a position of its own, with full windows: the time of a
step, which makes the next block of every stream, and the blocks per second of all. `turns` is the same number of
rollouts that are advanced one after the other, step by step in turns with the batch. Latents only, no decoding. The
world's blocks are pictures; Wan's are 4.

    python -m cfpp_rt.bench.model.batch [--model wan-1.3b] [--device cuda] [--streams 1 2 4 8] [--json PATH]
"""

import argparse
import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency.workload import SIZES, WORLD_ROLLOUT
from cfpp_rt.config import RolloutConfig, rollout_preset
from cfpp_rt.device.timing import peak_memory_mib
from cfpp_rt.model.transformer import random_model
from cfpp_rt.random_weights import random_prompt_embeds
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.runtime.rollout_batch import RolloutBatch
from cfpp_rt.speed import fuse_gelu, fuse_qkv, has_fused_gelu
from cfpp_rt.values import DTYPES

LATENTS = {"world": (6, 6), "small": (8, 12)}  # else 480x832


def settings(model: str, window: int | None) -> RolloutConfig:
    if model == "world":
        return WORLD_ROLLOUT if window is None else WORLD_ROLLOUT.replace(window=window)
    return dataclasses.replace(rollout_preset("framewise-2step"), window=window or 6, sinks=1)


def advance(rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        next(rollout)


def milliseconds(call: Callable[[], object], device: torch.device) -> float:
    harness.synchronize(device)
    begin = time.perf_counter()
    call()
    harness.synchronize(device)
    return 1000 * (time.perf_counter() - begin)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SIZES, default="world")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, help="(default: bfloat16 on CUDA, else float32)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8])
    parser.add_argument("--window", type=int, help="latent frames (default: 6, of the world 3)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    parser.add_argument("--json", metavar="PATH", help="append the rows as JSON lines")
    arguments = parser.parse_args()
    device, config = torch.device(arguments.device), settings(arguments.model, arguments.window)
    if device.type == "cpu" and arguments.model == "world":
        torch.set_num_threads(1)  # as `cfpp bench --model world`
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    sizes, latent_size = SIZES[arguments.model], LATENTS.get(arguments.model, (60, 104))
    model = fuse_qkv(random_model(sizes, seed=0, dtype=dtype, device=str(device)))
    if has_fused_gelu(device, dtype):
        fuse_gelu(model)
    # One stream after the other joins, so all are at positions of their own; then the windows are filled.
    before = max(arguments.streams) + (config.window or 0) + 2
    rows: list[dict[str, Any]] = []
    print(f"{'streams':>8} {'step ms':>9} {'p90':>9} {'blocks/s':>9} {'turns ms':>9} {'blocks/s':>9}   cache MiB")
    for streams in arguments.streams:
        batch = RolloutBatch(model, config, latent_size=latent_size, latent_frames=None, rows=streams)
        apart = []
        for seed in range(streams):
            text = random_prompt_embeds(f"prompt {seed}", sizes)
            batch.add(text, seed=seed)
            batch.step()
            apart.append(Rollout(model, text, config, latent_size=latent_size, latent_frames=None, seed=seed))
        for _ in range(before):
            batch.step()
            advance(apart)
        together, turns = [], []
        for _ in range(arguments.steps):
            together.append(milliseconds(batch.step, device))
            turns.append(milliseconds(partial(advance, apart), device))
        step, one_by_one = harness.Times.of(together), statistics.median(turns)
        rows.append(
            {
                "bench": "batch",
                "model": arguments.model,
                "dtype": str(dtype).removeprefix("torch."),
                "window": config.window,
                "streams": streams,
                "step_ms": step.median_ms,
                "step_ms_p90": step.p90_ms,
                "blocks_per_s": 1000 * streams / step.median_ms,
                "turns_ms": one_by_one,
                "turns_blocks_per_s": 1000 * streams / one_by_one,
                "cache_mib": batch.cache.nbytes / 2**20,
                "peak_memory_mib": peak_memory_mib(device),
            }
        )
        row = rows[-1]
        print(
            f"{streams:>8} {row['step_ms']:>9.2f} {row['step_ms_p90']:>9.2f} {row['blocks_per_s']:>9.1f}"
            f" {row['turns_ms']:>9.2f} {row['turns_blocks_per_s']:>9.1f} {row['cache_mib']:>11.1f}",
            flush=True,
        )
        del batch, apart
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
