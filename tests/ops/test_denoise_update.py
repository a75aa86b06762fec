"""denoise_update on every backend; a formula in float64 is the oracle."""

import os

import pytest
import torch
from torch import Tensor

from cfpp_rt.core.schedule import add_noise
from cfpp_rt.errors import InputError
from cfpp_rt.ops.denoise_update import denoise_update
from cfpp_rt.reference.denoise_update import denoise_update as reference
from tests.ops.backends import BACKENDS, COMPILED, DTYPES, assert_as_good, bits, device_of, implementation

SHAPES = {
    "one value": (1, 1, 1),
    "1023 values": (1, 1, 1023),
    "1025 values": (1, 2, 1025),
    "frames of odd size": (2, 3, 4, 7, 9),
    "more than a span": (1, 2, 16, 16, 33),
    "a frame at 480x832": (1, 1, 16, 60, 104),
}


def make_arguments(
    shape: tuple[int, ...], dtype: torch.dtype, device: str = "cpu", levels_batch: int = 1, strided: bool = False
) -> list[Tensor]:
    """x, velocity [B, F, ...], sigma [B or 1, F], noise, next_sigma; strided: batch and frame swapped in memory."""
    generator = torch.Generator().manual_seed(9)
    x, velocity, noise = (torch.randn(shape, generator=generator) for _ in range(3))
    sigma, next_sigma = (torch.rand(levels_batch, 2 * shape[1], generator=generator)[:, ::2] for _ in range(2))
    tensors = [x, velocity.to(dtype), sigma, noise, next_sigma]
    if strided:
        tensors = [t.transpose(0, 1).contiguous().transpose(0, 1) if t.ndim > 2 else t for t in tensors]
    return [t.to(device) for t in tensors]


def oracle(x: Tensor, velocity: Tensor, sigma: Tensor, noise: Tensor, next_sigma: Tensor) -> tuple[Tensor, Tensor]:
    def per_frame(levels: Tensor) -> Tensor:
        return levels.double().expand(x.shape[:2]).reshape(*x.shape[:2], *(1,) * (x.ndim - 2))

    clean = x.double() - per_frame(sigma) * velocity.double()
    return clean, (1 - per_frame(next_sigma)) * clean + per_frame(next_sigma) * noise.double()


def assert_all_as_good(results, plain, wanted, backend: str) -> None:
    for name, *tensors in zip(("x0", "x_next"), results, plain, wanted, strict=True):
        assert_as_good(*tensors, backend, name)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "strided"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_agrees_with_float64(shape, strided: bool, dtype: torch.dtype, backend: str):
    if strided and backend == "interpreter":
        pytest.skip("the public function makes arguments contiguous before it calls the kernel")
    for levels_batch in {1, shape[0]}:
        arguments = make_arguments(shape, dtype, device_of(backend), levels_batch, strided)
        results = implementation("denoise_update", backend)(*arguments)
        for result in results:
            assert result.shape == shape and result.dtype == torch.float32 and result.is_contiguous()
        assert_all_as_good(results, reference(*arguments), oracle(*arguments), backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_after_the_last_step_there_is_no_noise(backend: str):
    x, velocity, sigma, noise, next_sigma = make_arguments((2, 3, 4, 7, 9), torch.bfloat16, device_of(backend))
    op = implementation("denoise_update", backend)
    clean, _ = op(x, velocity, sigma, None, None)
    assert torch.equal(clean, op(x, velocity, sigma, noise, next_sigma)[0])


def test_without_noise_the_next_input_is_the_clean_estimate():
    x, velocity, sigma, *_ = make_arguments((1, 2, 5), torch.float32)
    clean, next_input = denoise_update(x, velocity, sigma, None, None)
    assert next_input is clean
    assert torch.equal(clean, denoise_update(x, velocity, sigma, None, torch.full((1, 2), float("nan")))[0])


def test_equals_the_formulas_of_the_schedule():
    x, velocity, _, noise, _ = make_arguments((1, 2, 40), torch.bfloat16)
    levels = torch.tensor([0.9375, 0.25]).expand(2, 2)
    clean, next_input = denoise_update(x, velocity, levels[:1, :1].expand(1, 2), noise, levels[:1, 1:].expand(1, 2))
    wanted = x - 0.9375 * velocity.float()
    torch.testing.assert_close(clean, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(next_input, add_noise(wanted, noise, 0.25), rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", COMPILED)
def test_two_runs_are_bit_equal(backend: str):
    arguments = make_arguments((1, 3, 16, 60, 104), torch.bfloat16, device_of(backend))
    pairs = zip(denoise_update(*arguments), denoise_update(*arguments), strict=True)
    assert all(torch.equal(bits(a), bits(b)) for a, b in pairs)


def test_threads_do_not_change_a_bit():
    arguments, threads = make_arguments((1, 3, 16, 60, 104), torch.bfloat16), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(bits(denoise_update(*arguments)[1]))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_float64_runs_the_reference():
    arguments = [t.double() for t in make_arguments((2, 3, 5), torch.float32)]
    pairs = zip(denoise_update(*arguments), oracle(*arguments), strict=True)
    assert all(torch.allclose(a, b, rtol=0, atol=1e-15) for a, b in pairs)


BAD = {
    "x without frames": (0, lambda t: t[0], r"x must be \[B, F, \.\.\.\], got \[3, 5\]"),
    "x in half precision": (0, lambda t: t.half(), "x must be torch.float32, got torch.float16"),
    "velocity of another shape": (1, lambda t: t[:, 1:], r"velocity must be \[2, 3, 5\] like x, got \[2, 2, 5\]"),
    "velocity of integers": (1, lambda t: t.int(), "velocity must be torch.float32.*got torch.int32"),
    "one level for all": (2, lambda t: t[0], r"sigma must be \[B=2 or 1, F=3\], got \[3\]"),
    "levels of other frames": (2, lambda t: t[:, 1:], r"sigma must be \[B=2 or 1, F=3\], got \[1, 2\]"),
    "levels of another batch": (2, lambda t: t.expand(3, 3), r"sigma must be \[B=2 or 1, F=3\], got \[3, 3\]"),
    "levels in float64": (2, lambda t: t.double(), "sigma must be torch.float32, got torch.float64"),
    "noise of another shape": (3, lambda t: t[:1], r"noise must be \[2, 3, 5\] like x, got \[1, 3, 5\]"),
    "noise in half precision": (3, lambda t: t.half(), "noise must be torch.float32, got torch.float16"),
    "no next level": (4, lambda t: None, "next_sigma must be a tensor.*, got None"),
    "next levels of other frames": (4, lambda t: t[:, 1:], r"next_sigma must be \[B=2 or 1, F=3\], got \[1, 2\]"),
}


@pytest.mark.parametrize("checked_by", ["kernel", "python"])
@pytest.mark.parametrize(("index", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(index, change, message, checked_by):
    arguments = make_arguments((2, 3, 5), torch.float32)
    arguments[index] = change(arguments[index])
    if checked_by == "python":  # gradients are what takes the call past the kernel
        arguments = [t.requires_grad_() if t is not None and t.is_floating_point() else t for t in arguments]
    wanted = pytest.raises(InputError, match=f"denoise_update: {message}")
    with torch.set_grad_enabled(checked_by == "python"), wanted:
        denoise_update(*arguments)


@pytest.mark.parametrize("backend", COMPILED)
def test_bypassing_the_dispatcher_changes_nothing(backend: str):
    arguments = make_arguments((2, 3, 4, 7, 9), torch.bfloat16, device_of(backend))
    through_the_dispatcher = torch.ops.cfpp_rt.denoise_update(*arguments)
    with torch.no_grad():
        pairs = zip(denoise_update(*arguments), through_the_dispatcher, strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("backend", COMPILED)
def test_opcheck(backend: str):
    arguments = make_arguments((2, 3, 4, 7, 9), torch.bfloat16, device_of(backend))
    torch.library.opcheck(torch.ops.cfpp_rt.denoise_update.default, arguments)
    torch.library.opcheck(torch.ops.cfpp_rt.denoise_update.default, (*arguments[:3], None, None))


@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
def test_compiles_as_one_graph(compiler: str):
    arguments = make_arguments((2, 3, 4, 7, 9), torch.bfloat16)
    call = torch.compile(lambda *tensors: denoise_update(*tensors)[1] * 2, fullgraph=True, backend=compiler)
    assert torch.equal(call(*arguments), denoise_update(*arguments)[1] * 2)
    last = torch.compile(lambda *tensors: denoise_update(*tensors, None, None)[0] * 2, fullgraph=True, backend=compiler)
    assert torch.equal(last(*arguments[:3]), denoise_update(*arguments)[0] * 2)


def test_gradients_reach_latents_velocity_and_noise():
    arguments = [t.double() for t in make_arguments((2, 3, 5), torch.float32)]
    for index in (0, 1, 3):
        arguments[index].requires_grad_()
    assert torch.autograd.gradcheck(denoise_update, arguments)


@pytest.mark.skipif(os.environ.get("CFPP_BACKEND", "auto") != "auto", reason="a backend is forced")
def test_the_kernel_runs_and_not_the_reference(monkeypatch):
    """Otherwise every comparison above would compare the reference with itself."""
    monkeypatch.setattr("cfpp_rt.ops.denoise_update.reference", None)
    assert all(bool(t.isfinite().all()) for t in denoise_update(*make_arguments((1, 2, 5), torch.float32)))
