"""The published configs build and take a step of every stage; guidance reaches the teachers; samples are written."""

import dataclasses
import re
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from cfpp_rt.config import MODELS, PRESETS, ModelConfig
from cfpp_rt.distill.assemble import InitPaths, build_stage, guidance_of
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.command import latent_size
from cfpp_rt.distill.forward import Condition
from cfpp_rt.distill.log import Log
from cfpp_rt.distill.samples import Samples, open_codec
from cfpp_rt.distill.self_rollout import SelfRollout
from cfpp_rt.distill.settings import SampleSettings, Settings
from cfpp_rt.distill.train import Trainer
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.values import DTYPES
from tests.distill.tiny import SIZES, tiny_model

CONFIGS = Path(__file__).parents[2] / "configs"
WAN = ("wan-1.3b-framewise", "wan-1.3b-chunkwise")
TEXT = {"text_len": 4, "text_dim": 8}
STAGES = ("ar", "ode", "cd", "dmd")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    generator = torch.Generator().manual_seed(0)
    save_file({"embeds": torch.randn(1, 4, 8, generator=generator)}, folder / "negative.safetensors")
    save_file(tiny_model(seed=1, **TEXT).state_dict(), folder / "init.safetensors")
    save_file(tiny_model(seed=2, num_layers=3, **TEXT).state_dict(), folder / "real.safetensors")
    return folder


def small(name, files):
    """The config with tiny networks and short clips; all else as it stands."""
    settings = Settings.read(CONFIGS / f"{name}.yaml")
    model = ModelConfig(**SIZES, **TEXT)
    stages = {key: dataclasses.replace(own, frames=6, steps=1) for key, own in settings.stages.items()}
    return dataclasses.replace(
        settings,
        model=model,
        real=dataclasses.replace(model, num_layers=3),
        negative=str(files / "negative.safetensors"),
        latent_size=(16, 4, 4),
        stages=stages,
    )


def paths_of(files, **more):
    return InitPaths(init=files / "init.safetensors", real=files / "real.safetensors", **more)


def batch_of(number):
    generator = torch.Generator().manual_seed(number)
    clip, states = torch.randn(1, 6, 16, 4, 4, generator=generator), torch.randn(1, 5, 6, 16, 4, 4, generator=generator)
    return Batch(Condition(torch.randn(1, 4, 8, generator=generator)), clip, states)


@pytest.mark.parametrize("name", WAN)
@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_of_the_published_configs_takes_a_step(files, tmp_path, name, stage):
    settings = small(name, files)
    critic = files / "init.safetensors" if stage == "dmd" else None
    built = build_stage(stage, settings, paths_of(files, critic=critic), (16, 4, 4))
    assert settings.dtype == "bfloat16"
    trainer = Trainer(stage, built, settings.stages[stage], batch_of, tmp_path / "out", dtype=DTYPES[settings.dtype])
    before = {name: p.clone() for name, p in trainer.masters["student"].module.named_parameters()}
    trainer.run(lambda text: None)
    after = dict(trainer.masters["student"].module.named_parameters())
    assert any(not torch.equal(before[name], after[name]) for name in before)
    assert {p.dtype for p in after.values()} == {torch.float32}
    if stage == "dmd":
        assert built.guidance.weight == 4.0 and {p.dtype for p in built.real.network.parameters()} == {torch.bfloat16}
        assert built.real.network.config.num_layers == 3 and built.critic.network.config.num_layers == 2
    if stage == "cd":
        assert built.guidance.weight == 3.0 and len(built.timesteps) == 48


@pytest.mark.parametrize("name", WAN)
def test_the_published_configs_are_of_the_published_model(name):
    settings = Settings.read(CONFIGS / f"{name}.yaml")
    assert settings.model == MODELS["wan-1.3b"] and settings.real == MODELS["wan-14b"]
    student = PRESETS["framewise-2step" if name == WAN[0] else "chunkwise-4step"]
    assert settings.rollout == student and settings.layout.block == student.frames_per_block
    with torch.device("meta"):
        network = CausalWanTransformer(settings.model)
    assert sum(p.numel() for p in network.parameters()) == 1_418_996_800
    rows = network.config.tokens_per_frame(*settings.latent_size[1:])
    assert rows == 1560 and set(settings.stages) == set(STAGES)


@pytest.mark.parametrize("name", WAN)
def test_every_key_of_the_published_configs_names_its_source(name):
    for line in (CONFIGS / f"{name}.yaml").read_text().splitlines():
        if re.fullmatch(r"(  )*[a-z_]+:", line) or not line or line.startswith("#"):
            continue  # a section, whose keys name theirs
        if re.match(r"(  codec|  frames|      source|  source):", line):
            continue  # below a section that names it
        assert re.search(r"# .*\[(paper|code|cf|ours)\]", line), line


def test_guidance_needs_its_negative_prompt_and_a_teacher(files):
    settings = small(WAN[0], files)
    weights = paths_of(files)
    without = dataclasses.replace(settings, negative=None)
    for stage in ("cd", "dmd"):
        with pytest.raises(InputError, match="negative must be a file with embeds of the negative prompt"):
            build_stage(stage, without, weights, (16, 4, 4))
    wrong = files / "wrong.safetensors"
    save_file({"embeds": torch.zeros(1, 3, 8)}, wrong)
    with pytest.raises(InputError, match=r"wanted embeds \[1, 4, 8\] of a model with text, got \[1, 3, 8\]"):
        guidance_of(dataclasses.replace(settings, negative=str(wrong)), settings.stages["cd"])
    guided = {"ar": dataclasses.replace(settings.stages["ar"], guidance=2.0)}
    with pytest.raises(InputError, match="stages.ar.guidance must be 1, since it has no teacher"):
        build_stage("ar", dataclasses.replace(settings, stages=guided), weights, (16, 4, 4))


def test_guidance_changes_what_the_student_is_drawn_to(files, tmp_path):
    norms = {}
    for weight in (1.0, 3.0, 9.0):
        settings = small(WAN[0], files)
        own = dataclasses.replace(settings.stages["cd"], guidance=weight)
        settings = dataclasses.replace(settings, stages={"cd": own}, dtype="float32")
        stage = build_stage("cd", settings, paths_of(files), (16, 4, 4))
        norms[weight] = Trainer("cd", stage, own, batch_of, tmp_path)._one_step()["student_norm"]
    assert norms[1.0] != norms[3.0] and norms[3.0] != norms[9.0]


class Upscaler:
    """A codec of three of the channels."""

    def decode(self, latents):
        return latents[:, :, :3].repeat_interleave(8, 3).repeat_interleave(8, 4).tanh()


def samples_of(files, folder, codec):
    settings = small(WAN[0], files)
    batch = batch_of(0)
    batch = dataclasses.replace(
        batch,
        condition=Condition(batch.condition.prompt_embeds.expand(2, -1, -1)),
        latents=batch.latents.expand(2, *[-1] * 4),
    )
    network = tiny_model(seed=1, **TEXT)
    return Samples(
        network,
        settings.rollout,
        batch,
        folder,
        latent_frames=5,
        latent_size=(16, 4, 4),
        initial_latent_frames=1,
        codec=codec,
    )


def test_samples_without_a_codec_are_latents_and_the_same_every_time(files, tmp_path):
    samples = samples_of(files, tmp_path / "s", None)
    path = samples(10)
    latents = load_file(path)["latents"]
    assert path.name == "step-0000010.safetensors" and latents.shape == (2, 5, 16, 4, 4)
    assert torch.equal(latents[:, 0], batch_of(0).latents[:, 0].expand(2, -1, -1, -1))
    assert not torch.equal(latents[0, 1:], latents[1, 1:])  # each has noise of its own
    assert torch.equal(load_file(samples(20))["latents"], latents)
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == [
        "step-0000010.safetensors",
        "step-0000020.safetensors",
    ]
    assert not samples(30, write=False).exists()
    assert isinstance(samples.rollout, SelfRollout)


def test_samples_with_a_codec_are_a_video(files, tmp_path):
    av = pytest.importorskip("av")
    path = samples_of(files, tmp_path / "s", Upscaler())(3)
    with av.open(str(path)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(frames) == 5 and frames[0].shape == (32, 64, 3)  # both clips, side by side


def test_samples_need_av_before_training_begins(files, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cfpp-rt\[video\]'"):
        samples_of(files, tmp_path, Upscaler())


def test_the_codec_is_the_settings_or_the_data_sources(tmp_path):
    class DataSource:
        codec = Upscaler()

    assert open_codec(SampleSettings(), DataSource(), torch.device("cpu")) is DataSource.codec
    assert open_codec(SampleSettings(), batch_of, torch.device("cpu")) is None
    named = SampleSettings(codec="tests.distill.test_assemble:Upscaler")
    assert type(open_codec(named, DataSource(), torch.device("cpu"))).__name__ == "Upscaler"
    with pytest.raises(InputError, match="samples.codec must be a path or module:function"):
        open_codec(SampleSettings(codec="nowhere:x"), DataSource(), torch.device("cpu"))


def test_tensorboard_is_optional_and_named_where_it_is_missing(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = Log(tmp_path, 0, tensorboard=True)
    for step in (1, 2):
        log.add(step, {"student_loss": 0.5 * step})
    log.flush()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("student_loss")] == [(1, 0.5), (2, 1.0)]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'cfpp-rt\[tensorboard\]'"):
        Log(tmp_path, 0, tensorboard=True)


def test_the_size_of_latents_comes_from_the_data_or_the_settings(files):
    settings, batch = small(WAN[0], files), batch_of(0)
    prompts = dataclasses.replace(batch, latents=None, trajectory=None)
    assert latent_size(settings, batch) == latent_size(settings, prompts) == (16, 4, 4)
    unknown = dataclasses.replace(settings, latent_size=None)
    assert latent_size(unknown, batch) == (16, 4, 4)
    with pytest.raises(InputError, match="latent_size must be given"):
        latent_size(unknown, prompts)
    with pytest.raises(InputError, match=r"latent_size must be \[16, 4, 4\] as the data, got \(16, 60, 104\)"):
        latent_size(dataclasses.replace(settings, latent_size=(16, 60, 104)), batch)
