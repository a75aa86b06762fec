"""quantize_rows: float8 codes of tokens with one scale per token, for a product of two float8 matrices."""

from torch import Tensor

from cfpp_rt.ops._checks import require_tokens
from cfpp_rt.ops._library import can_bypass_dispatcher, register
from cfpp_rt.ops._triton import triton_kernels
from cfpp_rt.reference.quantize_rows import empty_codes
from cfpp_rt.reference.quantize_rows import quantize_rows as reference


def quantize_rows(x: Tensor, gelu: bool = False) -> tuple[Tensor, Tensor]:
    """Return codes and scales of x, so that x is about codes * scales.

    The scale of a token is its largest absolute value / 448, so that nothing saturates. Codes are rounded from float32
    to nearest, ties to even. Where x is NaN or infinite the code is NaN.

    x: [B, S, dim], last dimension contiguous, other strides free; float32, bfloat16 or float16 (float64 is rounded to
        float32 first).
    gelu: quantise GELU(x), tanh form, instead of x.

    Returns codes float8_e4m3fn [B, S, dim], contiguous, and scales float32 [B, S, 1].
    The Triton kernel needs a GPU of capability 8.9 or higher. There is no compiled CPU kernel: the reference runs.
    Raises InputError naming the argument, what was wanted and what came. Has no gradient.
    """
    return _run(x, gelu) if can_bypass_dispatcher((x,)) else _op(x, gelu)


def _run(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    require_tokens("quantize_rows", x)
    module = triton_kernels("quantize_rows") if x.is_cuda else None
    return reference(x, gelu) if module is None else module.quantize_rows(x, gelu)


def _fake(x: Tensor, gelu: bool) -> tuple[Tensor, Tensor]:
    require_tokens("quantize_rows", x)
    return empty_codes(x)


_op = register("quantize_rows(Tensor x, bool gelu) -> (Tensor, Tensor)", _run, _fake)
