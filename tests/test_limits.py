"""Sizes far beyond every use are refused in one line that names the argument, before memory or time is spent."""

import json
import time
import tracemalloc
from contextlib import contextmanager

import pytest
import torch
from safetensors.torch import save_file

from cfpp_rt.cli.main import main
from cfpp_rt.config import MAX_LAYERS, MAX_SIZE, MAX_SLOTS, ModelConfig, RolloutConfig
from cfpp_rt.core.camera import parse_trajectory
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.model.weights import read_weights
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.world.actions import parse_actions


@contextmanager
def cheap(seconds=1.0, mib=64):
    """Require that the body takes little time and memory of Python."""
    tracemalloc.start()
    began = time.monotonic()
    try:
        yield
        spent, peak = time.monotonic() - began, tracemalloc.get_traced_memory()[1] / 2**20
    finally:
        tracemalloc.stop()
    assert spent < seconds and peak < mib, (spent, peak)


def test_sizes_of_models_have_limits(config):
    for name, maximum in (("num_layers", MAX_LAYERS), ("dim", MAX_SIZE), ("ffn_dim", MAX_SIZE), ("text_len", MAX_SIZE)):
        with pytest.raises(InputError, match=f"{name} must be at most {maximum}, got {2**62}"):
            ModelConfig(**{name: 2**62})
    assert ModelConfig(num_layers=MAX_LAYERS).num_layers == MAX_LAYERS


def test_a_config_of_a_million_layers_is_refused_before_modules_are_made(tmp_path, weights, config):
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps({**config.to_dict(), "num_layers": 1_000_000}))
    with cheap(), pytest.raises(InputError, match=r"w\.json: num_layers must be at most 1024, got 1000000"):
        read_weights(tmp_path / "w.safetensors")


def test_a_config_with_other_layers_than_the_weights_is_refused_before_modules_are_made(tmp_path, weights, config):
    save_file(weights, tmp_path / "w.safetensors")
    (tmp_path / "w.json").write_text(json.dumps({**config.to_dict(), "num_layers": MAX_LAYERS}))
    with cheap(), pytest.raises(CheckpointError, match=f"num_layers of the config must be {config.num_layers}"):
        read_weights(tmp_path / "w.safetensors")


@pytest.mark.parametrize("number", ["999999", "9" * 5000, "-1", "x"])
def test_a_checkpoint_with_a_gap_in_its_blocks_is_refused_before_modules_are_made(tmp_path, weights, number):
    state = {**weights, f"blocks.{number}.x": torch.zeros(1)}
    state["patch_embedding.weight"] = torch.zeros(128, 16, 1, 2, 2)
    save_file(state, tmp_path / "w.safetensors")
    with cheap(), pytest.raises(CheckpointError, match=r"has no blocks\.[0-9]+, but blocks\.") as error:
        read_weights(tmp_path / "w.safetensors")
    assert len(str(error.value)) < 300


def test_a_ring_has_a_limit():
    with cheap(), pytest.raises(InputError, match=f"must be at most {MAX_SLOTS} latent frames together"):
        FrameRing(0, 10**9, 1)
    with cheap(), pytest.raises(InputError, match=f"must be at most {MAX_SLOTS} latent frames together"):
        FrameRing(10**9, 1, 1)


def test_a_rollout_of_a_hundred_million_latent_frames_needs_a_window(model):
    embeds = torch.zeros(1, model.config.text_len, model.config.text_dim)
    with cheap(), pytest.raises(InputError, match="got 100000001: a window keeps"):
        Rollout(model, embeds, RolloutConfig(), latent_size=(8, 12), latent_frames=100_000_001)
    rolling = Rollout(model, embeds, RolloutConfig(window=3), latent_size=(8, 12), latent_frames=100_000_001)
    assert rolling.cache.ring.capacity == 4


def test_generate_without_a_window_is_one_line(tmp_path, capsys):
    arguments = ["generate", "--random-weights", "--prompt", "a", "--frames", "400000001", "--size", "32x32"]
    assert main([*arguments, "-o", str(tmp_path / "a.rgb")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "got 100000001: a window" in error and not list(tmp_path.iterdir())


def test_trajectories_and_actions_have_a_limit_in_all():
    with cheap(), pytest.raises(InputError, match="trajectory must be at most 100000 units in all"):
        parse_trajectory(",".join(["w*100000"] * 100))
    with cheap(mib=256), pytest.raises(InputError, match="actions must be at most 1000000 in all"):
        parse_actions(",".join(["right*1000000"] * 100))
    assert parse_trajectory("w*600,a*400").shape == (1001, 4, 4)
