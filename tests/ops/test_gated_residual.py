"""gated_residual on every backend; a formula in float64 is the oracle."""

import os

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops.gated_residual import gated_residual
from cfpp_rt.reference.gated_residual import gated_residual as reference
from tests.ops.backends import BACKENDS, COMPILED, DTYPES, assert_as_good, bits, device_of, implementation
from tests.ops.test_adaln_modulate import CASES, EPS, LARGE, Case

FORMS = ["gate, modulated", "gate, affine", "no gate, modulated", "no gate, affine"]


def make_arguments(case: Case, form: str, dtype: torch.dtype, device: str = "cpu") -> list[Tensor | None]:
    """x, y, gate, shift, scale"""
    generator = torch.Generator().manual_seed(8)
    x, y = (case.tokens(generator, dtype, device) for _ in range(2))
    gate, shift, scale = (case.rows(generator, dtype, device) for _ in range(3))
    if form.endswith("affine"):
        shift, scale = shift[0, 0], scale[0, 0]
    return [x, y, gate if form.startswith("gate") else None, shift, scale]


def oracle(x: Tensor, y: Tensor, gate: Tensor | None, shift: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    batch, tokens, dim = x.shape

    def per_frame(rows: Tensor) -> Tensor:
        rows = rows.double()[None, None] if rows.ndim == 1 else rows.double()
        grid = (rows.shape[0], rows.shape[1], tokens // rows.shape[1], dim)
        return rows[:, :, None].expand(grid).reshape(rows.shape[0], tokens, dim)

    total = x.double() + (1 if gate is None else per_frame(gate)) * y.double()
    normed = (total - total.mean(-1, keepdim=True)) / (total.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    return total, normed * (per_frame(scale) + (scale.ndim > 1)) + per_frame(shift)


def assert_all_as_good(results, plain, wanted, backend: str) -> None:
    for name, *tensors in zip(("sum", "normed"), results, plain, wanted, strict=True):
        assert_as_good(*tensors, backend, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_float64(case: Case, dtype: torch.dtype, form: str, backend: str):
    arguments = make_arguments(case, form, dtype, device_of(backend))
    results = implementation("gated_residual", backend)(*arguments, EPS)
    for result in results:
        assert result.shape == arguments[0].shape and result.dtype == dtype and result.is_contiguous()
    assert_all_as_good(results, reference(*arguments, EPS), oracle(*arguments), backend)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_no_worse_than_separate_layers(dtype: torch.dtype, form: str):
    case = Case(frames=2, batch=2)
    x, y, gate, shift, scale = make_arguments(case, form, dtype)
    plain = x + y if gate is None else x + (gate[:, :, None] * y.unflatten(1, (case.frames, -1))).flatten(1, 2)
    normed = torch.nn.functional.layer_norm(plain, (case.dim,), eps=EPS)
    if scale.ndim == 1:
        normed = normed * scale + shift
    else:
        normed = (normed.unflatten(1, (case.frames, -1)) * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)
    arguments = (x, y, gate, shift, scale)
    assert_all_as_good(reference(*arguments, EPS), (plain, normed), oracle(*arguments), "reference")


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_of_480x832_is_right_and_two_runs_are_bit_equal(dtype: torch.dtype, backend: str):
    arguments = make_arguments(LARGE, FORMS[0], dtype, device_of(backend))
    first, second = gated_residual(*arguments, EPS), gated_residual(*arguments, EPS)
    assert all(torch.equal(bits(a), bits(b)) for a, b in zip(first, second, strict=True))
    assert_all_as_good(first, reference(*arguments, EPS), oracle(*arguments), backend)


@pytest.mark.parametrize("backend", COMPILED)
def test_the_norm_is_of_the_unrounded_sum(backend: str):
    """y is far below the last bit of x: the rounded sum does not contain it, and the norm consists of it."""
    device = device_of(backend)
    x = torch.full((1, 1, 64), 256.0, dtype=torch.bfloat16, device=device)
    y = torch.linspace(-0.25, 0.25, 64, device=device).to(torch.bfloat16).expand(1, 1, -1)
    zeros = torch.zeros(1, 1, 64, dtype=torch.bfloat16, device=device)
    total, normed = gated_residual(x, y, None, zeros, zeros, EPS)
    assert torch.equal(total, x)
    assert torch.allclose(normed.float(), y.float() / y.float().std(correction=0), atol=0.02)


def test_arguments_are_not_modified():
    arguments = make_arguments(Case(packed=False), FORMS[0], torch.float32)
    before = [t.clone() for t in arguments]
    results = gated_residual(*arguments, EPS)
    assert all(torch.equal(a, b) for a, b in zip(arguments, before, strict=True))
    assert not {t.data_ptr() for t in results} & {t.data_ptr() for t in arguments}


def test_float64_runs_the_reference():
    arguments = make_arguments(Case(frames=2), FORMS[0], torch.float64)
    pairs = zip(gated_residual(*arguments, EPS), reference(*arguments, EPS), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


BAD = {
    "x without a batch": (FORMS[0], 0, lambda t: t[0], r"x must be \[B, S, dim\], got \[12, 24\]"),
    "y of another length": (FORMS[0], 1, lambda t: t[:, 1:], r"y must be .*got \[2, 11, 24\]"),
    "y of another dtype": (FORMS[0], 1, lambda t: t.half(), "y must be torch.float32 like x, got torch.float16"),
    "y with strided channels": (FORMS[0], 1, lambda t: t.mT.contiguous().mT, "y must be contiguous in its last"),
    "gate of another width": (FORMS[0], 2, lambda t: t[..., 1:], r"gate must be \[B=2 or 1, F, dim=24\]"),
    "gate of other frames": (FORMS[0], 2, lambda t: t[:, :1], r"shift must be .*with F=1, got \[1, 3, 24\]"),
    "frames do not divide": (FORMS[2], 3, lambda t: t.repeat(1, 2, 1)[:, :5], "shift must be .*F a divisor of S=12"),
    "scale of other frames": (FORMS[2], 4, lambda t: t[:, :1], r"scale must be .*with F=3, got \[1, 1, 24\]"),
    "bias of another width": (FORMS[1], 3, lambda t: t[1:], r"shift must be \[dim=24\], got \[23\]"),
    "bias without weight": (FORMS[1], 4, lambda t: t[None, None], r"scale must be \[dim=24\], got \[1, 1, 24\]"),
}


@pytest.mark.parametrize("checked_by", ["kernel", "python"])
@pytest.mark.parametrize(("form", "index", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(form, index, change, message, checked_by):
    case = Case(dim=24, frames=3, tokens_per_frame=4, batch=2, packed=False)
    arguments = make_arguments(case, form, torch.float32)
    arguments[index] = change(arguments[index])
    if checked_by == "python":  # gradients are what takes the call past the kernel
        arguments = [None if t is None else t.requires_grad_() for t in arguments]
    wanted = pytest.raises(InputError, match=f"gated_residual: {message}")
    with torch.set_grad_enabled(checked_by == "python"), wanted:
        gated_residual(*arguments, EPS)


@pytest.mark.parametrize("backend", COMPILED)
def test_bypassing_the_dispatcher_changes_nothing(backend: str):
    arguments = make_arguments(Case(frames=2, batch=2), FORMS[0], torch.bfloat16, device_of(backend))
    through_the_dispatcher = torch.ops.cfpp_rt.gated_residual(*arguments, EPS)
    with torch.no_grad():
        pairs = zip(gated_residual(*arguments, EPS), through_the_dispatcher, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend: str, form: str):
    arguments = make_arguments(Case(frames=2, batch=2), form, torch.float32, device_of(backend))
    torch.library.opcheck(torch.ops.cfpp_rt.gated_residual.default, (*arguments, EPS))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]])
def test_compiles_as_one_graph(form: str, compiler: str):
    arguments = make_arguments(Case(frames=2, batch=2), form, torch.float32)
    call = torch.compile(lambda *tensors: gated_residual(*tensors, EPS)[1] * 2, fullgraph=True, backend=compiler)
    assert torch.equal(call(*arguments), gated_residual(*arguments, EPS)[1] * 2)


@pytest.mark.parametrize("form", FORMS)
def test_gradients_reach_every_argument(form: str):
    arguments = make_arguments(Case(dim=5, frames=2), form, torch.float64)
    arguments = [None if t is None else t.clone().requires_grad_() for t in arguments]
    assert torch.autograd.gradcheck(lambda *tensors: gated_residual(*tensors, EPS), arguments)


@pytest.mark.skipif(os.environ.get("CFPP_BACKEND", "auto") != "auto", reason="a backend is forced")
def test_the_kernel_runs_and_not_the_reference(monkeypatch):
    """Without it every comparison above would compare the reference with itself."""
    monkeypatch.setattr("cfpp_rt.ops.gated_residual.reference", None)
    results = gated_residual(*make_arguments(Case(), FORMS[0], torch.float32), EPS)
    assert all(bool(result.isfinite().all()) for result in results)
