"""Time passes in bfloat16 and float32, by this runtime and by the plain PyTorch baseline.

Passes over one frame at 480x832 (1560 tokens) of a network of Wan-1.3B's width with 2 of its 30 layers, one frame
visible: a pass costs what its layers cost. Both implementations in both dtypes are timed interleaved, pass by pass, so
that other load on the machine affects all of them alike; ratios are medians over rounds. The text embedding is not
timed.

    python -m cfpp_rt.bench.model.dtypes [--layers 2] [--rounds 7] [--device cpu] [--json PATH]
"""

import dataclasses
import statistics
from functools import partial
from typing import Any

import torch

from cfpp_rt.bench import harness
from cfpp_rt.bench.latency.baseline import EagerRollout
from cfpp_rt.config import MODELS, RolloutConfig
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed import fuse_gelu

ONE_PASS = RolloutConfig(steps=(1000,), refresh="skip", window=1)


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--layers", type=int, default=2, help="layers of the network (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="timed passes of each (default: %(default)s)")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    sizes = dataclasses.replace(MODELS["wan-1.3b"], num_layers=arguments.layers)
    text = torch.randn(1, sizes.text_len, sizes.text_dim, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Any] = {}
    for dtype in (torch.float32, torch.bfloat16):
        name = harness.dtype_name(dtype)
        model = fuse_gelu(random_model(sizes, seed=0, dtype=dtype, device=str(device)))
        for backend, kind in (("ours", Rollout), ("eager", EagerRollout)):
            rollout = kind(model, text, ONE_PASS, latent_size=harness.LATENT_480P, latent_frames=arguments.rounds + 1)
            calls[f"{backend} {name}"] = partial(next, rollout)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(arguments.rounds + 1):
        for name, call in calls.items():
            duration = harness.time_synchronized(call, device)
            if number > 0:  # the first round warms up
                times[name].append(duration)
    rows: list[dict[str, Any]] = []
    for name, durations in times.items():
        backend, dtype_name = name.split()
        ratios = {
            f"times_{other.replace(' ', '_')}": statistics.median(
                theirs / own for theirs, own in zip(times[other], durations, strict=True)
            )
            for other in times
            if other != name
        }
        row = {"bench": "dtypes", "layers": arguments.layers, "contender": backend, "dtype": dtype_name}
        rows.append({**row, "pass_ms": statistics.median(durations), "best_ms": min(durations), **ratios})
        print(f"{name:<16} median {rows[-1]['pass_ms']:>8.0f} ms, best {rows[-1]['best_ms']:>8.0f} ms;", end=" ")
        print(", ".join(f"{value:.2f} {key.replace('_', ' ')}" for key, value in ratios.items()), flush=True)
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
