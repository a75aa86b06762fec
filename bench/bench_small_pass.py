"""How much of a small student's frame is its matrix products and its attention, and how much everything else?

A steady frame of the built-in world (two passes, fused refresh, window of 3, batch 1, float32) against the same calls of
`F.linear`, of the patch embedding and of `block_attention` alone, on the very tensors of that frame, in turns. What lies between is
norms, GELU, cache writes, noise, checks, and Python. `--threads` gives the same for several thread counts.

    python -m cfpp_rt.bench.bench_small_pass [--threads 1 2] [--json PATH]
"""

import argparse
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F

from cfpp_rt.bench import harness
from cfpp_rt.bench.subject import WORLD, WORLD_ROLLOUT
from cfpp_rt.model import attention
from cfpp_rt.model.transformer import random_model
from cfpp_rt.rollout import Rollout
from cfpp_rt.values import Conditioning

LATENT = (6, 6)
ROUNDS = 400


def recorded(rollout: Rollout) -> list[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """The products and attentions of the rollout's next frame: functions and their arguments."""
    calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--json", metavar="PATH", help="append the rows as JSON lines")
    arguments = parser.parse_args()
    device = torch.device("cpu")
    rows: list[dict[str, Any]] = []
    print(f"{'threads':>8} {'frame ms':>9} {'products and attention':>23} {'ratio':>6}")
    for threads in arguments.threads:
        torch.set_num_threads(threads)
        model = random_model(WORLD, seed=0, dtype=torch.float32)
        text = Conditioning.none(1, WORLD.text_dim)
        rollout = Rollout(model, text, WORLD_ROLLOUT, latent_size=LATENT, frames=None)
        for _ in range(20):
            next(rollout)
        calls = recorded(rollout)

        def alone(calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = calls) -> None:
            for function, given in calls:
                function(*given)

        with torch.inference_mode():
            times = harness.measure_in_turns(
                {"frame": lambda rollout=rollout: next(rollout), "alone": alone},  # type: ignore[misc]
                device,
                rounds=ROUNDS,
            )
        ratio = times["frame"].median_ms / times["alone"].median_ms
        print(f"{threads:>8} {times['frame'].median_ms:>9.2f} {times['alone'].median_ms:>23.2f} {ratio:>6.2f}")
        rows.append(
            {
                "bench": "small_pass",
                "threads_used": threads,
                "frame_ms": times["frame"].median_ms,
                "frame_p10_ms": times["frame"].p10_ms,
                "products_and_attention_ms": times["alone"].median_ms,
                "products_and_attention_p10_ms": times["alone"].p10_ms,
                "ratio": ratio,
            }
        )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
