"""Time kv_dequantize_, the reading of a float8 cache: share of the peak bandwidth, and of attention's time.

The cache has 12 heads of 128 at 480x832 (1560 tokens per latent frame), of which 1, 3 or 6 frames are visible. Bytes:
for every element of keys and values 1 byte read, and its size in the model's dtype written. The peak is a copy of a
large buffer in the same run. Attention is block_attention of one frame's queries over the same tokens, timed
interleaved: a pass over a float8 cache runs both, a pass over an ordinary cache only the latter.

    python -m cfpp_rt.bench.ops.kv_dequantize [--device cpu] [--json PATH]
"""

from typing import Any

import torch

from cfpp_rt.bench import harness
from cfpp_rt.ops.block_attention import block_attention
from cfpp_rt.ops.kv_dequantize import kv_dequantize_
from cfpp_rt.ops.token_ranges import TokenRanges

TOKENS, HEADS, HEAD_DIM = 1560, 12, 128


def measure_frames(frames: int, dtype: torch.dtype, device: torch.device) -> dict[str, harness.Times]:
    capacity = (frames + 1) * TOKENS  # one slot that is not visible
    torch.manual_seed(0)
    numbers = torch.randn(2, 1, HEADS, capacity, HEAD_DIM, device=device)
    keys, values = numbers.to(torch.float8_e4m3fn)
    wide = numbers.to(dtype)
    scales = torch.ones(2, 1, HEADS, device=device)
    q = torch.randn(1, HEADS, TOKENS, HEAD_DIM, device=device).to(dtype)
    ranges = TokenRanges.of([[(0, frames * TOKENS)]], capacity=capacity, batch=1, device=device)
    with torch.inference_mode():
        return harness.measure_interleaved(
            {
                "dequantize": lambda: kv_dequantize_(wide[0], wide[1], keys, values, scales[0], scales[1], ranges),
                "attention": lambda: block_attention(q, wide[0], wide[1], ranges),
            },
            device,
            rounds=20,
        )


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    backend, peak = harness.op_backend("kv_dequantize_", device)
    rows: list[dict[str, Any]] = []
    header = f"{'dtype':>9} {'frames':>7} {'ms':>8} {'p10':>8} {'p90':>8} {'GB/s':>7} {'% peak':>7}"
    print(f"{header} {'attention ms':>12} {'% of it':>7}")
    for dtype in (torch.bfloat16, torch.float32):
        if device.type == "cuda" and dtype == torch.float32:
            continue
        for frames in (1, 3, 6):
            times = measure_frames(frames, dtype, device)
            ours, attention = times["dequantize"], times["attention"]
            num_bytes = 2 * frames * TOKENS * HEADS * HEAD_DIM * (1 + dtype.itemsize)
            figures = harness.bandwidth_row(ours, num_bytes, peak)
            share = 100 * ours.median_ms / attention.median_ms
            name = harness.dtype_name(dtype)
            print(
                f"{name:>9} {frames:>7} {ours.median_ms:>8.3f} {ours.p10_ms:>8.3f} {ours.p90_ms:>8.3f} "
                f"{figures['gb_per_s']:>7.1f} {figures['percent_of_roof']:>7.0f} "
                f"{attention.median_ms:>12.2f} {share:>7.1f}",
                flush=True,
            )
            rows.append(
                {
                    "bench": "kv_dequantize",
                    "backend": backend,
                    "dtype": name,
                    "visible_frames": frames,
                    **figures,
                    "attention_ms": attention.median_ms,
                    "percent_of_attention": share,
                }
            )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
