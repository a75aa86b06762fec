"""Measure the time that the host takes for one call of an op with next to nothing to compute.

With tensors of a few elements and one thread, the time is that of Python, of the checks and of passing tensors to C++.
On a GPU calls are launched one after the other without waiting, so the figure is the host's time per call there as
well. For comparison: x + y of torch and its scaled_dot_product_attention. Best of 7 rounds of 3000 calls.

    python -m cfpp_rt.bench.ops.call_overhead [--device cpu] [--json PATH]
"""

import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from cfpp_rt.bench import harness
from cfpp_rt.model.rope import RotaryTables
from cfpp_rt.ops.adaln_modulate import adaln_modulate
from cfpp_rt.ops.block_attention import block_attention
from cfpp_rt.ops.denoise_update import denoise_update
from cfpp_rt.ops.gated_residual import gated_residual
from cfpp_rt.ops.kv_update import kv_update_
from cfpp_rt.ops.token_ranges import TokenRanges

ROUNDS, CALLS, HEAD_DIM = 7, 3000, 64


def calls(device: torch.device) -> dict[str, Callable[[], Any]]:
    """Return one call per op, on the smallest tensors of the shapes that the model uses."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, row = (torch.randn(1, 1, HEAD_DIM, device=device, dtype=dtype) for _ in range(2))
    latent, sigma = torch.randn(1, 1, 1, 2, 2, device=device), torch.rand(1, 1, device=device)
    q, keys, values = torch.randn(3, 1, 1, 1, HEAD_DIM, device=device, dtype=dtype)
    ranges = TokenRanges.of([[(0, 1)]], capacity=1, batch=1, device=device)
    tables = RotaryTables.build(HEAD_DIM, 1, 1, device)
    time_table, weight = tables.time([0])[None], torch.ones(HEAD_DIM, device=device, dtype=dtype)
    write_index = torch.zeros(1, 1, dtype=torch.int32, device=device)
    rotation = (time_table, tables.rows, tables.columns, write_index)
    return {
        "kv_update_": lambda: kv_update_(keys, values, x, x, x, weight, weight, *rotation, 1e-6),
        "block_attention": lambda: block_attention(q, keys, values, ranges),
        "adaln_modulate": lambda: adaln_modulate(x, row, row, 1e-6),
        "gated_residual": lambda: gated_residual(x, x, row, row, row, 1e-6),
        "denoise_update": lambda: denoise_update(latent, latent, sigma, latent, sigma),
        "torch x + y": lambda: x + row,
        "torch sdpa": lambda: F.scaled_dot_product_attention(q, keys, values),
    }


def best_us(call: Callable[[], Any], device: torch.device) -> float:
    """Return the microseconds per call of the fastest round."""
    rounds = []
    for _ in range(ROUNDS + 1):  # the first round warms up
        begin = time.perf_counter()
        for _ in range(CALLS):
            call()
        rounds.append(time.perf_counter() - begin)
        if device.type == "cuda":
            torch.cuda.synchronize()
    return min(rounds[1:]) / CALLS * 1e6


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with torch.inference_mode():
        for name, call in calls(device).items():
            microseconds = best_us(call, device)
            rows.append({"bench": "call_overhead", "op": name, "us": microseconds})
            print(f"{name:<16} {microseconds:6.2f} us")
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
