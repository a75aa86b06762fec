"""Two processes with half the batch each train as one with all of it, and what they save is whole."""

import csv
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cfpp_rt.distill import checkpoint
from cfpp_rt.distill.data.shards import Column, ShardWriter
from cfpp_rt.model.weights import load_model
from tests.closeness import assert_close_max
from tests.distill.tiny import SIZES, same, tiny_model

ROOT = Path(__file__).parents[2]
TEXT = {"text_len": 4, "text_dim": 8}
CONFIG = """
model: {{dim: 32, ffn_dim: 64, num_heads: 2, num_layers: 2, freq_dim: 16, patch_size: [1, 2, 2], text_len: 4,
        text_dim: 8}}
layout: {{block: 1, window: 3}}
rollout: {{steps: [1000, 500], window: 3, first_steps: [1000, 750, 500]}}
device: cpu
dtype: {dtype}
negative: {folder}/negative.safetensors
data: {{source: "cfpp_rt.distill.data.data_source:open_data_source", folder: {folder}/clips, seed: 1}}
samples: {{frames: 3, initial_frames: 1}}
stages:
  ar: &common {{steps: 4, batch: {batch}, lr: 1.0e-3, optimizer: {optimizer}, save_every: 2, keep: 9, clip: 0.5,
        accumulate: 2, checkpointing: true, context_noise: 0.3, sample_every: 4}}
  ode: {{steps: 2, batch: {batch}, lr: 1.0e-3, table: 40}}
  cd: {{steps: 4, batch: {batch}, lr: 1.0e-3, save_every: 2, keep: 9, guidance: 3.0, ema: 0.5}}
  dmd: {{steps: 4, batch: {batch}, lr: 1.0e-3, critic_lr: 1.0e-3, save_every: 2, keep: 9, guidance: 4.0, ratio: 2,
        frames: 4, initial_frames: 1, checkpointing: true}}
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    columns = {"latents": Column("float16", (4, 16, 4, 4)), "embeds": Column("bfloat16", (4, 8), trimmed=True)}
    with ShardWriter(folder / "clips", columns, rows_per_shard=4) as writer:
        for _ in range(10):
            clip = torch.randn(4, 16, 4, 4, generator=generator)
            writer.add({"latents": clip, "embeds": torch.randn(4, 8, generator=generator)})
    save_file({"embeds": torch.randn(1, 4, 8, generator=generator)}, folder / "negative.safetensors")
    for name, seed in (("init", 1), ("real", 2)):
        model = tiny_model(seed=seed, **TEXT)
        save_file(model.state_dict(), folder / f"{name}.safetensors")
        (folder / f"{name}.json").write_text("{}")
    return folder


def config_of(data, folder, *, batch, dtype="float32", optimizer="adamw"):
    path = folder / f"{batch}-{dtype}-{optimizer}.yaml"
    path.write_text(CONFIG.format(folder=data, batch=batch, dtype=dtype, optimizer=optimizer))
    return path


def distill(data, config, stage, out, *more, processes=1):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port)]
    weights = ["--init", data / "init.safetensors", "--real", data / "real.safetensors"]
    arguments = ["distill", "--config", config, "--stage", stage, "--out", out, *weights, *more]
    done = subprocess.run(
        [sys.executable, *(torchrun if processes > 1 else []), "-m", "cfpp_rt.cli", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done


def losses(folder):
    with (folder / "log.csv").open() as file:
        return [
            [float(row[name]) for name in row if name.endswith(("loss", "norm")) and row[name]]
            for row in csv.DictReader(file)
        ]


def compare(one, other, tolerance):
    for ours, theirs in zip(losses(one), losses(other), strict=True):
        assert ours == pytest.approx(theirs, rel=tolerance)
    student, wanted = (load_model(folder / "student.safetensors", dtype=torch.float32) for folder in (one, other))
    for (name, ours), theirs in zip(student.named_parameters(), wanted.parameters(), strict=True):
        assert_close_max(ours, theirs, tolerance, name)


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "optimizer"), [("ar", "adamw"), ("ar", "muon"), ("cd", "adamw"), ("dmd", "adamw")])
def test_two_processes_train_as_one_and_resume_exactly(data, tmp_path, stage, optimizer):
    one, two = (config_of(data, tmp_path, batch=batch, optimizer=optimizer) for batch in (4, 2))
    distill(data, one, stage, tmp_path / "one")
    distill(data, two, stage, tmp_path / "two", processes=2)
    compare(tmp_path / "two", tmp_path / "one", 2e-3 if optimizer == "muon" else 2e-4)
    # From the second step on again, in two processes: bit by bit what it was.
    (tmp_path / "parts").mkdir()
    (checkpoint.checkpoints(tmp_path / "two")[2]).rename(tmp_path / "parts" / "step-0000002")
    distill(data, two, stage, tmp_path / "parts", "--resume", processes=2)
    states = [checkpoint.load(checkpoint.checkpoints(tmp_path / name)[4]) for name in ("two", "parts")]
    assert same(*states)
    # And in one: what they saved is whole.
    (tmp_path / "alone").mkdir()
    (checkpoint.checkpoints(tmp_path / "parts")[2]).rename(tmp_path / "alone" / "step-0000002")
    distill(data, one, stage, tmp_path / "alone", "--resume")
    alone = checkpoint.load(checkpoint.checkpoints(tmp_path / "alone")[4])
    assert alone["position"] == states[0]["position"] and torch.equal(alone["draws"], states[0]["draws"])
    for name, tensor in alone["networks"]["student"].items():
        assert_close_max(tensor, states[0]["networks"]["student"][name], 2e-3 if optimizer == "muon" else 2e-4, name)


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["ar", "dmd"])
def test_bfloat16_is_the_same_arithmetic_sharded_or_not(data, tmp_path, stage):
    one, two = (config_of(data, tmp_path, batch=batch, dtype="bfloat16") for batch in (4, 2))
    distill(data, one, stage, tmp_path / "one")
    distill(data, two, stage, tmp_path / "two", processes=2)
    for ours, theirs in zip(losses(tmp_path / "two"), losses(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(theirs, rel=0.05)
    state = checkpoint.load(checkpoint.checkpoints(tmp_path / "two")[4])
    assert {t.dtype for t in [*state["networks"]["student"].values(), *state["ema"].values()]} == {torch.float32}


def test_the_sizes_here_are_those_of_the_tiny_model():
    assert tiny_model(**TEXT).config.dim == SIZES["dim"] == 32
