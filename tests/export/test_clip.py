"""`cfpp generate --engine`: the video that PyTorch makes, from a bundle."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cfpp_rt.cli.main import main
from cfpp_rt.config import RolloutConfig
from cfpp_rt.model.transformer import random_model
from cfpp_rt.world.simulator import ACTIONS
from tests.export.test_codec_onnx import patches
from tests.test_actions import ACTING
from tests.test_cli import fault

RUN = RolloutConfig(steps=(1000, 500), window=3)
SCRIPT = "right*3,up*2,interact"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A student of the world with random weights, as a folder, and its bundle."""
    folder = tmp_path_factory.mktemp("world")
    config = dataclasses.replace(ACTING, patch_size=(1, 1, 1), num_actions=len(ACTIONS))
    save_file(dict(random_model(config, seed=0, dtype=torch.float32).state_dict()), folder / "student.safetensors")
    settings = {**config.to_dict(), "rollout": dataclasses.asdict(RUN)}
    (folder / "student.json").write_text(json.dumps(settings))
    save_file(
        {name: tensor.contiguous() for name, tensor in patches().state_dict().items()}, folder / "codec.safetensors"
    )
    bundle = folder / "bundle"
    assert main(["export", "onnx", str(folder), "--student", "world", "-o", str(bundle)]) == 0
    assert main(["export", "verify", str(bundle), str(folder), "--student", "world", "--quiet"]) == 0
    return folder, bundle


@pytest.mark.parametrize("refresh", ["fused", "separate"])
def test_a_video_from_a_bundle_is_that_of_pytorch(world, tmp_path, capsys, refresh):
    folder, bundle = world
    how = ["--actions", SCRIPT, "--seed", "4", "--refresh", refresh]
    source = {"torch": ["--student", "world", "--checkpoint", str(folder)], "engine": ["--engine", str(bundle)]}
    made = {}
    for name, options in source.items():
        assert main(["generate", *options, *how, "-o", str(tmp_path / f"{name}.rgb")]) == 0
        assert "7 frames of 384x384" in capsys.readouterr().out
        made[name] = np.fromfile(tmp_path / f"{name}.rgb", np.uint8).astype(int)
    assert made["torch"].std() > 5 and np.abs(made["torch"] - made["engine"]).max() <= 1


@pytest.mark.slow
def test_a_video_from_text_embeddings(tmp_path):
    pytest.importorskip("onnxscript")
    from cfpp_rt.codec.taehv import TAEHV
    from cfpp_rt.export.export_bundle import export_onnx
    from cfpp_rt.random_weights import SMALL

    torch.manual_seed(0)
    model = random_model(dataclasses.replace(SMALL, num_layers=1), seed=0, dtype=torch.float32)
    codec = TAEHV(16, (8, 8, 8, 8), 8)
    export_onnx(model, RolloutConfig(), tmp_path / "b", latent_size=(2, 4), latent_frames=2, codec=codec)
    save_file({"embeds": torch.randn(1, SMALL.text_len, SMALL.text_dim)}, tmp_path / "embeds.safetensors")
    command = ["generate", "--engine", str(tmp_path / "b"), "--embeds", str(tmp_path / "embeds.safetensors"), "--quiet"]
    assert main([*command, "-o", str(tmp_path / "video.rgb")]) == 0
    assert (tmp_path / "video.rgb").stat().st_size == 5 * 16 * 32 * 3


@pytest.mark.parametrize(
    "options,message",
    [
        (["--size", "48x48"], "--engine takes no --size: the bundle has settled it"),
        (["--window", "4"], "--engine takes no --window"),
        (["--student", "world"], "--engine takes no --student"),
        (["--random-weights"], "--engine takes no --random-weights"),
        (["--actions", "fly"], "actions must be names"),
        ([], "--actions must be given"),
        (["--actions", SCRIPT, "--frames", "2"], "--frames must be at least"),
        (["--actions", SCRIPT, "--prompt", "a boat"], "a student without text takes no --prompt"),
        (["--actions", SCRIPT, "--frames", "0"], "frames must be"),
    ],
)
def test_bad_options_are_one_line(world, tmp_path, capsys, options, message):
    line = fault(capsys, ["generate", "--engine", str(world[1]), *options, "-o", str(tmp_path / "x.rgb")])
    assert message in line and not list(tmp_path.iterdir())
    assert "no bundle" in fault(capsys, ["generate", "--engine", str(tmp_path), "-o", str(tmp_path / "x.rgb")])
