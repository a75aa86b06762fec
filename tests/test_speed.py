"""The optimisations of cfpp_rt.speed: the fused model computes the same as the plain one."""

import copy

import pytest
import torch
import torch.nn.functional as F

from cfpp_rt.config import rollout_preset
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed import fuse_gelu, fuse_qkv
from tests.closeness import assert_close_max, assert_no_worse_than


def latents(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    text = torch.randn(1, model.config.text_len, model.config.text_dim, generator=generator)
    rollout = Rollout(model, text, rollout_preset("framewise-2step"), latent_size=(8, 8), latent_frames=3, seed=1)
    return torch.cat([block.values for block in rollout], dim=1)


def test_packed_projections_compute_the_same(model):
    fused = fuse_qkv(copy.deepcopy(model))
    assert not any(".self_attn.q." in name for name in fused.state_dict())
    assert_close_max(latents(fused), latents(model), 2e-4, "latents")
    assert_close_max(latents(fuse_qkv(fused)), latents(model), 2e-4, "latents, fused twice")


def test_packed_weights_are_the_three_in_order(model):
    plain, packed = model.blocks[0].self_attn, fuse_qkv(copy.deepcopy(model)).blocks[0].self_attn
    x = torch.randn(1, 5, model.config.dim)
    for ours, linear in zip(packed.project(x), (plain.q, plain.k, plain.v), strict=True):
        torch.testing.assert_close(ours, linear(x))
    assert torch.equal(packed.qkv.weight[: model.config.dim], plain.q.weight)


def test_a_model_in_training_is_refused(model):
    with pytest.raises(InputError, match="must not require gradients"):
        fuse_qkv(copy.deepcopy(model).requires_grad_(True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_gelu_is_the_tanh_form_on_the_cpu(config, dtype):
    """Names stay, and the error against float64 is at most twice that of the product followed by GELU.

    floor: two roundings of a float32 near 2, since another order of summation is as good.
    """
    plain = random_model(config, seed=0, dtype=dtype)
    fused = fuse_gelu(fuse_gelu(copy.deepcopy(plain)))
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(2, 60, config.dim, generator=torch.Generator().manual_seed(0)).to(dtype)[:, ::2]
    first = plain.blocks[0].ffn[0]
    exact = F.gelu(F.linear(x.double(), first.weight.double(), first.bias.double()), approximate="tanh")
    assert_no_worse_than(fused.blocks[0].ffn[:2](x), plain.blocks[0].ffn[:2](x), exact, floor=5e-7, name="ffn")
    erf = F.gelu(F.linear(x.double(), first.weight.double(), first.bias.double()))
    if dtype == torch.float32:
        assert (exact - erf).abs().max() > 100 * (fused.blocks[0].ffn[:2](x).double() - exact).abs().max()


def test_fused_gelu_makes_the_same_latents(model):
    assert_close_max(latents(fuse_gelu(fuse_qkv(copy.deepcopy(model)))), latents(model), 2e-4, "latents")


def test_fused_gelu_is_refused_where_there_is_none(model):
    with pytest.raises(InputError, match="got torch.float16 on cpu"):
        fuse_gelu(copy.deepcopy(model).half())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fused_gelu_is_the_tanh_form(config, dtype):
    plain = random_model(config, seed=0, dtype=dtype, device="cuda")
    fused = fuse_gelu(copy.deepcopy(plain))
    assert list(fused.state_dict()) == list(plain.state_dict())
    x = torch.randn(1, 60, config.dim, device="cuda", dtype=dtype)
    first = plain.blocks[0].ffn[0]
    exact = F.gelu(F.linear(x.double(), first.weight.double(), first.bias.double()), approximate="tanh")
    error = (fused.blocks[0].ffn[:2](x).double() - exact).abs().max()
    assert error <= 2 * (plain.blocks[0].ffn[:2](x).double() - exact).abs().max()
