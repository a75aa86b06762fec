"""Time the pointwise ops: share of the peak bandwidth, and speed-up over separate PyTorch layers.

Shapes of 1, 2 and 3 latent frames at 480x832 (1560 tokens each) at the width of the 1.3B and of the 14B model, and of
the small world (64 tokens, 192 channels). rms_silu_ is the VAE's, at the sizes that one latent frame has in the last
three levels of the decoder (on CUDA only: the CPU runs plain PyTorch). Bytes: every tensor of tokens, latents or pixels
read or written once; modulation rows are not counted. The peak is a copy of a large buffer in the same run.

Plain PyTorch is what the model would run without the op: layer_norm and addcmul, or the schedule's two formulas. The
ops that write float8 are timed on a GPU only, against the formula of their reference, after the ordinary norm if there
is one. Both are timed interleaved from a cold cache: before every call a buffer larger than the last-level cache is
overwritten.

    python -m cfpp_rt.bench.ops.pointwise [--device cpu] [--json PATH]
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.bench import harness
from cfpp_rt.core.schedule import add_noise
from cfpp_rt.ops.adaln_modulate import adaln_modulate, adaln_modulate_quantized
from cfpp_rt.ops.denoise_update import denoise_update
from cfpp_rt.ops.gated_residual import gated_residual
from cfpp_rt.ops.quantize_rows import quantize_rows
from cfpp_rt.ops.rms_silu import rms_silu_
from cfpp_rt.reference.quantize_rows import quantize_rows as plain_quantize
from cfpp_rt.reference.rms_silu import rms_silu_ as plain_rms_silu_

EPS = 1e-6
FFN = {192: 768, 1536: 8960, 5120: 13824}  # width of the model: width of its feed-forward
SHAPES = ((64, 1, 192), (1560, 1, 1536), (3120, 2, 1536), (4680, 3, 1536), (1560, 1, 5120))  # tokens, frames, channels
PIXELS = ((1, 384, 2, 120, 208), (1, 192, 4, 240, 416), (1, 96, 4, 480, 832))  # [B, C, T, H, W]
LATENTS = ((1, 1, 16, 16, 16), (1, 1, 16, 60, 104), (1, 3, 16, 60, 104))


@dataclasses.dataclass(frozen=True)
class Case:
    op: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    num_bytes: int
    ours: Callable[[], object]
    plain: Callable[[], object]


def plain_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    frames = F.layer_norm(x, x.shape[-1:], eps=EPS).unflatten(1, (shift.shape[1], -1))
    return torch.addcmul(shift[:, :, None], frames, 1 + scale[:, :, None]).flatten(1, 2)


def plain_residual(x: Tensor, y: Tensor, gate: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    x, y = (tokens.unflatten(1, (gate.shape[1], -1)) for tokens in (x, y))
    total = torch.addcmul(x, y, gate[:, :, None]).flatten(1, 2)
    return total, plain_modulate(total, shift, scale)


def plain_modulate_quantized(x: Tensor, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    return plain_quantize(plain_modulate(x, shift, scale))


def plain_update(x: Tensor, velocity: Tensor, noise: Tensor) -> Tensor:
    return add_noise(x - 0.9375 * velocity.float(), noise, 0.8333)


def token_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for tokens, frames, dim in SHAPES:
        x, y = (torch.randn(1, tokens, dim, device=device).to(dtype) for _ in range(2))
        gate, shift, scale = torch.randn(1, frames, 3, dim, device=device).to(dtype).unbind(2)
        size = tokens * dim * dtype.itemsize
        yield Case(
            "adaln_modulate",
            (tokens, dim),
            dtype,
            2 * size,
            partial(adaln_modulate, x, shift, scale, EPS),
            partial(plain_modulate, x, shift, scale),
        )
        yield Case(
            "gated_residual",
            (tokens, dim),
            dtype,
            4 * size,
            partial(gated_residual, x, y, gate, shift, scale, EPS),
            partial(plain_residual, x, y, gate, shift, scale),
        )


def float8_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for tokens, frames, dim in SHAPES:
        x = torch.randn(1, tokens, dim, device=device).to(dtype)
        shift, scale = torch.randn(1, frames, 2, dim, device=device).to(dtype).unbind(2)
        hidden = torch.randn(1, tokens, FFN[dim], device=device).to(dtype)
        yield Case(
            "adaln_modulate_quantized",
            (tokens, dim),
            dtype,
            x.numel() * (dtype.itemsize + 1),
            partial(adaln_modulate_quantized, x, shift, scale, EPS),
            partial(plain_modulate_quantized, x, shift, scale),
        )
        for name, rows, gelu in (("quantize_rows", x, False), ("quantize_rows of GELU", hidden, True)):
            yield Case(
                name,
                tuple(rows.shape[1:]),
                dtype,
                rows.numel() * (dtype.itemsize + 1),
                partial(quantize_rows, rows, gelu),
                partial(plain_quantize, rows, gelu),
            )


def latent_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    for shape in LATENTS:
        x, noise = (torch.randn(shape, device=device) for _ in range(2))
        velocity = torch.randn(shape, device=device).to(dtype)
        sigma, next_sigma = (torch.full((1, shape[1]), level, device=device) for level in (0.9375, 0.8333))
        yield Case(
            "denoise_update",
            shape,
            dtype,
            x.numel() * (4 * x.itemsize + dtype.itemsize),
            partial(denoise_update, x, velocity, sigma, noise, next_sigma),
            partial(plain_update, x, velocity, noise),
        )


def pixel_cases(dtype: torch.dtype, device: torch.device) -> Iterator[Case]:
    if device.type != "cuda":
        return
    for shape in PIXELS:
        x = torch.randn(shape, device=device).to(dtype).contiguous(memory_format=torch.channels_last_3d)
        gamma, bias = torch.randn(2, shape[1], device=device).to(dtype)
        out, plain_out = torch.empty_like(x), torch.empty_like(x)
        yield Case(
            "rms_silu_",
            shape,
            dtype,
            2 * x.nbytes,
            partial(rms_silu_, out, x, gamma, bias),
            partial(plain_rms_silu_, plain_out, x, gamma, bias),
        )


def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    backend, peak = harness.op_backend("adaln_modulate", device)
    print(
        f"{'op':>24} {'shape':>12} {'dtype':>8} {'us':>8} {'p10':>8} {'p90':>8} {'GB/s':>7} {'% peak':>6} {'plain':>8}"
    )
    rows: list[dict[str, Any]] = []
    for dtype in (torch.bfloat16, torch.float32):
        float8 = float8_cases(dtype, device) if device.type == "cuda" else ()
        others = latent_cases(dtype, device), pixel_cases(dtype, device)
        for case in chain(token_cases(dtype, device), float8, *others):
            with torch.inference_mode():
                times = harness.measure_interleaved({"ours": case.ours, "plain": case.plain}, device, cold_cache=True)
            ours, plain = times["ours"], times["plain"]
            figures = harness.bandwidth_row(ours, case.num_bytes, peak)
            name, shape = harness.dtype_name(dtype), "x".join(map(str, case.shape[-4:]))
            print(
                f"{case.op:>24} {shape:>12} {name:>8} {1000 * ours.median_ms:>8.1f} {1000 * ours.p10_ms:>8.1f} "
                f"{1000 * ours.p90_ms:>8.1f} {figures['gb_per_s']:>7.1f} {figures['percent_of_roof']:>6.0f} "
                f"{1000 * plain.median_ms:>8.1f}"
            )
            rows.append(
                {
                    "bench": "pointwise",
                    "op": case.op,
                    "backend": backend,
                    "dtype": name,
                    "shape": list(case.shape),
                    **figures,
                    "plain_ms": plain.median_ms,
                    "speed_up": plain.median_ms / ours.median_ms,
                }
            )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
