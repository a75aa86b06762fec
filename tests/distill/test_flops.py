"""The FLOP formula against PyTorch's own counter."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from cfpp_rt.config import MODELS, ModelConfig, RolloutConfig
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill.ar_diffusion import ArDiffusion
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.causal_cd import CausalCD, Guidance, timestep_table
from cfpp_rt.distill.dmd import DMD
from cfpp_rt.distill.flops import pass_flops, step_flops
from cfpp_rt.distill.forward import Condition, Denoiser, Layout
from cfpp_rt.distill.self_rollout import SelfRollout
from cfpp_rt.distill.settings import Settings, StageSettings
from cfpp_rt.model.transformer import random_model

TINY = ModelConfig(dim=32, ffn_dim=96, num_heads=2, num_layers=3, freq_dim=16, text_len=5, text_dim=8)
FRAMES, TOKENS = 4, 6


def plain_attention(q, k, v, attn_mask=None):
    """Matrix products, which the counter knows on every device."""
    return (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1) @ v


@pytest.fixture(autouse=True)
def counted_attention(monkeypatch):
    monkeypatch.setattr(F, "scaled_dot_product_attention", plain_attention)


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def condition(batch=1):
    return Condition(torch.randn(batch, 5, 8))


def settings_of(own, layout):
    return Settings(TINY, layout, RolloutConfig(window=layout.window), {}, {"ar": own})


@pytest.mark.parametrize("text_len", [0, 5])
def test_a_forward(text_len):
    config = dataclasses.replace(TINY, text_len=text_len)
    network = random_model(config, seed=0, dtype=torch.float32)
    noisy, text = torch.randn(1, FRAMES, 16, 4, 6), Condition(torch.randn(1, text_len, 8))
    with torch.no_grad():
        found = counted(lambda: Denoiser(network).bidirectional(noisy, torch.full((1, FRAMES), 500.0), text))
    assert pass_flops(config, FRAMES, TOKENS, FRAMES**2) == pytest.approx(found, rel=1e-6)


@pytest.mark.parametrize("window", [None, 2])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_step_of_stage_ar(window, checkpointing):
    layout, own = Layout(1, window), StageSettings(steps=1, batch=2, checkpointing=checkpointing)
    network = random_model(TINY, seed=0, dtype=torch.float32).requires_grad_(True)
    student = Denoiser(network, layout, checkpointing=checkpointing)
    stage = ArDiffusion(student, network, schedule=FlowMatchSchedule(5.0))
    batch = Batch(condition(2), torch.randn(2, FRAMES, 16, 4, 6))

    def step():
        for _, loss in stage.updates(lambda: batch, torch.Generator(), 0):
            loss.backward()

    wanted = counted(step)
    assert step_flops("ar", settings_of(own, layout), own, FRAMES, TOKENS) == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("guidance", [None, 3.0])
def test_a_step_of_stage_cd(guidance):
    layout, own = Layout(1, 2), StageSettings(steps=1, guidance=guidance or 1.0)
    student, ema, teacher = (
        Denoiser(random_model(TINY, seed=0, dtype=torch.float32).requires_grad_(learns), layout)
        for learns in (True, False, False)
    )
    negative = None if guidance is None else Guidance(guidance, torch.randn(1, 5, 8))
    stage = CausalCD(
        student, ema, teacher, schedule=FlowMatchSchedule(5.0), timesteps=timestep_table(), guidance=negative
    )
    batch = Batch(condition(), torch.randn(1, FRAMES, 16, 4, 6))

    def step():
        for _, loss in stage.updates(lambda: batch, torch.Generator(), 0):
            loss.backward()

    wanted = counted(step)
    assert step_flops("cd", settings_of(own, layout), own, FRAMES, TOKENS) == pytest.approx(wanted, rel=0.05)


def test_a_stage_1_step_of_wan_is_petaflops():
    """65,520 tokens through 1.42e9 parameters, forward and backward, and attention over half of the pairs."""
    config, own = MODELS["wan-1.3b"], StageSettings(steps=1)
    settings = Settings(config, Layout(), RolloutConfig(), {}, {"ar": own})
    linear = 6 * 65520 * 1.3e9
    pairs = sum(range(1, 22)) * 2 * 1560**2
    attention = 12 * pairs * config.dim * config.num_layers
    assert step_flops("ar", settings, own, 21, 1560) == pytest.approx(linear + attention, rel=0.1)


def test_a_step_of_stage_dmd():
    """Attention over the cache is an op of ours, which the counter does not see, and is little here."""
    rollout, own = RolloutConfig(steps=(1000,), window=2), StageSettings(steps=1, frames=FRAMES, ratio=2)
    student, real, critic = (
        random_model(TINY, seed=0, dtype=torch.float32).requires_grad_(learns) for learns in (True, False, True)
    )
    stage = DMD(
        SelfRollout(student, rollout),
        student,
        Denoiser(real),
        Denoiser(critic),
        latent_frames=FRAMES,
        latent_size=(16, 4, 6),
        guidance=Guidance(4.0, torch.randn(1, 5, 8)),
        ratio=2,
    )
    guided = dataclasses.replace(own, guidance=4.0)

    def steps():
        for step in range(2):
            for _, loss in stage.updates(lambda: Batch(condition()), torch.Generator(), step):
                loss.backward()

    settings = Settings(TINY, Layout(), rollout, {}, {"dmd": guided})
    assert 2 * step_flops("dmd", settings, guided, FRAMES, TOKENS) == pytest.approx(counted(steps), rel=0.15)
