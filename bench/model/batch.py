"""Measure how latency and throughput of a `RolloutBatch` change with the number of streams in one pass.

For 1, 2, ... streams of a student with random weights, each at its own position and with a full window: the time of a
step, which generates the next block of every stream, and the blocks per second of all streams. For comparison ("apart")
the same number of rollouts is advanced one after the other, interleaved with the steps of the batch. Latents only: no
codec runs. A block of the world is one frame of pixels, a block of Wan is 4.

    python -m cfpp_rt.bench.model.batch [--model wan-1.3b] [--device cuda] [--streams 1 2 4 8] [--json PATH]
"""

import dataclasses
import statistics
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

LATENT_SIZES = {"world": (6, 6), "small": (8, 12)}  # all others: 480x832


def rollout_config(model: str, window: int | None) -> RolloutConfig:
    if model == "world":
        return WORLD_ROLLOUT if window is None else WORLD_ROLLOUT.replace(window=window)
    return dataclasses.replace(rollout_preset("framewise-2step"), window=window or 6, sinks=1)


def advance(rollouts: list[Rollout]) -> None:
    for rollout in rollouts:
        next(rollout)


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--model", choices=SIZES, default="world")
    parser.add_argument("--dtype", choices=DTYPES, help="dtype of the model (default: bfloat16 on CUDA, else float32)")
    parser.add_argument("--streams", type=int, nargs="+", default=[1, 2, 3, 4, 6, 8], help="batch sizes to time")
    parser.add_argument("--window", type=int, help="latent frames visible to attention (default: 6; world 3)")
    parser.add_argument("--steps", type=int, default=20, help="timed steps (default: 20)")
    arguments = parser.parse_args()
    device, config = torch.device(arguments.device), rollout_config(arguments.model, arguments.window)
    if device.type == "cpu" and arguments.model == "world":
        torch.set_num_threads(1)  # like `cfpp bench --model world`
    dtype = DTYPES[arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
    sizes, latent_size = SIZES[arguments.model], LATENT_SIZES.get(arguments.model, harness.LATENT_480P)
    model = fuse_qkv(random_model(sizes, seed=0, dtype=dtype, device=str(device)))
    if has_fused_gelu(device, dtype):
        fuse_gelu(model)
    # Streams are added one step apart, so that each has its own position; then the windows are filled.
    before = max(arguments.streams) + (config.window or 0) + 2
    rows: list[dict[str, Any]] = []
    print(f"{'streams':>8} {'step ms':>9} {'p90':>9} {'blocks/s':>9} {'apart ms':>9} {'blocks/s':>9}   cache MiB")
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
        together, one_by_one = [], []
        for _ in range(arguments.steps):
            together.append(harness.time_synchronized(batch.step, device))
            one_by_one.append(harness.time_synchronized(partial(advance, apart), device))
        step, apart_ms = harness.Times.of(together), statistics.median(one_by_one)
        rows.append(
            {
                "bench": "batch",
                "model": arguments.model,
                "dtype": harness.dtype_name(dtype),
                "window": config.window,
                "streams": streams,
                "step_ms": step.median_ms,
                "step_ms_p90": step.p90_ms,
                "blocks_per_s": 1000 * streams / step.median_ms,
                "turns_ms": apart_ms,
                "turns_blocks_per_s": 1000 * streams / apart_ms,
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
