"""Rollouts driven through the graphs in onnxruntime, without torch, against PyTorch and the published latents."""

import subprocess
import sys

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.onnx_runner import OnnxRunner
from cfpp_rt.export.runner import Buffer
from cfpp_rt.export.torch_oracle import fixed_inputs
from cfpp_rt.model.transformer import random_model
from cfpp_rt.model.weights import build_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import empty_prompt_embeds
from tests import plain_model
from tests.export.students import bytes_moved
from tests.test_actions import ACTING
from tests.test_rollout import ROLLOUTS, settings_of


@pytest.fixture(scope="module")
def runner_of(model, meta, tmp_path_factory):
    """The runner of a golden rollout's settings, exported once."""
    made = {}

    def get(name):
        if name not in made:
            entry, folder = meta[name], tmp_path_factory.mktemp("bundle") / name
            frames = entry["frames"] + (2 if name.startswith("i2v") else 0)
            settings = settings_of(entry, meta["shift"])
            export_onnx(model, settings, folder, latent_size=tuple(meta["latent_hw"]), latent_frames=frames)
            made[name] = OnnxRunner(folder, threads=1)
        return made[name]

    return get


def roll(runner, vectors, name, refresh):
    noise, initial = vectors[f"{name}.noise"].numpy(), vectors.get(f"{name}.initial")
    given = [] if initial is None else [initial.numpy()]
    rollout = BundleRollout(
        runner,
        vectors["prompt_embeds"].numpy(),
        latent_frames=noise.shape[1] + sum(part.shape[1] for part in given),
        initial_latents=given[0] if given else None,
        noise=noise,
        renoise=[part.numpy() for part in vectors[f"{name}.renoise"]],
        refresh=refresh,
    )
    return np.concatenate([*given, *(block.values for block in rollout)], axis=1)


@pytest.mark.parametrize("refresh", ["fused", "separate"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_latents_equal_the_published_implementation(runner_of, vectors, name, refresh):
    latents = roll(runner_of(name), vectors, name, refresh)
    torch.testing.assert_close(torch.from_numpy(latents), vectors[f"{name}.latents"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["framewise_2step_window", "chunkwise_4step"])
def test_float16_errs_at_most_twice_as_much_as_plain_pytorch(weights, config, vectors, meta, name, tmp_path):
    """float64 recomputation is the oracle, plain PyTorch in float16 the measure."""
    settings, schedule = settings_of(meta[name], meta["shift"], "fused"), FlowMatchSchedule(meta["shift"])

    def plain(dtype):
        return plain_model.rollout(
            weights,
            config,
            settings,
            vectors[f"{name}.noise"],
            vectors[f"{name}.renoise"],
            vectors["prompt_embeds"],
            schedule.warp(settings.steps).tolist(),
            schedule.warp(settings.first_steps or settings.steps).tolist(),
            lambda t: schedule.sigma(t).item(),
            dtype,
        ).double()

    half = build_model(weights, config, dtype=torch.float16, device="cpu")
    frames = vectors[f"{name}.noise"].shape[1]
    export_onnx(half, settings, tmp_path / "half", latent_size=tuple(meta["latent_hw"]), latent_frames=frames)
    ours = torch.from_numpy(roll(OnnxRunner(tmp_path / "half", threads=1), vectors, name, "fused")).double()
    oracle = plain(torch.float64)
    error, allowed = (ours - oracle).abs(), (plain(torch.float16) - oracle).abs()
    assert error.max() <= 2 * allowed.max() and error.mean() <= 2 * allowed.mean()


@pytest.fixture(scope="module")
def acting(tmp_path_factory):
    """A model with actions and without text, two rows, and its bundle with a window."""
    model = random_model(ACTING, seed=0, dtype=torch.float32)
    folder = tmp_path_factory.mktemp("acting") / "bundle"
    export_onnx(model, ACTING_RUN, folder, latent_size=(4, 4), latent_frames=None, batch=2)
    return model, OnnxRunner(folder, threads=1)


ACTING_RUN = RolloutConfig(steps=(1000, 500), window=4, sinks=1)


@pytest.mark.parametrize("refresh", ["fused", "separate", "skip"])
def test_actions_and_seeds_are_those_of_the_runtime(acting, refresh):
    """Drawn noise, an action per row, no end: through the wrap of the ring, twice."""
    model, runner = acting
    text = empty_prompt_embeds(2, ACTING.text_dim)
    theirs = Rollout(
        model, text, ACTING_RUN.replace(refresh=refresh), latent_size=(4, 4), latent_frames=None, seed=[3, 5]
    )
    ours = BundleRollout(runner, latent_frames=None, seed=[3, 5], refresh=refresh)
    for frame, action in enumerate([0, 1, [1, 2], 2, 0, [[2], [1]], 1, 1, 0, 2]):
        for rollout in (ours, theirs):
            rollout.set_actions(action)
        wanted, made = next(theirs), next(ours)
        assert made.start == wanted.start == frame
        torch.testing.assert_close(torch.from_numpy(made.values), wanted.values, rtol=0, atol=1e-4)


def test_refresh_may_run_early(acting):
    _, runner = acting
    plain = [block.values for block in BundleRollout(runner, latent_frames=8)]
    rollout, early = BundleRollout(runner, latent_frames=8), []
    for block in rollout:
        early.append(block.values)
        rollout.refresh()
    np.testing.assert_allclose(np.concatenate(early, 1), np.concatenate(plain, 1), rtol=0, atol=1e-4)
    assert not rollout.waits_for_refresh


def test_a_switched_prompt_is_that_of_the_runtime(runner_of, model, vectors, meta):
    name = "framewise_2step_window"
    other = np.ones(vectors["prompt_embeds"].shape, np.float32)
    ours = BundleRollout(runner_of(name), vectors["prompt_embeds"].numpy(), latent_frames=8)
    theirs = Rollout(
        model,
        vectors["prompt_embeds"],
        settings_of(meta[name], meta["shift"], "separate"),
        latent_size=tuple(meta["latent_hw"]),
        latent_frames=8,
    )
    made = []
    for rollout, prompt in ((ours, other), (theirs, torch.from_numpy(other))):
        blocks = [next(rollout) for _ in range(5)]
        rollout.set_prompt(prompt)
        made.append(np.concatenate([np.asarray(block.values) for block in [*blocks, *rollout]], axis=1))
    np.testing.assert_allclose(made[0], made[1], rtol=0, atol=1e-4)


def test_caches_are_updated_in_place(acting, capfd, monkeypatch):
    """onnxruntime warns of every cache that it copies; the arrays bound at the start are the ones that change."""
    monkeypatch.setattr("cfpp_rt.export.onnx_runner.LOG_SEVERITY", 2)
    runner = OnnxRunner(acting[1].bundle, threads=1)
    rollout = BundleRollout(runner, latent_frames=7)
    caches = {name: (buffer, buffer.array.copy()) for name, buffer in rollout.caches.items()}
    for _ in rollout:
        rollout.set_actions(1)
    assert all(rollout.caches[name] is buffer and (buffer.array != old).any() for name, (buffer, old) in caches.items())
    assert "TensorScatter" not in capfd.readouterr().err
    session = runner.session("step")
    session._session.run(None, fixed_inputs(runner.card, session.spec))
    assert "copying past_cache" in capfd.readouterr().err, "and it does warn where it copies"


def test_no_cache_travels_between_passes(acting, monkeypatch):
    """What is handed to onnxruntime or taken from it for one block is latents, velocity and small numbers."""
    _, runner = acting
    rollout = BundleRollout(runner, latent_frames=8)
    for _ in range(6):
        next(rollout)
    moved = []
    monkeypatch.setattr(
        "cfpp_rt.export.bundle_rollout.Buffer", lambda array: moved.append(array.nbytes) or Buffer(array)
    )
    next(rollout)
    velocities = 2 * rollout._velocity.array.nbytes
    assert sum(moved) + velocities == bytes_moved(runner.card, "fused", "step", resident=("modulation",))
    assert sum(moved) < rollout.caches["keys.0"].array.nbytes


def test_nan_in_a_cache_is_reported(acting):
    _, runner = acting
    rollout = BundleRollout(runner, latent_frames=8)
    next(rollout), next(rollout)
    rollout.caches["values.1"].array[0, 0, 0, 0] = np.nan  # frame 0, whose clean pass has been
    with pytest.raises(NonFiniteError, match="latent frame 2, step 1"):
        next(rollout)
    with pytest.raises(InputError, match="broke off at latent frame 2: start another"):
        next(rollout)


def test_a_slot_out_of_bounds_is_refused_before_anything_is_written(acting, monkeypatch):
    _, runner = acting
    rollout = BundleRollout(runner, latent_frames=8)
    before = {name: buffer.array.copy() for name, buffer in rollout.caches.items()}
    monkeypatch.setattr(FrameRing, "slot", lambda ring, frame: frame + 4)
    monkeypatch.setattr(FrameRing, "write", lambda ring, start: start)
    monkeypatch.setattr(BundleRollout, "_claim_slots", lambda self, group: {"valid": np.full(2, 16, np.int64)})
    with pytest.raises(InputError, match=r"step: write_index must be in 0..12, got \[16, 16\]"):
        next(rollout)
    assert all((rollout.caches[name].array == old).all() for name, old in before.items())


@pytest.mark.parametrize(
    "options,message",
    [
        ({"latent_frames": 0}, "latent_frames must be a multiple >= 1"),
        ({"latent_frames": 3, "seed": [1]}, "seed must be one integer or 2 of them"),
        ({"latent_frames": 3, "noise": np.zeros((2, 2, 16, 4, 4))}, "noise must cover the 3 generated frames, got 2"),
        ({"latent_frames": 3, "noise": np.zeros((1, 3, 16, 4, 4))}, r"noise must be \[B=2, F, 16, 4, 4\]"),
        ({"latent_frames": 3, "initial_latents": np.full((2, 1, 16, 4, 4), np.nan)}, "initial_latents must be finite"),
        ({"latent_frames": 1, "initial_latents": np.zeros((2, 1, 16, 4, 4))}, "fewer than latent_frames=1, got 1"),
        (
            {"latent_frames": 3, "prompt_embeds": np.zeros((2, 3, 5))},
            "prompt_embeds must not be given to a model without text",
        ),
        ({"latent_frames": 3, "refresh": "never"}, "refresh must be fused, separate or skip"),
    ],
)
def test_bad_arguments_are_named(acting, options, message):
    with pytest.raises(InputError, match=message):
        BundleRollout(acting[1], **options)


@pytest.mark.parametrize("actions", [3, -1, [0, 1, 2], 1.0, [[0], [5]]])
def test_bad_actions_are_refused(acting, actions):
    with pytest.raises(InputError, match="actions must be integers in 0..2"):
        BundleRollout(acting[1], latent_frames=2).set_actions(actions)


def test_a_bundle_without_a_window_holds_so_many_frames(runner_of, vectors):
    embeds = vectors["prompt_embeds"].numpy()
    with pytest.raises(InputError, match="latent_frames must be <= 5, what the bundle was exported for, got 6"):
        BundleRollout(runner_of("framewise_2step"), embeds, latent_frames=6)
    with pytest.raises(InputError, match="latent_frames must be given"):
        BundleRollout(runner_of("framewise_2step"), embeds, latent_frames=None)
    with pytest.raises(InputError, match="prompt_embeds must be given and finite"):
        BundleRollout(runner_of("framewise_2step"), latent_frames=2)


def test_the_runner_needs_no_torch(acting):
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'onnx', 'safetensors'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from cfpp_rt.export.bundle_rollout import BundleRollout\n"
        "from cfpp_rt.export.onnx_runner import OnnxRunner\n"
        f"rollout = BundleRollout(OnnxRunner({str(acting[1].bundle.folder)!r}, threads=1), latent_frames=6, seed=3)\n"
        "rollout.set_actions(2)\n"
        "print(sum(float(abs(block.values).sum()) for block in rollout))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rollout = BundleRollout(acting[1], latent_frames=6, seed=3)
    rollout.set_actions(2)
    here = sum(float(abs(block.values).sum()) for block in rollout)
    assert float(done.stdout) == pytest.approx(here, rel=1e-5)


def test_a_refused_control_leaves_the_rollout_alive(acting, runner_of, vectors):
    embeds = vectors["prompt_embeds"].numpy()
    refused = [embeds * np.nan, embeds.astype(np.float64) * 1e300, embeds.astype(np.int64), embeds > 0, embeds[:, :1]]

    def run(prompts, actions):
        acted, prompted = (
            BundleRollout(acting[1], latent_frames=4),
            BundleRollout(runner_of("framewise_2step_window"), embeds, latent_frames=4),
        )
        made = [next(acted).values, next(prompted).values]
        for given in actions:
            with pytest.raises(InputError, match="actions must be integers in 0..2"):
                acted.set_actions(given)
        for given in prompts:
            with pytest.raises(InputError, match="embeds must be"):
                prompted.set_prompt(given)
        return [*made, *(block.values for rollout in (acted, prompted) for block in rollout)]

    plain, steered = run([], []), run(refused, [True, np.True_, [True, False], [[0], [1, 2]]])
    assert all(np.array_equal(a, b) for a, b in zip(plain, steered, strict=True))
