"""adaln_modulate on every backend; a formula in float64 is the oracle."""

import dataclasses
import os

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops.adaln_modulate import adaln_modulate
from cfpp_rt.reference.adaln_modulate import adaln_modulate as reference
from tests.ops.backends import BACKENDS, COMPILED, DTYPES, assert_as_good, bits, device_of, implementation

EPS = 1e-6


@dataclasses.dataclass(frozen=True)
class Case:
    dim: int = 192
    frames: int = 1
    tokens_per_frame: int = 3
    batch: int = 1
    rows_batch: int = 1
    mean: float = 0.0
    packed: bool = True  # x is one of three chunks of a buffer that is NaN elsewhere, frame rows too

    def tokens(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> Tensor:
        """[B, S, dim]"""
        shape = (self.batch, self.frames * self.tokens_per_frame, self.dim)
        values = torch.randn(shape, generator=generator) + self.mean
        return self.place(values.to(dtype), device)

    def rows(self, generator: torch.Generator, dtype: torch.dtype, device: str) -> Tensor:
        """[B or 1, F, dim]"""
        values = torch.randn(self.rows_batch, self.frames, self.dim, generator=generator)
        return self.place(values.to(dtype), device)

    def place(self, values: Tensor, device: str) -> Tensor:
        if not self.packed:  # batch and token axes swapped in memory
            return values.to(device).transpose(0, 1).contiguous().transpose(0, 1)
        buffer = torch.full((*values.shape[:2], 3 * self.dim), float("nan"), dtype=values.dtype)
        buffer[..., self.dim : 2 * self.dim] = values
        return buffer.to(device)[..., self.dim : 2 * self.dim]

    def arguments(self, dtype: torch.dtype, device: str = "cpu") -> list[Tensor]:
        generator = torch.Generator().manual_seed(7)
        return [self.tokens(generator, dtype, device), *(self.rows(generator, dtype, device) for _ in range(2))]


CASES = {
    "one channel": Case(dim=1),
    "7 channels": Case(dim=7),
    "127 channels": Case(dim=127),
    "128 channels": Case(dim=128),
    "129 channels": Case(dim=129),
    "64 tokens of the small world": Case(tokens_per_frame=64),
    "width of the 1.3B model": Case(dim=1536),
    "width of the 14B model": Case(dim=5120),
    "three frames": Case(frames=3, tokens_per_frame=5),
    "batch of 2": Case(frames=2, batch=2),
    "batch of 2, rows of its own": Case(frames=2, batch=2, rows_batch=2),
    "token stride is not the row": Case(frames=2, batch=2, rows_batch=2, packed=False),
    "mean far from zero": Case(mean=300.0),
}
LARGE = Case(dim=1536, tokens_per_frame=1560)


def oracle(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    x, shift, scale = x.double(), shift.double(), scale.double()
    normed = (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + EPS).sqrt()
    batch, tokens, dim = x.shape
    frames = normed.reshape(batch, shift.shape[1], -1, dim)
    return (frames * (1 + scale[:, :, None]) + shift[:, :, None]).reshape(batch, tokens, dim)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_float64(case: Case, dtype: torch.dtype, backend: str):
    arguments = case.arguments(dtype, device_of(backend))
    result = implementation("adaln_modulate", backend)(*arguments, EPS)
    assert result.shape == arguments[0].shape and result.dtype == dtype and result.is_contiguous()
    assert_as_good(result, reference(*arguments, EPS), oracle(*arguments), backend, "result")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_the_reference_is_no_worse_than_separate_layers(case: Case, dtype: torch.dtype):
    x, shift, scale = case.arguments(dtype)
    normed = torch.nn.functional.layer_norm(x, (case.dim,), eps=EPS).unflatten(1, (case.frames, -1))
    plain = (normed * (1 + scale[:, :, None]) + shift[:, :, None]).flatten(1, 2)
    assert_as_good(reference(x, shift, scale, EPS), plain, oracle(x, shift, scale), "reference", "result")


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_frame_of_480x832_is_right_and_two_runs_are_bit_equal(dtype: torch.dtype, backend: str):
    arguments = LARGE.arguments(dtype, device_of(backend))
    first, second = adaln_modulate(*arguments, EPS), adaln_modulate(*arguments, EPS)
    assert torch.equal(bits(first), bits(second))
    assert_as_good(first, reference(*arguments, EPS), oracle(*arguments), backend, "result")


def test_threads_do_not_change_a_bit():
    arguments, threads = LARGE.arguments(torch.bfloat16), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(bits(adaln_modulate(*arguments, EPS)))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_float64_runs_the_reference():
    arguments = Case(frames=2).arguments(torch.float64)
    assert torch.equal(adaln_modulate(*arguments, EPS), reference(*arguments, EPS))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_tokens_stay_in_their_row(backend: str):
    x, shift, scale = Case(tokens_per_frame=4, packed=False).arguments(torch.float32, device_of(backend))
    x[:, 1, 3], x[:, 2, 5] = float("nan"), float("inf")
    finite = implementation("adaln_modulate", backend)(x, shift, scale, EPS).isfinite().all(-1)
    assert finite.flatten().tolist() == [True, False, False, True]


BAD = {
    "x without a batch": (0, lambda t: t[0], r"x must be \[B, S, dim\], got \[12, 24\]"),
    "x with strided channels": (0, lambda t: t.mT.contiguous().mT, "x must be contiguous in its last"),
    "x of integers": (0, lambda t: t.int(), r"x must be torch.float32"),
    "shift of another width": (1, lambda t: t[..., 1:], r"shift must be \[B=2 or 1, F, dim=24\].*got \[1, 3, 23\]"),
    "frames do not divide": (1, lambda t: t.repeat(1, 2, 1)[:, :5], r"shift must be .*F a divisor of S=12, got"),
    "no frames": (1, lambda t: t[:, :0], r"shift must be .*F a divisor of S=12, got \[1, 0, 24\]"),
    "scale of another batch": (2, lambda t: t.expand(3, -1, -1), r"scale must be \[B=2 or 1, F, dim=24\] with F=3"),
    "scale of other frames": (2, lambda t: t[:, :1], r"scale must be .*with F=3, got \[1, 1, 24\]"),
    "scale of another dtype": (2, lambda t: t.half(), "scale must be torch.float32 like x, got torch.float16"),
    "scale with strided channels": (2, lambda t: t.mT.contiguous().mT, "scale must be contiguous in its last"),
}


@pytest.mark.parametrize("checked_by", ["kernel", "python"])
@pytest.mark.parametrize(("index", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(index, change, message, checked_by):
    arguments = Case(dim=24, frames=3, tokens_per_frame=4, batch=2, packed=False).arguments(torch.float32)
    arguments[index] = change(arguments[index])
    if checked_by == "python":  # gradients are what takes the call past the kernel
        arguments = [t.requires_grad_() if t.is_floating_point() else t for t in arguments]
    wanted = pytest.raises(InputError, match=f"adaln_modulate: {message}")
    with torch.set_grad_enabled(checked_by == "python"), wanted:
        adaln_modulate(*arguments, EPS)


@pytest.mark.parametrize("backend", COMPILED)
def test_bypassing_the_dispatcher_changes_nothing(backend: str):
    arguments = Case(frames=2, batch=2).arguments(torch.bfloat16, device_of(backend))
    through_the_dispatcher = torch.ops.cfpp_rt.adaln_modulate(*arguments, EPS)
    with torch.no_grad():
        assert torch.equal(adaln_modulate(*arguments, EPS), through_the_dispatcher)


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend: str):
    arguments = Case(frames=2, batch=2).arguments(torch.float32, device_of(backend))
    torch.library.opcheck(torch.ops.cfpp_rt.adaln_modulate.default, (*arguments, EPS))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_as_one_graph(compiler: str):
    arguments = Case(frames=2, batch=2).arguments(torch.float32)
    call = torch.compile(lambda *tensors: adaln_modulate(*tensors, EPS) * 2, fullgraph=True, backend=compiler)
    assert torch.equal(call(*arguments), adaln_modulate(*arguments, EPS) * 2)


def test_gradients_reach_every_argument():
    arguments = [t.clone().requires_grad_() for t in Case(dim=5, frames=2).arguments(torch.float64)]
    assert torch.autograd.gradcheck(lambda *tensors: adaln_modulate(*tensors, EPS), arguments)
    with torch.no_grad():
        without = adaln_modulate(*arguments, EPS)
    assert torch.equal(adaln_modulate(*arguments, EPS), without)


@pytest.mark.skipif(os.environ.get("CFPP_BACKEND", "auto") != "auto", reason="a backend is forced")
def test_the_kernel_runs_and_not_the_reference(monkeypatch):
    """Otherwise every comparison above would compare the reference with itself."""
    monkeypatch.setattr("cfpp_rt.ops.adaln_modulate.reference", None)
    assert bool(adaln_modulate(*Case().arguments(torch.float32), EPS).isfinite().all())
