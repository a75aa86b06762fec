"""Time block_attention against torch's SDPA (flash and cuDNN), FlashAttention and FlexAttention.

Shapes: the queries of one frame (1560 tokens at 480x832, 3600 at 720x1280), of a fused refresh (two frames as two
groups, each with its own window) and of a chunk of three frames, over 1 to 21 visible frames, with 12 heads of 128
(1.3B) and 40 (14B); and the shapes of a small world. Backends are timed interleaved; on a GPU with a cold L2, since in
the model a layer's keys come from memory. FLOPs: 4 * Sq * keys * H * D, padding not counted. The peak is one large
matrix product in the same run. A library that takes no token ranges is called once per group with contiguous keys: no
gather is timed.

    python -m cfpp_rt.bench.ops.block_attention [--device cpu] [--dtype bfloat16] [--json PATH] [--quick]
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import cfpp_rt.ops.block_attention  # noqa: F401  registers the op
from cfpp_rt.bench import harness
from cfpp_rt.device.peak import peak_matmul_flops
from cfpp_rt.ops.attention_libraries import LIBRARY_BACKENDS, attend_gathered, flash_module
from cfpp_rt.ops.attention_table import Problem, choose_attention, kernel_supports
from cfpp_rt.ops.token_ranges import TokenRanges

FRAME_480, FRAME_720 = 1560, 3600


@dataclasses.dataclass(frozen=True)
class Shape:
    name: str
    queries: int  # per group
    groups: int
    keys: int  # visible to the last group; one frame fewer is visible to the group before it
    heads: int = 12
    head_dim: int = 128

    def visible(self) -> list[int]:
        """Return the number of visible keys of each group, in order."""
        return [self.keys] if self.groups == 1 else [max(self.keys - self.queries, self.queries), self.keys]

    def ranges(self, device: torch.device) -> TokenRanges:
        return TokenRanges.of([[(0, n)] for n in self.visible()], capacity=self.keys, batch=1, device=device)

    def flops(self) -> int:
        return 4 * self.queries * sum(self.visible()) * self.heads * self.head_dim


def gpu_shapes() -> list[Shape]:
    frames = (1, 3, 6, 9, 12, 21)
    shapes = [Shape("frame", FRAME_480, 1, f * FRAME_480) for f in frames]
    shapes += [Shape("fused", FRAME_480, 2, f * FRAME_480) for f in frames]
    shapes += [Shape("chunk", 3 * FRAME_480, 1, f * FRAME_480) for f in frames if f >= 3]
    shapes += [Shape("frame 720p", FRAME_720, 1, f * FRAME_720) for f in (3, 9)]
    shapes += [Shape("frame 14B", FRAME_480, 1, f * FRAME_480, heads=40) for f in (3, 21)]
    return [*shapes, Shape("small", 64, 1, 512, heads=4, head_dim=64)]


def cpu_shapes(quick: bool) -> list[Shape]:
    shapes = [Shape("frame", FRAME_480, 1, f * FRAME_480) for f in ((1,) if quick else (1, 3, 6))]
    shapes += [] if quick else [Shape("fused", FRAME_480, 2, 3 * FRAME_480)]
    return [*shapes, *(Shape("small", 36, 1, keys, heads=4, head_dim=d) for keys in (108, 288) for d in (32, 48))]


def make_tensors(shape: Shape, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    tokens = (shape.queries * shape.groups, shape.keys, shape.keys)
    q, keys, values = (torch.randn(1, shape.heads, n, shape.head_dim, device=device).to(dtype) for n in tokens)
    return q, keys, values


def _sdpa_by(backend: SDPBackend) -> Callable[[Tensor, Tensor, Tensor, float], Tensor]:
    def call(q: Tensor, keys: Tensor, values: Tensor, scale: float) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, keys, values, scale=scale)

    return call


def backends(shape: Shape, dtype: torch.dtype, device: torch.device, flex: bool) -> dict[str, Callable[[], Tensor]]:
    q, keys, values = make_tensors(shape, dtype, device)
    ranges, scale = shape.ranges(device), shape.head_dim**-0.5
    dense: dict[str, Any] = {"sdpa": LIBRARY_BACKENDS["sdpa"]}
    if device.type == "cuda":
        dense = {"sdpa-flash": _sdpa_by(SDPBackend.FLASH_ATTENTION), "sdpa-cudnn": LIBRARY_BACKENDS["cudnn"]}
        if (flash := flash_module()) is not None:
            dense[f"flash-attn-{flash[0]}"] = LIBRARY_BACKENDS["flash"]
        if flex:
            from torch.nn.attention.flex_attention import flex_attention

            compiled = torch.compile(flex_attention, dynamic=False)
            dense["flex"] = lambda q, k, v, scale: compiled(q, k, v, scale=scale)
    calls: dict[str, Callable[[], Tensor]] = {
        name: lambda call=call: attend_gathered(call, q, keys, values, ranges, scale)  # type: ignore[misc]
        for name, call in dense.items()
    }
    problem = Problem(device.type, _capability(device), dtype, shape.head_dim, shape.queries, shape.keys)
    if kernel_supports(problem):
        calls["kernel"] = lambda: torch.ops.cfpp_rt.block_attention(q, keys, values, ranges.device, scale)
    return calls


def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)


def measure_shape(shape: Shape, dtype: torch.dtype, device: torch.device, peak: float) -> list[dict[str, Any]]:
    flex = device.type == "cuda" and shape.name == "frame" and shape.keys in (3 * FRAME_480, 21 * FRAME_480)
    calls = backends(shape, dtype, device, flex)
    with torch.inference_mode():
        times = harness.measure_interleaved(calls, device, rounds=30, cold_cache=device.type == "cuda")
    flops = shape.flops()
    best = min(t.median_ms for name, t in times.items() if name != "kernel")
    problem = Problem(device.type, _capability(device), dtype, shape.head_dim, shape.queries, shape.keys)
    return [
        {
            "bench": "block_attention",
            "shape": shape.name,
            "queries": shape.queries,
            "groups": shape.groups,
            "keys": shape.keys,
            "heads": shape.heads,
            "head_dim": shape.head_dim,
            "dtype": harness.dtype_name(dtype),
            "contender": name,
            "table": choose_attention(problem)[0],
            **t.row(),
            "tflops": flops / t.median_ms / 1e9,
            "roof_tflops": peak,
            "percent_of_roof": 100 * flops / t.median_ms / 1e9 / peak,
            "times_best_library": best / t.median_ms,
        }
        for name, t in times.items()
    ]


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--quick", action="store_true", help="on a CPU: measure the smallest shapes only")
    arguments = parser.parse_args()
    device, dtype = torch.device(arguments.device), getattr(torch, arguments.dtype)
    peak = peak_matmul_flops(device, dtype) / 1e12
    print(f"{arguments.dtype}; peak: one large matrix product reaches {peak:.3g} TFLOP/s, of which '% peak' is a share")
    header = f"{'shape':<11}{'Sq':>6}{'keys':>7}{'H':>4}{'D':>5}  {'backend':<14}{'ms':>9}{'p10':>9}{'p90':>9}"
    print(f"{header}{'TFLOP/s':>9}{'% peak':>8}{'x best library':>16}")
    rows = []
    for shape in gpu_shapes() if device.type == "cuda" else cpu_shapes(arguments.quick):
        for row in measure_shape(shape, dtype, device, peak):
            rows.append(row)
            print(
                f"{shape.name:<11}{shape.queries * shape.groups:>6}{shape.keys:>7}{shape.heads:>4}{shape.head_dim:>5}  "
                f"{row['contender']:<14}{row['ms']:>9.4f}{row['p10_ms']:>9.4f}{row['p90_ms']:>9.4f}"
                f"{row['tflops']:>9.3g}{row['percent_of_roof']:>8.0f}{row['times_best_library']:>16.2f}",
                flush=True,
            )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
