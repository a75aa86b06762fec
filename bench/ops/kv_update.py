"""Time kv_update_: share of the peak bandwidth, and speed-up over plain PyTorch.

Shapes of one latent frame at 480x832 (T = 1560 tokens, 12 heads of 128). Bytes: q, k and v read once; q, K and V
written once, K and V in the dtype of the others or in float8. The peak is a copy of a large buffer in the same run. The
reference is `cfpp_rt/reference/kv_update.py`.

The inputs are the same in every call and fit into a GPU's L2 cache, as they do in the model, where the projections have
just been written: more than 100 % of the peak is possible.

    python -m cfpp_rt.bench.ops.kv_update [--device cpu] [--json PATH]
"""

from functools import partial
from typing import Any

import torch

from cfpp_rt.bench import harness
from cfpp_rt.model.rope import RotaryTables
from cfpp_rt.ops.kv_update import kv_update_
from cfpp_rt.reference.kv_update import kv_update_ as reference

ROWS, COLUMNS, HEADS, HEAD_DIM, CACHE_FRAMES = 30, 52, 12, 128, 4
TOKENS, WIDTH = ROWS * COLUMNS, HEADS * HEAD_DIM


def make_arguments(dtype: torch.dtype, kv_dtype: torch.dtype, device: torch.device) -> tuple[Any, ...]:
    """Return the arguments of kv_update_; q, k and v are views of one packed projection."""
    torch.manual_seed(0)
    cache = torch.zeros(2, 1, HEADS, CACHE_FRAMES * TOKENS, HEAD_DIM, device=device).to(kv_dtype)
    qkv = torch.randn(1, TOKENS, 3 * WIDTH, device=device).to(dtype).chunk(3, dim=-1)
    norms = (torch.randn(2, WIDTH, device=device) * 0.1 + 1).to(dtype)
    tables = RotaryTables.build(HEAD_DIM, ROWS, COLUMNS, device)
    write_index = torch.tensor([[TOKENS]], dtype=torch.int32, device=device)
    scales = () if kv_dtype == dtype else torch.ones(2, 1, HEADS, device=device)
    return (*cache, *qkv, *norms, tables.time([7])[None], tables.rows, tables.columns, write_index, 1e-6, *scales)


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backend, peak = harness.op_backend("kv_update_", device)
    rows: list[dict[str, Any]] = []
    header = f"{'dtype':>9} {'cache':>14} {'ms':>8} {'p10':>8} {'p90':>8} {'GB/s':>8} {'% of peak':>9}"
    print(f"{header} {'reference':>9} {'speed-up':>8}")
    pairs = [(dtype, stored) for dtype in (torch.bfloat16, torch.float32) for stored in (dtype, torch.float8_e4m3fn)]
    for dtype, kv_dtype in pairs:
        tensors = make_arguments(dtype, kv_dtype, device)
        with torch.inference_mode():
            times = harness.measure(partial(kv_update_, *tensors), device)
            plain = harness.measure(partial(reference, *tensors), device, repeats=20)
        num_bytes = TOKENS * WIDTH * (4 * dtype.itemsize + 2 * kv_dtype.itemsize)
        figures = harness.bandwidth_row(times, num_bytes, peak)
        speed_up = plain.median_ms / times.median_ms
        name, kv_name = harness.dtype_name(dtype), harness.dtype_name(kv_dtype)
        print(
            f"{name:>9} {kv_name:>14} {times.median_ms:>8.3f} {times.p10_ms:>8.3f} {times.p90_ms:>8.3f} "
            f"{figures['gb_per_s']:>8.1f} {figures['percent_of_roof']:>9.0f} {plain.median_ms:>9.3f} {speed_up:>7.1f}x"
        )
        rows.append(
            {
                "bench": "kv_update",
                "backend": backend,
                "dtype": name,
                "kv_dtype": kv_name,
                "tokens": TOKENS,
                "heads": HEADS,
                "head_dim": HEAD_DIM,
                **figures,
                "reference_ms": plain.median_ms,
                "speed_up": speed_up,
            }
        )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
