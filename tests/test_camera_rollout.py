"""The camera branch: the published implementation's rollout, full recomputation, the cache, and every way in."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from cfpp_rt.cache import CacheShape
from cfpp_rt.camera import Cameras, parse_trajectory, walk
from cfpp_rt.config import ModelConfig, RolloutConfig, student
from cfpp_rt.errors import InputError, OutOfMemoryError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.model.weights import build_model, load_model
from cfpp_rt.rollout import Rollout
from cfpp_rt.speed.fuse import fuse_qkv
from cfpp_rt.values import Conditioning
from tests import plain_model
from tests.closeness import assert_close_max

DATA = Path(__file__).parent / "data"
META = json.loads((DATA / "camera_meta.json").read_text())


@pytest.fixture(scope="module")
def vectors():
    return load_file(DATA / "camera_vectors.safetensors")


@pytest.fixture(scope="module")
def weights():
    return {name: t.float() for name, t in load_file(DATA / "camera_weights.safetensors").items()}


@pytest.fixture(scope="module")
def config():
    return ModelConfig.from_dict({**META["config"], "camera": True})


@pytest.fixture(scope="module")
def model(weights, config):
    return build_model(weights, config, dtype=torch.float32, device="cpu")


@pytest.fixture(scope="module")
def cameras(vectors):
    return Cameras.of(vectors["viewmats"], vectors["intrinsics"])


def settings(refresh="fused", **changes):
    return RolloutConfig(tuple(META["steps"]), frames_per_block=META["frames_per_block"], refresh=refresh, **changes)


def published(model, vectors, cameras, config):
    """The rollout of the vectors: its noise, its text."""
    return Rollout(
        model,
        Conditioning(vectors["prompt_embeds"]),
        config,
        latent_size=tuple(META["latent_hw"]),
        frames=META["frames"],
        cameras=cameras,
        noise=vectors["noise"],
        renoise=list(vectors["renoise"]),
    )


def latents_of(rollout):
    return torch.cat([block.values for block in rollout], dim=1)


@pytest.mark.parametrize("refresh", ["fused", "separate"])
@pytest.mark.parametrize("seen", [True, False], ids=["cameras", "no-cameras"])
def test_latents_equal_the_published_implementation(model, vectors, cameras, refresh, seen):
    latents = latents_of(published(model, vectors, cameras if seen else None, settings(refresh)))
    wanted = vectors["latents" if seen else "latents_without_camera"]
    torch.testing.assert_close(latents, wanted, rtol=0, atol=2e-4)
