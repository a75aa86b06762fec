"""The trainer: a run that was killed goes on as if it had not been, and what fails leaves the last checkpoint whole."""

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cfpp_rt.distill import checkpoint
from cfpp_rt.distill.assemble import fresh_model
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.optim import learning_rate_share, make_optimizers, update_ema
from cfpp_rt.distill.settings import Settings, StageSettings
from cfpp_rt.distill.train import Trainer
from cfpp_rt.errors import CheckpointError, InputError, NonFiniteError
from cfpp_rt.model.weights import load_model
from cfpp_rt.world.data_source import record
from cfpp_rt.world.student import load_world_pipeline
from tests.distill.tiny import same

CONFIG = """
model: {dim: 32, ffn_dim: 64, num_heads: 2, num_layers: 1, freq_dim: 16, text_dim: 1, text_len: 0, num_actions: 6,
        patch_size: [1, 1, 1]}
layout: {block: 1, window: 3}
rollout: {steps: [1000, 500], window: 3}
data: {source: "cfpp_rt.world.data_source:open_data_source", seed: 1, frames: 3}
stages:
  base: &common {steps: 4, batch: 2, lr: 1.0e-3, optimizer: muon, betas: [0.9, 0.99], save_every: 2, keep: 9}
  ar: {steps: 20, batch: 2, lr: 1.0e-3, optimizer: muon, save_every: 5, keep: 9, context_noise: 0.2, log_every: 1}
  cd: *common
  dmd: {steps: 4, batch: 2, lr: 1.0e-3, optimizer: muon, save_every: 2, frames: 3, initial_frames: 1, ratio: 2}
"""
# Fitting the codec simulates half a minute of episodes; a small one is enough here.
RUN = (
    "import sys, functools, cfpp_rt.world.data_source as source;"
    "source.fit_codec = functools.partial(source.fit_codec, episodes=32, num_frames=24);"
    "from cfpp_rt.cli.main import main; sys.exit(main(sys.argv[1:]))"
)


@pytest.fixture
def config(tmp_path):
    path = tmp_path / "tiny.yaml"
    path.write_text(CONFIG)
    return path


def command(config, stage, out, *more):
    arguments = ["distill", "--config", str(config), "--stage", stage, "--out", str(out), *map(str, more)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", RUN, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=Path(__file__).parents[2],
    )


def finish(process):
    out, err = process.communicate(timeout=120)
    return process.returncode, out, err


def newest(folder):
    step, path = list(checkpoint.checkpoints(folder).items())[-1]
    return step, checkpoint.load(path)


def test_twenty_steps_equal_ten_a_kill_and_ten_more(config, tmp_path):
    assert finish(command(config, "ar", tmp_path / "whole"))[0] == 0
    killed = command(config, "ar", tmp_path / "parts")
    while 10 not in checkpoint.checkpoints(tmp_path / "parts"):
        time.sleep(0.01)
        assert killed.poll() is None, killed.communicate()
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    for path in list(checkpoint.checkpoints(tmp_path / "parts").values())[2:]:  # what it made after the tenth step
        (path / "state.pt").unlink()
    code, _, err = finish(command(config, "ar", tmp_path / "parts", "--resume"))
    assert code == 0, err
    (step, whole), (again, parts) = newest(tmp_path / "whole"), newest(tmp_path / "parts")
    assert step == again == 20 and same(whole, parts)
    logs = [list(csv.DictReader((tmp_path / name / "log.csv").open())) for name in ("whole", "parts")]
    assert [row["student_loss"] for row in logs[0]] == [row["student_loss"] for row in logs[1]]
    assert len(logs[0]) == 20


def test_every_stage_runs_from_the_one_before_it(config, tmp_path):
    student = [tmp_path / stage / "student.safetensors" for stage in ("ar", "base", "cd", "dmd")]
    steps = [
        ("ar", []),
        ("base", ["--init", student[0]]),
        ("cd", ["--init", student[0]]),
        ("dmd", ["--init", student[2], "--real", student[1]]),
    ]
    for stage, more in steps:
        code, out, err = finish(command(config, stage, tmp_path / stage, *more))
        assert code == 0, err
        assert f"stage {stage}" in out
    before, after = (load_model(path, dtype=torch.float32).state_dict() for path in (student[2], student[3]))
    assert any(not torch.equal(before[name], after[name]) for name in before)


def test_samples_of_the_world_are_videos_of_its_arenas(config, tmp_path):
    av = pytest.importorskip("av")
    with_samples = (
        CONFIG.replace("steps: 20,", "steps: 2, sample_every: 2,") + "samples: {initial_frames: 1, fps: 10}\n"
    )
    config.write_text(with_samples)
    code, _, err = finish(command(config, "ar", tmp_path / "out"))
    assert code == 0, err
    with av.open(str(tmp_path / "out" / "samples" / "step-0000002.mp4")) as video:
        frames = [frame.to_ndarray(format="rgb24") for frame in video.decode(video=0)]
    assert len(frames) == 3 and frames[0].shape == (48, 2 * 48, 3)  # the batch's two clips side by side
    given, _, _ = record(1, 0, 2, 3)
    shown = np.concatenate([given[0, 0], given[1, 0]], axis=1)
    assert np.abs(frames[0].astype(float) - shown).mean() < 12  # of 255: the video codec's and the patch codec's loss


def test_a_termination_signal_saves_and_leaves(config, tmp_path):
    running = command(config, "ar", tmp_path / "out")
    while not checkpoint.checkpoints(tmp_path / "out"):
        time.sleep(0.01)
        assert running.poll() is None, running.communicate()
    running.send_signal(signal.SIGTERM)
    code, _, _ = finish(running)
    step, _ = newest(tmp_path / "out")
    assert code in (0, 143) and (code == 0) == (step == 20)
    code, _, err = finish(command(config, "ar", tmp_path / "out"))
    assert code == 2 and "contains a run already" in err


def trainer_of(tmp_path, losses, **settings):
    model = fresh_model(Settings.read(tmp_path / "tiny.yaml").model, 0).requires_grad_(True)

    class Constant:
        trained = {"student": model}
        ema = fresh_model(model.config, 0)

        def updates(self, next_batch, generator, step):
            next_batch()
            yield "student", losses[step] * sum(p.sum() for p in model.parameters())

    own = StageSettings(steps=len(losses), save_every=1, **settings)
    return Trainer("ar", Constant(), own, lambda position: Batch(None), tmp_path / "out")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_stops_before_a_weight_changes(config, tmp_path, bad):
    trainer = trainer_of(tmp_path, [1.0, 1.0, bad])
    with pytest.raises(NonFiniteError, match="stage ar, step 3: the loss of student is"):
        trainer.run(lambda text: None)
    step, state = newest(tmp_path / "out")
    assert step == 2 and same(state["networks"]["student"], trainer.stage.trained["student"].state_dict())


def test_a_full_disk_leaves_the_last_checkpoint_and_no_trace(config, tmp_path, monkeypatch):
    trainer = trainer_of(tmp_path, [1.0, 1.0])
    trainer.step = 1
    trainer.save()
    before = sorted(path.name for path in (tmp_path / "out").iterdir())

    def full(state, file):
        file.write(b"half of it")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch, "save", full)
    trainer.step = 2
    with pytest.raises(InputError, match="step-0000002: the checkpoint cannot be written .No space left"):
        trainer.save()
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == before
    assert newest(tmp_path / "out")[0] == 1


def test_a_broken_checkpoint_is_named(config, tmp_path):
    trainer = trainer_of(tmp_path, [1.0])
    with pytest.raises(InputError, match="found none"):
        trainer.resume()
    path = trainer.save() / "state.pt"
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(CheckpointError, match="state.pt"):
        trainer.resume()


def test_only_the_newest_checkpoints_are_kept(config, tmp_path):
    trainer_of(tmp_path, [1.0] * 5, keep=2).run(lambda text: None)
    assert list(checkpoint.checkpoints(tmp_path / "out")) == [4, 5]


def test_moving_average_and_learning_rate(config, tmp_path):
    model = fresh_model(Settings.read(config).model, 0)
    ema = fresh_model(model.config, 0)
    with torch.no_grad():
        model.head.head.weight.fill_(1)
    settings = StageSettings(steps=100, ema=0.75, ema_start=1, warmup=10, decay=0.1)
    update_ema(ema, model, 5, settings)
    assert ema.head.head.weight.unique().tolist() == [0.25]
    update_ema(ema, model, 0, settings)
    assert ema.head.head.weight.unique().tolist() == [1.0]
    first, peak, last = (learning_rate_share(step, settings) for step in (0, 10, 99))
    assert first == 0.1 and peak == 1 and abs(last - 0.1) < 1e-3


def test_muon_takes_the_matrices_of_the_blocks_and_adamw_the_rest(config):
    model = fresh_model(Settings.read(config).model, 0).requires_grad_(True)
    adamw, muon = make_optimizers(model, StageSettings(steps=1, optimizer="muon"), 1e-3)
    matrices = {id(p) for p in muon.param_groups[0]["params"]}
    assert matrices == {id(p) for name, p in model.blocks.named_parameters() if p.ndim == 2}
    assert len(matrices) + len(adamw.param_groups[0]["params"]) == len(list(model.parameters()))


BAD = {
    "unknown key": ("steps: 20,", "stepz: 20,", "stages.ar has unknown keys stepz"),
    "wrong type": (
        "lr: 1.0e-3, optimizer: muon, save_every: 5",
        "lr: fast, save_every: 5",
        "stages.ar.lr must be float",
    ),
    "out of range": ("context_noise: 0.2", "context_noise: 2", "stages.ar.context_noise must be a number in 0..1"),
    "missing": ("rollout: {steps: [1000, 500], window: 3}\n", "", "the config must have rollout"),
    "model": ("dim: 32,", "dim: 33,", "model.dim must be num_heads"),
    "rollout": ("[1000, 500]", "[500, 1000]", "rollout.steps must be descending"),
    "source": (
        "cfpp_rt.world.data_source:open_data_source",
        "cfpp_rt.nowhere:x",
        "data.source must be module:function",
    ),
    "data": ("seed: 1, frames", "sead: 1, frames", "data: "),
    "not YAML": ("model: {", "model: [", "not YAML"),
}


@pytest.mark.parametrize(("old", "new", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_config_is_one_line_and_leaves_nothing(config, tmp_path, capsys, old, new, message):
    from cfpp_rt.cli.main import main

    assert old in CONFIG
    config.write_text(CONFIG.replace(old, new))
    assert main(["distill", "--config", str(config), "--stage", "ar", "--out", str(tmp_path / "out")]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_missing_inputs_of_a_stage_are_named(config, tmp_path, capsys, monkeypatch):
    import functools

    from cfpp_rt.cli.main import main
    from cfpp_rt.world import data_source

    monkeypatch.setattr(data_source, "fit_codec", functools.partial(data_source.fit_codec, episodes=32, num_frames=24))
    for stage, message in (("cd", "--init must be given"), ("dmd", "--init must be given"), ("ode", "must have ode")):
        assert main(["distill", "--config", str(config), "--stage", stage, "--out", str(tmp_path / "out")]) == 2
        assert message in capsys.readouterr().err


def test_the_world_config_is_whole(config):
    settings = Settings.read(Path(__file__).parents[2] / "configs" / "world.yaml")
    assert set(settings.stages) == {"base", "ar", "cd", "dmd"} and settings.rollout.window == settings.layout.window


def test_configs_with_earlier_names_of_data_sources_load(config):
    config.write_text(CONFIG.replace("world.data_source:open_data_source", "world.feed:open_feed"))
    assert Settings.read(config).data["source"] == "cfpp_rt.world.data_source:open_data_source"
    stored = '{source: "cfpp_rt.distill.data.feed:open_feed", folder: clips}'
    config.write_text(CONFIG.replace("ar: {steps: 20,", f"ar: {{steps: 20, data: {stored},"))
    assert Settings.read(config).stages["ar"].data == {
        "source": "cfpp_rt.distill.data.data_source:open_data_source",
        "folder": "clips",
    }


def test_a_student_without_its_files_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="student"):
        load_world_pipeline(tmp_path)
