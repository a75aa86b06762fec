"""Whatever the settings, the fused refresh gives what the separate one gives, with and without an end in sight."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout

TINY = ModelConfig(dim=24, ffn_dim=48, num_heads=2, num_layers=2, freq_dim=16, text_dim=16, text_len=4)


@pytest.fixture(scope="module")
def tiny():
    return random_model(TINY, seed=0, dtype=torch.float32)


@st.composite
def rollouts(draw):
    block = draw(st.sampled_from([1, 1, 2, 3]))
    window, sinks = None, 0
    if draw(st.booleans()):
        sinks = block * draw(st.integers(0, 2))
        window = sinks + block + draw(st.integers(0, 6))
    blocks = draw(st.integers(1, 7))
    return {
        "block": block,
        "window": window,
        "sinks": sinks,
        "blocks": blocks,
        "given": draw(st.integers(0, blocks - 1)),
        "batch": draw(st.integers(1, 2)),
        "steps": draw(st.sampled_from([(1000,), (1000, 500), (900, 300, 20)])),
        "first_steps": draw(st.sampled_from([None, (1000, 750, 500, 250)])),
        "context_noise": draw(st.sampled_from([0, 100])),
        "switch_at": draw(st.none() | st.integers(0, blocks)),
        "recache": draw(st.booleans()),
        "idle_refresh": draw(st.booleans()),
    }


def make(model, case, refresh, frames):
    config = RolloutConfig(
        steps=case["steps"],
        first_steps=case["first_steps"],
        frames_per_block=case["block"],
        window=case["window"],
        sinks=case["sinks"],
        context_noise=case["context_noise"],
        refresh=refresh,
    )
    generator = torch.Generator().manual_seed(5)
    texts = [torch.randn(case["batch"], 4, 16, generator=generator) for _ in range(2)]
    initial = torch.randn(case["batch"], case["given"] * case["block"], 16, 4, 4, generator=generator)
    rollout = Rollout(
        model,
        texts[0],
        config,
        latent_size=(4, 4),
        latent_frames=frames,
        initial_latents=initial if case["given"] else None,
        seed=3,
    )
    made = []
    for i in range(case["blocks"] - case["given"]):
        if i == case["switch_at"]:
            rollout.set_prompt(texts[1], recache=case["recache"])
        if case["idle_refresh"] and i % 2:
            rollout.refresh()
        made.append(next(rollout).values)
    return torch.cat(made, dim=1)


@settings(max_examples=60, deadline=None)
@given(case=rollouts())
def test_fused_equals_separate_equals_endless(tiny, case):
    frames = case["blocks"] * case["block"]
    separate = make(tiny, case, "separate", frames)
    scale = max(1.0, separate.abs().max().item())
    others = [make(tiny, case, "fused", frames)]
    if case["window"] is not None:
        others.append(make(tiny, case, "fused", None))
    for other in others:
        assert (separate - other).abs().max().item() <= 2e-5 * scale
