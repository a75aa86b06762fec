"""The camera branch: the published implementation's rollout, full recomputation, the cache, and every way in."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from cfpp_rt.cache import CacheShape
from cfpp_rt.config import ModelConfig, RolloutConfig, rollout_preset
from cfpp_rt.core.camera import Cameras, parse_trajectory
from cfpp_rt.core.frame_ring import slots_for
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.distill import masks
from cfpp_rt.errors import CheckpointError, InputError, OutOfMemoryError
from cfpp_rt.export.convert import convert
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import add_camera_branch, random_model
from cfpp_rt.model.weights import build_model, infer_config, load_model
from cfpp_rt.random_weights import random_pipeline, random_prompt_embeds
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.speed.fuse import fuse_qkv
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
        vectors["prompt_embeds"],
        config,
        latent_size=tuple(META["latent_hw"]),
        latent_frames=META["frames"],
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


def test_fused_refresh_equals_separate(model, vectors, cameras):
    """In a fused pass the clean group has the cameras of its own block, the noisy group those of the next."""
    fused, separate = (latents_of(published(model, vectors, cameras, settings(r))) for r in ("fused", "separate"))
    torch.testing.assert_close(fused, separate, rtol=0, atol=2e-5)


def test_without_cameras_it_is_the_plain_model_bit_by_bit(model, weights, config, vectors):
    names = {name: tensor for name, tensor in weights.items() if "prope_o" not in name}
    plain = build_model(names, ModelConfig.from_dict(META["config"]), dtype=torch.float32, device="cpu")
    ours, theirs = (latents_of(published(m, vectors, None, settings())) for m in (model, plain))
    assert torch.equal(ours, theirs)


def roll(model, cameras, rollout, frames, *, batch=1, seed=0, embeds=None, **options):
    shape = (batch, model.config.text_len, model.config.text_dim)
    embeds = torch.randn(shape, generator=torch.Generator().manual_seed(9)) if embeds is None else embeds
    return Rollout(
        model,
        embeds,
        rollout,
        latent_size=(4, 4),
        latent_frames=frames,
        cameras=cameras,
        seed=seed,
        **options,
    )


def path(text, intrinsics=(0.6, 0.9)):
    return Cameras.of(parse_trajectory(text), intrinsics)


TWO_STEPS = RolloutConfig((1000, 500), frames_per_block=2, window=6, sinks=2)


@pytest.mark.parametrize("refresh", ["fused", "separate"])
def test_live_cameras_equal_those_given_up_front(model, refresh):
    whole = path("w*3,j*4,d*2,u*2")
    wanted = latents_of(roll(model, whole, TWO_STEPS.replace(refresh=refresh), 12))
    rollout = roll(model, whole.at([0, 1]), TWO_STEPS.replace(refresh=refresh), None)
    made = [next(rollout).values]
    for start in range(2, 12, 2):
        rollout.set_cameras(whole.at([start, start + 1]))
        made.append(next(rollout).values)
    torch.testing.assert_close(torch.cat(made, dim=1), wanted, rtol=0, atol=2e-5)


def test_the_last_camera_stands_still(model):
    one, still = path("w*5").at([0]), Cameras.of(torch.eye(4).expand(6, 4, 4), (0.6, 0.9))
    assert torch.equal(latents_of(roll(model, one, TWO_STEPS, 6)), latents_of(roll(model, still, TWO_STEPS, 6)))
    moved = roll(model, one, TWO_STEPS, 6)
    next(moved)
    moved.set_cameras(path("w*1").at([1]))
    standing = Cameras.of(np.concatenate([still.views[0, :2], *[path("w*1").views[0, 1:]] * 4]), (0.6, 0.9))
    wanted = latents_of(roll(model, standing, TWO_STEPS, 6))[:, 2:]
    torch.testing.assert_close(latents_of(moved), wanted, rtol=0, atol=2e-5)
    assert not torch.allclose(wanted, latents_of(roll(model, one, TWO_STEPS, 6))[:, 2:], atol=1e-3)


@pytest.mark.parametrize("window,sinks,refresh", [(None, 0, "fused"), (4, 0, "fused"), (6, 2, "separate")])
def test_cached_rollout_equals_full_recompute_and_bfloat16_errs_no_more_than_plain(
    weights, config, vectors, window, sinks, refresh
):
    """Round the ring and further. float64 is the oracle; bfloat16 may err twice as much as plain PyTorch in it."""
    cameras = path("w*4,l*3,i*2,a*2")
    rollout = TWO_STEPS.replace(window=window, sinks=sinks, refresh=refresh)
    generator = torch.Generator().manual_seed(4)
    noise, renoise = (torch.randn(1, 12, 16, 4, 4, generator=generator) for _ in range(2))
    renoise = list(renoise.split(2, dim=1))
    schedule = FlowMatchSchedule(rollout.shift)
    timesteps = schedule.warp(rollout.steps).tolist()

    def plain(dtype):
        sigma, p = (lambda t: schedule.sigma(t).item()), camera_matrices(cameras)
        embeds = vectors["prompt_embeds"]
        return plain_model.rollout(
            weights, config, rollout, noise, renoise, embeds, timesteps, timesteps, sigma, dtype, p
        ).double()

    def ours(dtype):
        model = build_model(weights, config, dtype=dtype, device="cpu")
        options = {"noise": noise, "renoise": renoise, "embeds": vectors["prompt_embeds"]}
        return latents_of(roll(model, cameras, rollout, 12, **options)).double()

    oracle = plain(torch.float64)
    assert_close_max(ours(torch.float32), oracle, 2e-4)
    ours_half, theirs_half = (ours(torch.bfloat16) - oracle).abs(), (plain(torch.bfloat16) - oracle).abs()
    assert ours_half.max() <= 2 * theirs_half.max() and ours_half.mean() <= 2 * theirs_half.mean()


def camera_matrices(cameras):
    """P = K V, the textbook way."""
    lens = np.tile(np.eye(4), (*cameras.views.shape[:2], 1, 1))
    lens[..., 0, 0], lens[..., 1, 1] = cameras.focal[..., 0], cameras.focal[..., 1]
    return torch.from_numpy(lens @ cameras.views)


def test_masked_forward_equals_the_plain_model(model, weights, config, vectors):
    cameras = path("w*2,j*1,dn*1,k*1")
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(1, 6, 16, 4, 4, generator=generator)
    timesteps = torch.tensor([[0.0, 0.0, 937.5, 937.5, 500.0, 20.0]])
    visible = plain_model.block_causal(6, 2, 4, 0)
    wanted = plain_model.velocity(
        weights,
        config,
        latents,
        timesteps[0],
        list(range(6)),
        visible,
        vectors["prompt_embeds"],
        cameras=camera_matrices(cameras),
    )
    tables = model.rotary_tables(4, 4)
    attend = masks.attention(visible, 4, torch.device("cpu"))
    found = model.forward_sequence(
        latents,
        timesteps,
        vectors["prompt_embeds"],
        None,
        tables.sequence(range(6)),
        lambda layer: attend,
        cameras=Projections.of(cameras),
    )
    assert_close_max(found, wanted, 2e-5, "velocity")


def test_only_the_motion_between_frames_counts(model):
    """Another world, the same video; and the branch is looked at, or another path would make it too."""
    here = path("w*3,j*4")
    far = parse_trajectory("l*40,i*15,w*300")[-1:]
    there = Cameras.of(here.views[0] @ far, (0.6, 0.9))
    made = [latents_of(roll(model, cameras, TWO_STEPS, 8)) for cameras in (here, there, path("s*3,j*4"))]
    torch.testing.assert_close(made[0], made[1], rtol=0, atol=2e-5)
    assert not torch.allclose(made[0], made[2], atol=1e-3)


def test_rows_have_cameras_of_their_own(model):
    paths = [path("w*5"), path("l*5", (0.5, 0.5))]
    both = Cameras(*(np.concatenate(parts) for parts in zip(*((p.views, p.focal) for p in paths), strict=True)))
    embeds = torch.ones(2, model.config.text_len, model.config.text_dim)
    together = latents_of(roll(model, both, TWO_STEPS, 6, batch=2, embeds=embeds))
    for row, alone in enumerate(paths):
        one = latents_of(roll(model, alone, TWO_STEPS, 6, seed=row, embeds=embeds[:1]))
        assert_close_max(together[row : row + 1], one, 2e-5, f"row {row}")
    shared = latents_of(roll(model, paths[0], TWO_STEPS, 6, batch=2, embeds=embeds))
    assert_close_max(shared[:1], together[:1], 2e-5, "one path for both")


def test_given_frames_have_cameras_too(model):
    """A rollout that is broken off and continued from its frames and cameras goes on as it would have."""
    config = TWO_STEPS.replace(window=None, sinks=0, steps=(1000,))
    cameras = path("w*3,j*4")
    noise = torch.randn(1, 8, 16, 4, 4, generator=torch.Generator().manual_seed(1))
    whole = latents_of(roll(model, cameras, config, 8, noise=noise))
    rest = latents_of(roll(model, cameras, config, 8, noise=noise[:, 4:], initial_latents=whole[:, :4]))
    torch.testing.assert_close(rest, whole[:, 4:], rtol=0, atol=2e-5)


def test_recaching_makes_each_block_with_its_own_cameras(model):
    embeds = torch.ones(1, model.config.text_len, model.config.text_dim)
    config, cameras = TWO_STEPS.replace(window=None, sinks=0), path("w*2,l*5")
    rollout = roll(model, cameras, config, 8)
    frames = torch.cat([next(rollout).values for _ in range(3)], dim=1)
    rollout.set_cameras(path("s*1").at([1]))
    rollout.set_prompt(embeds, recache=True)
    prefilled = roll(model, cameras, config, 8, embeds=embeds, initial_latents=frames)
    for ours, theirs in (
        (rollout.cache.data, prefilled.cache.data),
        (rollout.cache.camera_data, prefilled.cache.camera_data),
    ):
        torch.testing.assert_close(ours[..., : 6 * 4, :], theirs[..., : 6 * 4, :], rtol=0, atol=2e-5)


def test_unused_cache_rows_are_never_read(model):
    cameras = path("w*5,j*6")
    clean = latents_of(roll(model, cameras, TWO_STEPS, 12))
    rollout = roll(model, cameras, TWO_STEPS, 12)
    rollout.cache.camera_data.fill_(float("nan"))
    assert torch.equal(latents_of(rollout), clean)


def test_packed_projections_keep_the_branch(weights, config):
    cameras = path("w*5")
    plain = build_model(weights, config, dtype=torch.float32, device="cpu")
    wanted = latents_of(roll(plain, cameras, TWO_STEPS, 6))
    torch.testing.assert_close(latents_of(roll(fuse_qkv(plain), cameras, TWO_STEPS, 6)), wanted, rtol=0, atol=2e-5)


def test_the_second_cache_is_there_with_cameras_only(model, monkeypatch):
    without, seen = (roll(model, cameras, TWO_STEPS, None) for cameras in (None, path("w*1")))
    assert without.cache.camera_data is None and seen.cache.nbytes == 2 * without.cache.nbytes
    shape = CacheShape.of(model.config, 1, 8, 4, camera=True)
    assert seen.cache.nbytes == shape.bytes(torch.float32)
    monkeypatch.setattr("cfpp_rt.cache.available_bytes", lambda device: (256 << 20) + without.cache.nbytes + 1)
    roll(model, None, TWO_STEPS, None)
    with pytest.raises(OutOfMemoryError, match="KV cache of 8 latent frames.*a smaller frame size or batch"):
        roll(model, path("w*1"), TWO_STEPS, None)


@pytest.mark.parametrize(
    "cameras,changes,message",
    [
        ("w*4", {}, "cameras must be one per latent frame, 6, or a single one, got 5"),
        ("w*6", {}, "cameras must be one per latent frame, 6, or a single one, got 7"),
        ("w*5", {"kv_dtype": "float8_e4m3"}, "kv_dtype must be None for a rollout with cameras"),
    ],
)
def test_bad_cameras_are_named(model, cameras, changes, message):
    with pytest.raises(InputError, match=message):
        roll(model, path(cameras), TWO_STEPS.replace(**changes), 6)


def test_refused_moves_change_nothing(model):
    cameras = path("w*5")
    rollout = roll(model, cameras, TWO_STEPS, 6)
    two = cameras.rows(2)
    with pytest.raises(InputError, match="cameras must be of 1 video or of 1, got 2"):
        rollout.set_cameras(two)
    assert torch.equal(latents_of(rollout), latents_of(roll(model, cameras, TWO_STEPS, 6)))
    with pytest.raises(InputError, match="cameras must be of 1 video or of 3, got 2"):
        roll(model, two, TWO_STEPS, 6, batch=3)
    with pytest.raises(InputError, match="cameras must be given when the rollout is made"):
        roll(model, None, TWO_STEPS, 6).set_cameras(cameras)


def test_cameras_for_a_model_without_the_branch_are_refused():
    plain = random_model(ModelConfig.from_dict(META["config"]), seed=0, dtype=torch.float32)
    with pytest.raises(InputError, match="model without the camera branch"):
        roll(plain, path("w*5"), TWO_STEPS, 6)


def test_the_branch_is_reported_by_the_tensors(tmp_path, weights, config):
    """Public config files do not know of it; what has half of it is refused by name."""
    save_file(weights, tmp_path / "camera.safetensors")
    (tmp_path / "camera.json").write_text(json.dumps(META["config"]))
    assert load_model(tmp_path / "camera.safetensors").config == config
    assert load_model(tmp_path / "camera.safetensors", config=ModelConfig.from_dict(META["config"])).config.camera
    assert infer_config(weights, "here").camera
    convert(tmp_path / "camera.safetensors", tmp_path / "again.safetensors")
    assert ModelConfig.from_json(tmp_path / "again.json") == config
    half = {name: tensor for name, tensor in weights.items() if name != "blocks.1.self_attn.prope_o.bias"}
    save_file(half, tmp_path / "half.safetensors")
    with pytest.raises(CheckpointError, match=r"half\.safetensors.*blocks\.1\.self_attn\.prope_o\.bias"):
        load_model(tmp_path / "half.safetensors", config=config)
    save_file({n: t for n, t in weights.items() if "prope_o" not in n}, tmp_path / "plain.safetensors")
    with pytest.raises(CheckpointError, match=r"blocks\.0\.self_attn\.prope_o"):
        load_model(tmp_path / "plain.safetensors", config=config)


def test_a_branch_of_zeros_changes_nothing(weights, config):
    plain_weights = {n: t for n, t in weights.items() if "prope_o" not in n}
    sizes = ModelConfig.from_dict(META["config"])
    plain, grown = (build_model(plain_weights, sizes, dtype=torch.float32, device="cpu") for _ in range(2))
    add_camera_branch(grown)
    assert grown.config == config and grown.state_dict().keys() == weights.keys()
    assert torch.equal(latents_of(roll(grown, path("w*5"), TWO_STEPS, 6)), latents_of(roll(plain, None, TWO_STEPS, 6)))
    with pytest.raises(InputError, match="without the camera branch"):
        add_camera_branch(grown)


def test_the_published_student():
    rollout = rollout_preset("camera-chunkwise-4step")
    assert (rollout.frames_per_block, rollout.steps) == (4, (1000, 750, 500, 250))
    assert sum(slots_for(rollout, 20)) == 20 and len(path("w*19")) == 20


def test_a_stream_moves_its_camera():
    pytest.importorskip("diffusers")
    pipeline = random_pipeline(
        RolloutConfig((1000,), frames_per_block=2), dtype=torch.float32, device=torch.device("cpu"), camera=True
    )
    cameras, text = path("l*40,w*60").at([0, 0, 40, 100]), random_prompt_embeds("x", pipeline.model.config)
    options = {"num_frames": 13, "height": 32, "width": 48}
    stream = pipeline.stream(prompt_embeds=text, cameras=cameras.at([0]), **options)
    made = [next(stream).pixels]
    stream.set_cameras(cameras.at([2, 3]))
    made = torch.cat([*made, next(stream).pixels], dim=1).int()
    assert (made - pipeline.generate(prompt_embeds=text, cameras=cameras, **options).pixels.int()).abs().max() <= 1
    still = pipeline.generate(prompt_embeds=text, cameras=cameras.at([0]), **options).pixels.int()
    assert torch.equal(made[:, :5], still[:, :5]) and (made - still).abs().max() > 9
