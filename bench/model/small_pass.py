"""Split the time of a small student's frame: matrix products and attention, and everything else.

A steady frame of the built-in world (two passes, fused refresh, window of 3, batch 1, float32) is timed interleaved
with its calls of `F.linear` and `block_attention` alone, on the very tensors of that frame. The difference is norms,
GELU, cache writes, noise, checks and Python. On a busy machine the lowest decile is more reliable than the median.
`host` is a frame of a network with one token and 16 channels: the same calls with next to no arithmetic. `eager` is a
frame of the baseline of `cfpp bench`.

    python -m cfpp_rt.bench.model.small_pass [--threads 1 2] [--json PATH]
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency.baseline import EagerRollout
from cfpp_rt.bench.latency.workload import WORLD, WORLD_ROLLOUT
from cfpp_rt.config import ModelConfig
from cfpp_rt.model import attention
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed import fuse_gelu, fuse_qkv
from cfpp_rt.values import empty_prompt_embeds

LATENT_SIZE = (6, 6)
EMPTY = dataclasses.replace(WORLD, dim=16, ffn_dim=16, in_dim=1, out_dim=1)
ROUNDS = 150

Calls = list[tuple[Callable[..., Any], tuple[Any, ...]]]


def run_all(calls: Calls) -> None:
    for function, given in calls:
        function(*given)


def recorded(rollout: Rollout) -> Calls:
    """Return the matrix products and attentions of the rollout's next frame, as functions and arguments."""
    calls: Calls = []

    def recording(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            calls.append((function, arguments))
            return function(*arguments)

        return call

    with (
        patch.object(F, "linear", recording(F.linear)),
        patch.object(attention, "block_attention", recording(attention.block_attention)),
    ):
        next(rollout)
    return calls


def steady(config: ModelConfig, latent_size: tuple[int, int], *, gelu: bool) -> Rollout:
    """Return a rollout with a full window, of a model like that of `load_world_pipeline`; gelu: fuse GELU as well."""
    model = fuse_qkv(random_model(config, seed=0, dtype=torch.float32))
    if gelu:
        fuse_gelu(model)
    text = empty_prompt_embeds(1, config.text_dim)
    rollout = Rollout(model, text, WORLD_ROLLOUT, latent_size=latent_size, latent_frames=None)
    for _ in range(20):
        next(rollout)
    return rollout


def eager_rollout() -> EagerRollout:
    """Return a rollout of the plain PyTorch baseline of the same size."""
    model = random_model(WORLD, seed=0, dtype=torch.float32)
    text = empty_prompt_embeds(1, WORLD.text_dim)
    return EagerRollout(model, text, WORLD_ROLLOUT, latent_size=LATENT_SIZE, latent_frames=ROUNDS + 2)


def main() -> None:
    parser = harness.parser(__doc__, json=True)
    parser.add_argument("--threads", type=int, nargs="+", default=[1], help="numbers of CPU threads")
    arguments = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print(f"{'threads':>8} {'':>7}{'frame':>8} {'products, attention':>20} {'ratio':>6} {'host':>6} {'eager':>7}   us")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        rollout, empty = steady(WORLD, LATENT_SIZE, gelu=True), steady(EMPTY, (1, 1), gelu=True)
        plain = eager_rollout()
        calls = recorded(steady(WORLD, LATENT_SIZE, gelu=False))
        measured = {
            "frame": partial(next, rollout),
            "alone": partial(run_all, calls),
            "host": partial(next, empty),
            "eager": partial(next, plain),
        }
        with torch.inference_mode():
            times = harness.measure_interleaved(measured, torch.device("cpu"), rounds=ROUNDS)
        row: dict[str, Any] = {"bench": "small_pass", "threads_used": threads}
        for kind in ("median", "p10"):
            frame, alone, host, eager = (1000 * getattr(times[name], f"{kind}_ms") for name in measured)
            print(
                f"{threads:>8} {kind:>7}{frame:>8.0f} {alone:>20.0f} {frame / alone:>6.2f} {host:>6.0f} {eager:>7.0f}"
            )
            figures = {"frame_us": frame, "products_and_attention_us": alone, "ratio": frame / alone, "host_us": host}
            figures |= {"eager_us": eager, "times_eager": eager / frame}
            row |= {f"{name}_{kind}": value for name, value in figures.items()}
        rows.append(row)
    harness.record(rows, arguments.json, torch.device("cpu"))


if __name__ == "__main__":
    main()
