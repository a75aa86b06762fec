"""Cameras in the graphs: the published rollout, PyTorch's, and what TensorRT makes of the second cache."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cfpp_rt.cli.main import main
from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.core.camera import Cameras, parse_trajectory, walk
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import open_bundle
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.contract import PASSES
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.onnx_runner import OnnxRunner
from cfpp_rt.export.parity import require_passed, verify
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import random_model
from cfpp_rt.model.weights import build_model
from cfpp_rt.runtime.rollout import Rollout
from tests.export.needs import needs_tensorrt
from tests.export.students import TINY
from tests.export.test_codec_onnx import patches
from tests.test_cli import fault

DATA = Path(__file__).parents[1] / "data"
META = json.loads((DATA / "camera_meta.json").read_text())
SMALL = dataclasses.replace(TINY, camera=True)
RUN = RolloutConfig((1000, 500), frames_per_block=2, window=6, sinks=2)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The runner of the published camera rollout, and its vectors."""
    weights = {name: tensor.float() for name, tensor in load_file(DATA / "camera_weights.safetensors").items()}
    config = ModelConfig.from_dict({**META["config"], "camera": True})
    model = build_model(weights, config, dtype=torch.float32, device="cpu")
    folder = tmp_path_factory.mktemp("camera") / "bundle"
    run = RolloutConfig(tuple(META["steps"]), frames_per_block=META["frames_per_block"])
    export_onnx(model, run, folder, latent_size=tuple(META["latent_hw"]), latent_frames=META["frames"])
    return OnnxRunner(folder, threads=1), load_file(DATA / "camera_vectors.safetensors")


@pytest.mark.parametrize("refresh", ["fused", "separate"])
def test_latents_equal_the_published_implementation(published, refresh):
    runner, vectors = published
    rollout = BundleRollout(
        runner,
        vectors["prompt_embeds"].numpy(),
        latent_frames=META["frames"],
        cameras=Cameras.of(vectors["viewmats"], vectors["intrinsics"]),
        noise=vectors["noise"].numpy(),
        renoise=[part.numpy() for part in vectors["renoise"]],
        refresh=refresh,
    )
    latents = torch.from_numpy(np.concatenate([block.values for block in rollout], axis=1))
    torch.testing.assert_close(latents, vectors["latents"], rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def moving(tmp_path_factory):
    """Two rows, a window and sinks: the model and its runner."""
    model = random_model(SMALL, seed=0, dtype=torch.float32)
    with torch.no_grad():  # a fresh branch is silent
        for block in model.blocks:
            block.self_attn.prope_o.weight.copy_(block.self_attn.o.weight.roll(1, 0))
    folder = tmp_path_factory.mktemp("moving") / "bundle"
    export_onnx(model, RUN, folder, latent_size=(4, 6), latent_frames=None, batch=2)
    return model, OnnxRunner(folder, threads=1)


@pytest.mark.parametrize("refresh", ["fused", "separate", "skip"])
def test_a_camera_that_moves_is_that_of_the_runtime(moving, refresh):
    """Given frames, a path that ends, a move on the way, lenses of their own: through the wrap of the ring."""
    model, runner = moving
    embeds = torch.randn(2, SMALL.text_len, SMALL.text_dim, generator=torch.Generator().manual_seed(1))
    initial = torch.randn(2, 2, 16, 4, 6, generator=torch.Generator().manual_seed(2))
    first = Cameras.of(parse_trajectory("w*2,j*2"), (0.6, 0.9))
    views = np.stack([walk(["l", "u"], first.views[0, -1]), walk(["s", "a"], first.views[0, -1])])
    second = Cameras.of(views, (0.5, 0.5))
    options = {"latent_frames": None, "seed": [3, 5]}
    theirs = Rollout(
        model,
        embeds,
        RUN.replace(refresh=refresh),
        latent_size=(4, 6),
        cameras=first,
        initial_latents=initial,
        **options,
    )
    ours = BundleRollout(
        runner, embeds.numpy(), cameras=first, initial_latents=initial.numpy(), refresh=refresh, **options
    )
    still = BundleRollout(
        runner,
        embeds.numpy(),
        cameras=first.at([0]),
        initial_latents=initial.numpy(),
        refresh=refresh,
        **options,
    )
    for block in range(6):
        if block == 2:
            theirs.set_cameras(second), ours.set_cameras(second)
        wanted, found = next(theirs).values, torch.from_numpy(next(ours).values)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-4)
    assert np.abs(next(still).values - found.numpy()).max() > 0.01, "the cameras matter"


@pytest.mark.parametrize("dtype,linear_dtype", [("float32", None), ("float16", None), ("float32", "float8_e4m3")])
def test_the_gate_walks_with_the_camera(tmp_path, dtype, linear_dtype):
    model = random_model(SMALL, seed=0, dtype=getattr(torch, dtype))
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 6), latent_frames=None, linear_dtype=linear_dtype)
    report = verify(open_bundle(tmp_path / "b"), model, threads=1)
    require_passed(report)
    assert {"camera_keys.1.updated", "camera_values.0.updated"} <= {entry["tensor"] for entry in report["tensors"]}


def test_the_matrices_of_a_pass_are_those_of_the_runtime(moving):
    """P and P^-1 side by side, in the world of the first camera; the path ends, and its last camera stands still."""
    model, runner = moving
    path = Cameras.of(parse_trajectory("w*3,l*30,u*2,i*7"), (0.6, 0.9))
    text = np.zeros((2, SMALL.text_len, SMALL.text_dim), np.float32)
    ours = BundleRollout(runner, text, latent_frames=None, cameras=path)
    wanted = Projections.of(path.from_first())
    for start in (0, 20, 42):
        found = ours._block_input(np.zeros((2, 2, 16, 4, 6), np.float32), start, 0).projections
        frames = [min(start + i, len(path) - 1) for i in range(2)]
        assert found.shape == (2, 2, 2, 4, 4) and found.dtype == np.float32
        np.testing.assert_array_equal(found[1, :, 0], wanted.matrices[0, frames])
        np.testing.assert_array_equal(found[1, :, 1], wanted.inverses[0, frames])


@pytest.mark.parametrize(
    "views,focal,message",
    [
        (np.eye(4), (1, 1), r"views must be \[B, F, 4, 4\] or \[F, 4, 4\]"),
        (np.eye(4)[None].repeat(0, 0), (1, 1), "none of them 0"),
        (np.eye(4)[None, None].repeat(3, 0), (1, 1), r"cameras must be of 1 video or of 1, got 3"),
        (2 * np.eye(4)[None], (1, 1), "views must be rigid"),
        (np.eye(4)[None] * np.nan, (1, 1), "views must be finite"),
        (np.diag([1.0, 1, -1, 1])[None], (1, 1), "views must be rigid"),
        (np.eye(4)[None], (1, 0), "intrinsics must be"),
        (np.eye(4)[None], (1, np.inf), "intrinsics must be"),
        (np.eye(4)[None], (1, 1, 1), "intrinsics must be"),
    ],
)
def test_what_is_no_camera_is_refused(published, views, focal, message):
    with pytest.raises(InputError, match=message):
        BundleRollout(
            published[0], published[1]["prompt_embeds"].numpy(), latent_frames=6, cameras=Cameras.of(views, focal)
        )


def test_bad_cameras_are_named(published, moving, tmp_path):
    embeds = published[1]["prompt_embeds"].numpy()
    two = Cameras.of(np.eye(4)[None].repeat(2, 0), (1, 1))
    with pytest.raises(InputError, match="cameras must be given for a model with the camera branch"):
        BundleRollout(published[0], embeds, latent_frames=6)
    with pytest.raises(InputError, match="cameras must be one per latent frame, 6, or a single one, got 2"):
        BundleRollout(published[0], embeds, latent_frames=6, cameras=two)
    export_onnx(
        random_model(TINY, seed=0, dtype=torch.float32), RUN, tmp_path / "b", latent_size=(4, 6), latent_frames=None
    )
    plain = np.zeros((1, TINY.text_len, TINY.text_dim), np.float32)
    with pytest.raises(InputError, match="cameras must not be given to a model without the camera branch"):
        BundleRollout(OnnxRunner(tmp_path / "b", 1), plain, latent_frames=6, cameras=two)
    with pytest.raises(InputError, match="cameras must not be given to a model without the camera branch"):
        BundleRollout(OnnxRunner(tmp_path / "b", 1), plain, latent_frames=6).set_cameras(two)


@needs_tensorrt
def test_every_pass_is_proven(tmp_path):
    """Two attentions per layer, each with caches of its own, each cache updated once and in place."""
    from cfpp_rt.export.trt.check_network import check_network
    from cfpp_rt.export.trt.library import load_library
    from cfpp_rt.export.trt.parser import parse

    model = random_model(SMALL, seed=0, dtype=torch.float16)
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 6), latent_frames=None)
    library, bundle = load_library("tensorrt-rtx"), open_bundle(tmp_path / "b")
    for name in ("embed_time", "embed_text"):
        assert not check_network(library, parse(library, bundle.path(name)), bundle.card.graphs[name]).sites
    for name in PASSES:
        report = check_network(library, parse(library, bundle.path(name)), bundle.card.graphs[name])
        layers = 1 if name == "refresh" else 2
        wanted = [f"{kind}.{layer}" for layer in range(layers) for kind in ("keys", "camera_keys")]
        assert [site.key_cache for site in report.sites] == wanted
        assert [site.value_cache for site in report.sites] == [name.replace("keys", "values") for name in wanted]


@needs_tensorrt
def test_an_engine_of_a_camera_model_is_built(tmp_path):
    """The fused pass: four attentions with a mask, none of whose caches is another's."""
    from cfpp_rt.export.trt.build import build_engine
    from cfpp_rt.export.trt.build_worker import Job

    model = random_model(SMALL, seed=0, dtype=torch.bfloat16)
    export_onnx(model, RUN, tmp_path / "b", latent_size=(4, 6), latent_frames=None)
    bundle = open_bundle(tmp_path / "b")
    job = Job(str(bundle.path("fused")), str(tmp_path / "engine"), "tensorrt-rtx", "sm89", bundle.card.graphs["fused"])
    assert len(build_engine(job).network["sites"]) == 4
    assert (tmp_path / "engine").read_bytes()[:4] == b"vtrt"


def test_a_video_by_command(tmp_path, capsys):
    folder, embeds = tmp_path / "b", torch.randn(1, SMALL.text_len, SMALL.text_dim)
    model = random_model(dataclasses.replace(SMALL, patch_size=(1, 1, 1)), seed=0, dtype=torch.float32)
    export_onnx(model, RUN, folder, latent_size=(6, 6), latent_frames=None, codec=patches())
    save_file({"embeds": embeds}, tmp_path / "embeds.safetensors")
    command = ["generate", "--engine", str(folder), "--embeds", str(tmp_path / "embeds.safetensors"), "--quiet"]
    command += ["-o", str(tmp_path / "video.rgb")]
    assert main([*command, "--trajectory", "w*2,l*3", "--intrinsics", "0.5,0.9"]) == 0
    moved = np.fromfile(tmp_path / "video.rgb", np.uint8)
    assert moved.size == 6 * 48 * 48 * 3
    assert main([*command, "--trajectory", "s*2,l*3"]) == 0
    assert "needs --trajectory" in fault(capsys, command)
    assert "one per latent frame, 4, or a single one, got 6" in fault(
        capsys, [*command, "--trajectory", "w*2,l*3", "--frames", "4"]
    )
