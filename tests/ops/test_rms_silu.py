"""rms_silu_ on every backend; a formula in float64 is the oracle, on the CPU the layers of diffusers give the bits."""

import dataclasses

import pytest
import torch
from torch import Tensor

from cfpp_rt.errors import InputError
from cfpp_rt.ops.rms_silu import rms_silu_
from cfpp_rt.reference.rms_silu import rms_silu_ as reference
from tests.ops.backends import BACKENDS, COMPILED, DTYPES, assert_as_good, bits, device_of

CHANNELS_LAST = torch.channels_last_3d


@dataclasses.dataclass(frozen=True)
class Case:
    channels: int = 96
    batch: int = 1
    frames: int = 1
    height: int = 3
    width: int = 5
    scale: float = 1.0

    def arguments(self, dtype: torch.dtype, device: str = "cpu", *, bias: bool = True) -> tuple[Tensor, ...]:
        """A buffer of NaN, which takes the result from its third frame on; x, gamma and bias."""
        generator = torch.Generator().manual_seed(7)
        shape = (self.batch, self.channels, self.frames, self.height, self.width)
        x = (self.scale * torch.randn(shape, generator=generator)).to(dtype)
        buffer = torch.full((*shape[:2], self.frames + 3, *shape[3:]), float("nan"), dtype=dtype)
        vectors = [torch.randn(self.channels, generator=generator).to(dtype) for _ in range(2)]
        tensors = [t.contiguous(memory_format=CHANNELS_LAST) for t in (buffer, x)] + vectors[: 1 + bias]
        return tuple(t.to(device) for t in tensors)


CASES = {
    "3 channels": Case(channels=3, height=30, width=7),
    "8 channels": Case(channels=8),
    "channels of the last level": Case(channels=96, frames=4),
    "channels of the first level": Case(channels=384),
    "more channels than a tile": Case(channels=2049, height=1, width=2),
    "pixels beyond a tile": Case(channels=32, height=7, width=11),
    "batch of 2": Case(batch=2, frames=2),
    "very small": Case(scale=1e-30),
    "very large": Case(scale=1e4),
}


def oracle(x: Tensor, gamma: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() if bias is None else x.double() + bias.double().view(-1, 1, 1, 1)
    norm = y.square().sum(1, keepdim=True).sqrt().clamp_min(1e-12)
    y = y / norm * x.shape[1] ** 0.5 * gamma.double().view(-1, 1, 1, 1)
    return y * torch.sigmoid(y)


def run(backend: str, buffer: Tensor, x: Tensor, *vectors: Tensor) -> Tensor:
    """Return the result, and assert that nothing else in the buffer has changed."""
    out = buffer[:, :, 2 : 2 + x.shape[2]]
    if backend == "interpreter":
        from cfpp_rt.ops.rms_silu_triton import rms_silu_ as kernel

        kernel(out, x, *vectors)
    else:
        rms_silu_(out, x, *vectors)
    assert bool(buffer[:, :, :2].isnan().all()) and bool(buffer[:, :, 2 + x.shape[2] :].isnan().all())
    return out


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_agrees_with_float64(case: Case, dtype: torch.dtype, backend: str):
    if dtype == torch.float16 and case.scale != 1:
        pytest.skip("not in the range of float16")
    for bias in (False, True):
        buffer, *given = case.arguments(dtype, device_of(backend), bias=bias)
        plain = torch.empty_like(given[0])
        reference(plain, *given)
        assert_as_good(run(backend, buffer, *given), plain, oracle(*given), backend, "out")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels_last", [False, True])
def test_the_bits_on_the_cpu_are_those_of_diffusers(dtype: torch.dtype, channels_last: bool):
    norms = pytest.importorskip("diffusers.models.autoencoders.autoencoder_kl_wan")
    _, x, gamma = Case(channels=24, batch=2, frames=3, height=9, width=7).arguments(dtype, bias=False)
    if not channels_last:
        x = x.contiguous()
    norm = norms.WanRMS_norm(24, images=False).requires_grad_(False)
    norm.gamma.copy_(gamma.view(-1, 1, 1, 1))
    out = torch.empty(2, 24, 3, 11, 9, dtype=dtype)[..., 1:-1, 1:-1]
    rms_silu_(out, x, gamma)
    assert torch.equal(bits(out.contiguous()), bits(torch.nn.functional.silu(norm.to(dtype)(x)).contiguous()))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_finite_values_stay_in_their_pixel(backend: str):
    buffer, x, gamma, bias = Case().arguments(torch.float32, device_of(backend))
    x[0, 3, 0, 1, 1], x[0, 5, 0, 2, 2] = float("nan"), float("inf")
    finite = run(backend, buffer, x, gamma, bias).isfinite().all(1)[0, 0]
    assert finite.logical_not().nonzero().tolist() == [[1, 1], [2, 2]]


@pytest.mark.parametrize("backend", COMPILED)
@pytest.mark.parametrize("with_bias", [False, True])
def test_opcheck(backend: str, with_bias: bool):
    buffer, *given = Case(channels=8).arguments(torch.float32, device_of(backend), bias=with_bias)
    given += [] if with_bias else [None]
    torch.library.opcheck(torch.ops.cfpp_rt.rms_silu_.default, (buffer[:, :, 2:3].clone(), *given))


BAD = {
    "x without frames": (1, lambda t: t[:, :, 0], r"x must be \[B, C, T, H, W\], got \[1, 96, 3, 5\]"),
    "x of integers": (1, lambda t: t.int(), "x must be torch.float32"),
    "out of another shape": (0, lambda t: t[:, 1:], r"out must be \[1, 96, 1, 3, 5\], got \[1, 95, 1, 3, 5\]"),
    "gamma of another width": (2, lambda t: t[1:], r"gamma must be \[96\], got \[95\]"),
    "bias of another dtype": (3, lambda t: t.half(), "bias must be torch.float32 like x, got torch.float16"),
    "x on another device": (1, lambda t: t.to("meta"), "out must be on meta like x, got cpu"),
}


@pytest.mark.parametrize(("index", "change", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_argument_is_named(index, change, message):
    arguments = list(Case().arguments(torch.float32))
    arguments[0] = arguments[0][:, :, 2:3]
    arguments[index] = change(arguments[index])
    with torch.no_grad(), pytest.raises(InputError, match=f"rms_silu_: {message}"):
        rms_silu_(*arguments)


@pytest.mark.gpu
def test_planes_are_refused_on_cuda():
    buffer, x, gamma, _ = Case().arguments(torch.float32, "cuda")
    with torch.no_grad(), pytest.raises(InputError, match="rms_silu_: x must be channels-last on CUDA"):
        rms_silu_(buffer[:, :, 2:3], x.contiguous(), gamma)


def test_has_no_gradient():
    buffer, x, gamma, bias = Case().arguments(torch.float32)
    with pytest.raises(InputError, match="rms_silu_: has no gradient"):
        rms_silu_(buffer[:, :, 2:3], x.requires_grad_(), gamma, bias)
