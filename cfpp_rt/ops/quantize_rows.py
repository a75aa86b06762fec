"""quantize_rows: tokens to float8, each with a scale of its own, for a product of two float8 matrices."""

from torch import Tensor

from cfpp_rt.ops._library import plain, register
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.ops.adaln_modulate import check_tokens
from cfpp_rt.reference.quantize_rows import empty_codes
from cfpp_rt.reference.quantize_rows import quantize_rows as reference


def quantize_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Codes float8_e4m3fn [B, S, dim], contiguous, and scales float32 [B, S, 1]: x is about codes * scales.

    A token's scale is its largest absolute value / 448, so that nothing saturates; codes are rounded to nearest, ties
    to even, from float32. Where x is NaN or infinite the code is NaN. gelu: quantise GELU(x), tanh form, instead of x.

    x: [B, S, dim], last dimension contiguous, other strides free; float32, bfloat16 or float16 (float64 is rounded to
    float32 first). On CUDA a GPU of
    capability 8.9 at least runs the Triton kernel; there is no compiled CPU kernel: the reference serves it.
    Raises InputError naming the argument, what was wanted and what came. Has no gradient.
    """
    return _run(x, gelu) if plain((x,)) else _op(x, gelu)


def _run(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    check_tokens("quantize_rows", x)
    module = triton_kernels("quantize_rows") if x.is_cuda else None
    return reference(x, gelu) if module is None else module.quantize_rows(x, gelu)


def _fake(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    check_tokens("quantize_rows", x)
    return empty_codes(x)


_op = register("quantize_rows(Tensor x, bool gelu) -> (Tensor, Tensor)", _run, _fake)
