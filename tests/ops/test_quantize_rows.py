"""quantize_rows, and the norms that quantise their output, against the reference; float64 bounds its error."""

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops import backends
from cfpp_rt.ops.adaln_modulate import adaln_modulate_quantized
from cfpp_rt.ops.gated_residual import gated_residual_quantized
from cfpp_rt.ops.quantize_rows import quantize_rows
from cfpp_rt.reference.adaln_modulate import adaln_modulate
from cfpp_rt.reference.gated_residual import gated_residual
from tests.ops.backends import DTYPES, INTERPRETER, device_of, implementation
from tests.ops.test_adaln_modulate import CASES, EPS, Case
from tests.ops.test_gated_residual import FORMS, make_arguments

Quantize = Callable[..., list[Tensor]]
COMPILED = [pytest.param("cuda", marks=pytest.mark.gpu), INTERPRETER]
BACKENDS = ["reference", *COMPILED]


def assert_quantized(codes: Tensor, scales: Tensor, exact: Tensor, error: float = 0.0) -> None:
    """Assert that codes and scales are those of the float64 rows `exact`, up to `error` before rounding.

    A code has 4 significant bits, so it is off by 2^-4 of itself at most; below 2^-6 steps are 2^-9, of which rounding
    loses half.
    """
    largest = exact.abs().amax(-1, keepdim=True)
    assert codes.dtype == torch.float8_e4m3fn and codes.shape == exact.shape and codes.is_contiguous()
    assert scales.dtype == torch.float32 and scales.shape == largest.shape
    slack = error + 1e-6 * largest
    assert ((448 * scales.double() - largest).abs() <= slack).all()
    lost = (codes.double() * scales.double() - exact).abs()
    assert (lost <= 2.0**-4 * exact.abs() + 2.0**-10 * scales.double() + slack).all()


@pytest.fixture
def quantizing(monkeypatch) -> Callable[[str, str, str], Quantize]:
    """A function of an op on a backend; it returns a flat list, of which the last two are codes and scales.

    Triton's interpreter loses the carry where rounding to float8 reaches the next power of two, which the GPU's
    instruction does not: there the kernels leave codes in float32, and torch rounds them.
    """

    def wide_codes(x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.empty(x.shape), torch.empty(*x.shape[:2], 1)

    def of(op: str, backend: str, function: str) -> Quantize:
        call = implementation(op, backend, function)
        if backend == "interpreter":
            monkeypatch.setattr(f"cfpp_rt.ops.{op}_triton.empty_codes", wide_codes)

        def run(*arguments: Any) -> list[Tensor]:
            *rest, last = call(*arguments)
            results = [*rest, *last] if isinstance(last, tuple) else [*rest, last]
            results[-2] = results[-2].to(torch.float8_e4m3fn)
            return results

        return run

    return of


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("gelu", [False, True])
def test_codes_are_the_rows_to_four_bits(quantizing, case: Case, dtype: torch.dtype, backend: str, gelu: bool):
    x = case.arguments(dtype, device_of(backend))[0]
    exact = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    assert_quantized(*quantizing("quantize_rows", backend, "quantize_rows")(x, gelu), exact)


FUSED = ["cpu", *COMPILED]  # on the CPU the public function runs the reference


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("name", ["7 channels", "129 channels", "three frames", "batch of 2, rows of its own"])
def test_the_norm_is_quantised_without_rounding_in_between(quantizing, name: str, backend: str):
    arguments = CASES[name].arguments(torch.bfloat16, device_of(backend))
    codes = quantizing("adaln_modulate", backend, "adaln_modulate_quantized")(*arguments, EPS)
    assert_quantized(*codes, adaln_modulate(*(t.double() for t in arguments), EPS), error=1e-5)


@pytest.mark.parametrize("backend", FUSED)
@pytest.mark.parametrize("form", FORMS)
def test_the_sum_is_returned_and_its_norm_quantised(quantizing, form: str, backend: str):
    arguments = make_arguments(CASES["batch of 2, rows of its own"], form, torch.bfloat16, device_of(backend))
    total, *codes = quantizing("gated_residual", backend, "gated_residual_quantized")(*arguments, EPS)
    assert torch.equal(total, implementation("gated_residual", backend)(*arguments, EPS)[0])
    wide = [None if t is None else t.double() for t in arguments]
    assert_quantized(*codes, gated_residual(*wide, EPS)[1], error=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_of_zeros_and_non_finite_rows(quantizing, backend: str):
    x = torch.randn(1, 4, 40, generator=torch.Generator().manual_seed(0), device="cpu").to(device_of(backend))
    x[0, 0], x[0, 1, 3], x[0, 2, 5] = 0.0, float("nan"), float("-inf")
    codes, scales = quantizing("quantize_rows", backend, "quantize_rows")(x)
    values = codes.float() * scales
    assert (values[0, 0] == 0).all() and bool(values[0, 3].isfinite().all())
    assert bool(values[0, 1, 3].isnan()) and bool(values[0, 2, 5].isnan())


@pytest.mark.parametrize("backend", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_opcheck(backend: str):
    x, shift, scale = CASES["batch of 2"].arguments(torch.float32, backend)
    ops = torch.ops.cfpp_rt
    torch.library.opcheck(ops.quantize_rows.default, (x, True))
    torch.library.opcheck(ops.adaln_modulate_quantized.default, (x, shift, scale, EPS))
    torch.library.opcheck(ops.gated_residual_quantized.default, (x, x, shift, shift, scale, EPS))


def test_bypassing_the_dispatcher_changes_nothing():
    x, shift, scale = CASES["batch of 2"].arguments(torch.bfloat16)

    def results() -> list[Tensor]:
        total, codes = gated_residual_quantized(x, x, None, shift, scale, EPS)
        return [*quantize_rows(x), *adaln_modulate_quantized(x, shift, scale, EPS), total, *codes]

    through_the_dispatcher = results()
    with torch.no_grad():
        for one, other in zip(results(), through_the_dispatcher, strict=True):
            assert torch.equal(one.view(torch.uint8), other.view(torch.uint8))


def test_a_bad_argument_is_named():
    with pytest.raises(InputError, match=r"quantize_rows: x must be \[B, S, dim\], got \[12, 24\]"):
        quantize_rows(torch.randn(12, 24))
    with pytest.raises(InputError, match="quantize_rows: x must be contiguous in its last"):
        quantize_rows(torch.randn(2, 24, 12).mT)


@pytest.mark.skipif(os.environ.get("CFPP_BACKEND", "auto") != "auto", reason="a backend is forced")
def test_backends_reports_the_reference_on_the_cpu():
    assert backends()["quantize_rows"]["cpu"][0] == "reference"
