"""Products in 8 bits: distance from the published latents, exactness of codes and scales, and refusals."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cfpp_rt.errors import InputError
from cfpp_rt.model.weights import build_model
from cfpp_rt.runtime.cuda_graphs import CudaGraphCache
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed import fuse_gelu, quantize_linears
from cfpp_rt.speed.float8 import Float8Linear
from cfpp_rt.speed.int8 import Int8Linear, quantize
from tests.closeness import assert_close_max
from tests.test_rollout import ROLLOUTS, run, settings_of
from tests.test_rollout_float8 import rms

needs_vnni = pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the CPU has no VNNI")
KINDS = [
    pytest.param("float8_e4m3", 0.015, 0.035, id="float8"),  # measured 2.0 to 2.7 % rms
    pytest.param("int8", 0.003, 0.009, id="int8", marks=needs_vnni),  # measured 0.56 to 0.65 %
]


def quantized(model, dtype: str):
    return quantize_linears(copy.deepcopy(model), dtype, emulated=dtype == "float8_e4m3")


def linear(inputs: int, outputs: int, dtype: torch.dtype) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(inputs, outputs).to(dtype).requires_grad_(False)


@pytest.mark.parametrize("dtype,least,most", KINDS)
def test_latents_stay_near_the_published_ones(model, vectors, meta, dtype, least, most):
    """Not too close either, or the option would have no effect."""
    changed = quantized(model, dtype)
    for name in ROLLOUTS:
        wanted = vectors[f"{name}.latents"]
        latents = run(changed, settings_of(meta[name], meta["shift"], "fused"), vectors, name)
        assert least < rms(latents - wanted) / rms(wanted) < most, name


@pytest.mark.parametrize("dtype", ["float8_e4m3", pytest.param("int8", marks=needs_vnni)])
def test_fused_refresh_is_close_to_separate_refresh(model, vectors, meta, dtype):
    """A token's codes do not depend on its neighbours, but sums in another order move single codes, and later frames
    attend to what comes of it: measured 1.2 % in float8, half of what the codes cost.
    """
    changed, name = quantized(model, dtype), "framewise_2step_window"
    fused, separate = (
        run(changed, settings_of(meta[name], meta["shift"], refresh), vectors, name)
        for refresh in ("fused", "separate")
    )
    assert rms(fused - separate) / rms(fused) < (0.02 if dtype == "float8_e4m3" else 5e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("gelu", [False, True])
def test_float8_product_equals_the_product_of_its_codes(dtype, gelu):
    """Against float64, with codes and scales of the layer and an input quantised by hand."""
    layer = linear(40, 24, dtype)
    ours = Float8Linear(layer, gelu=gelu, emulated=True)
    x = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    weight = ours.weight.double() * ours.weight_scale.double().mT
    assert ((weight - layer.weight.double()).abs() <= 2.0**-4 * layer.weight.double().abs() + 1e-4).all()
    rows = F.gelu(x.double(), approximate="tanh") if gelu else x.double()
    scales = rows.abs().amax(-1, keepdim=True) / 448
    exact = ((rows / scales).float().to(torch.float8_e4m3fn).double() * scales) @ weight.mT + layer.bias.double()
    assert_close_max(ours(x), exact, 2e-6 if dtype == torch.float32 else 8e-3)


@needs_vnni
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_product_equals_the_product_of_its_codes(dtype):
    layer = linear(40, 24, dtype)
    ours = Int8Linear(layer)
    x = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(1)).to(dtype)
    codes, scales = quantize(x.flatten(0, 1))
    rows = (codes.double() - 128) * scales.double()
    weight = (layer.weight.float() / ours.weight_scale[:, None]).round().double() * ours.weight_scale.double()[:, None]
    exact = (rows @ weight.mT + layer.bias.double()).unflatten(0, (2, 9))
    assert_close_max(ours(x), exact, 2e-6 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_codes_are_the_rows_to_eight_bits(dtype):
    """Rows of every magnitude, also where rounding makes the scale too small: no code leaves -127..127."""
    generator = torch.Generator().manual_seed(0)
    rows = (torch.randn(700, 400, generator=generator) * 10.0 ** torch.linspace(-20, 20, 700)[:, None]).to(dtype)
    before = rows.clone()
    codes, scales = quantize(rows)
    assert torch.equal(rows, before)
    assert int(codes.min()) >= 1 and int(codes.max()) == 255
    lost = ((codes.double() - 128) * scales.double() - rows.double()).abs()
    assert (lost <= 0.5001 * scales.double()).all()
    assert (scales.double() <= 1.01 / 126.5 * rows.double().abs().amax(-1, keepdim=True)).all()


@needs_vnni
def test_int8_keeps_zeros_and_nan():
    layer = Int8Linear(linear(40, 24, torch.float32))
    x = torch.randn(1, 3, 40)
    x[0, 0], x[0, 1, 5] = 0.0, float("nan")
    y = layer(x)
    assert torch.equal(y[0, 0], layer.bias) and bool(y[0, 1].isnan().all()) and bool(y[0, 2].isfinite().all())


@pytest.mark.parametrize("dtype", ["float8_e4m3", pytest.param("int8", marks=needs_vnni)])
def test_a_model_with_fused_gelu_gives_the_same(model, vectors, meta, dtype):
    name = "framewise_1step"
    settings = settings_of(meta[name], meta["shift"], "fused")
    plain = run(quantized(model, dtype), settings, vectors, name)
    fused = run(quantized(fuse_gelu(copy.deepcopy(model)), dtype), settings, vectors, name)
    assert torch.equal(plain, fused)


REFUSED = {
    "another dtype": ("int4", {}, "linear dtype must be one of float8_e4m3, int8, got 'int4'"),
    "emulated int8": ("int8", {"emulated": True}, "must be 'float8_e4m3' where emulated, got 'int8'"),
    "float8 on a CPU": ("float8_e4m3", {}, "capability 8.9 or more, got torch.float32 on cpu"),
}


@pytest.mark.parametrize("dtype,options,message", REFUSED.values(), ids=REFUSED.keys())
def test_unsupported_models_are_refused_and_unchanged(model, dtype, options, message):
    changed = copy.deepcopy(model)
    with pytest.raises(InputError, match=message):
        quantize_linears(changed, dtype, **options)
    assert list(changed.state_dict()) == list(model.state_dict())


def test_a_model_in_training_or_quantised_already_is_refused(model):
    with pytest.raises(InputError, match="must not require gradients"):
        quantize_linears(copy.deepcopy(model).requires_grad_(True), "float8_e4m3", emulated=True)
    with pytest.raises(InputError, match="quantised already"):
        quantize_linears(quantized(model, "float8_e4m3"), "float8_e4m3", emulated=True)


def test_int8_is_refused_in_half(model):
    with pytest.raises(InputError, match="int8 linears need a float32 or bfloat16 model.*got torch.float16 on cpu"):
        quantize_linears(copy.deepcopy(model).half(), "int8")


def test_float8_products_need_multiples_of_16():
    with pytest.raises(InputError, match=r"multiples of 16, got \[24, 40\]"):
        Float8Linear(linear(40, 24, torch.bfloat16))


@pytest.mark.gpu
def test_the_product_on_a_gpu_equals_the_emulated_one():
    """The same codes (on the GPU made by Triton), sums in another order and, in the GPU's, of fewer bits."""
    layer = linear(256, 512, torch.bfloat16).cuda()
    x = torch.randn(2, 60, 256, device="cuda", dtype=torch.bfloat16)
    for gelu in (False, True):
        ours, wanted = (Float8Linear(layer, gelu=gelu, emulated=emulated)(x).float() for emulated in (False, True))
        assert rms(ours - wanted) / rms(wanted) < 5e-3


@pytest.mark.gpu
def test_latents_of_the_gpu_are_near_the_emulated_ones(weights, config, vectors, meta):
    name = "framewise_2step"
    settings, wanted = settings_of(meta[name], meta["shift"], "fused"), vectors[f"{name}.latents"]
    for emulated in (False, True):
        model = build_model(weights, config, dtype=torch.bfloat16, device="cuda")
        latents = run(quantize_linears(model, "float8_e4m3", emulated=emulated), settings, vectors, name).cpu()
        assert rms(latents - wanted) / rms(wanted) < 0.035


@pytest.mark.gpu
def test_float8_passes_run_as_cuda_graphs(weights, config, vectors, meta):
    """Close, not equal: CUDA graphs always use the attention kernel of this project."""
    name = "framewise_2step_window"
    model = quantize_linears(build_model(weights, config, dtype=torch.bfloat16, device="cuda"), "float8_e4m3")
    noise, made = vectors[f"{name}.noise"], []
    for graphs in (None, CudaGraphCache(model)):
        rollout = Rollout(
            model,
            vectors["prompt_embeds"],
            settings_of(meta[name], meta["shift"], "fused"),
            latent_size=tuple(noise.shape[-2:]),
            latent_frames=noise.shape[1],
            noise=noise,
            renoise=list(vectors[f"{name}.renoise"]),
            cuda_graphs=graphs,
        )
        assert (rollout.why_no_cuda_graphs is None) is (graphs is not None)
        made.append(torch.cat([block.values for block in rollout], dim=1))
    assert rms(made[0] - made[1]) / rms(made[0]) < 0.03
