"""The command `cfpp distill`: train one stage of the pipeline."""

import argparse
import dataclasses
import json
import signal
from pathlib import Path

import torch
from torch import Tensor

from cfpp_rt.device.peak import peak_matmul_flops
from cfpp_rt.device.threads import largest_product, set_thread_count
from cfpp_rt.distill.assemble import InitPaths, build_stage, open_data_source
from cfpp_rt.distill.batch import Batch, DataSource
from cfpp_rt.distill.checkpoint import checkpoints
from cfpp_rt.distill.flops import step_flops
from cfpp_rt.distill.processes import full_state, process_group, rank
from cfpp_rt.distill.samples import Samples, open_codec
from cfpp_rt.distill.settings import STAGES, Settings, StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.distill.train import StepCost, Trainer
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.values import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="training config, as those in configs/")
    parser.add_argument("--stage", required=True, choices=STAGES, help="base: for models without a pretrained base")
    parser.add_argument(
        "--out", required=True, metavar="DIR", help="folder of checkpoints, log.csv and the finished student"
    )
    parser.add_argument("--init", metavar="FILE", type=Path, help="initial weights of the student")
    parser.add_argument(
        "--teacher", metavar="FILE", type=Path, help="stage cd: weights of the teacher (default: --init)"
    )
    parser.add_argument("--real", metavar="FILE", type=Path, help="stage dmd: weights of the bidirectional model")
    parser.add_argument(
        "--critic", metavar="FILE", type=Path, help="stage dmd: initial weights of the critic (default: --real)"
    )
    parser.add_argument("--resume", action="store_true", help="continue from the newest checkpoint in --out")


def run(arguments: argparse.Namespace) -> None:
    settings, folder = Settings.read(arguments.config), Path(arguments.out)
    name = arguments.stage
    if name not in settings.stages:
        raise InputError(f"{arguments.config}: stages must have {name}, got {', '.join(settings.stages)}")
    if not arguments.resume and checkpoints(folder):
        raise InputError(f"--out {folder} contains a run already: give --resume to continue it, or another folder")
    with process_group(settings.device) as device:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where float32 remains, as published
        _train(name, settings, folder, arguments, device)


def _train(name: str, settings: Settings, folder: Path, arguments: argparse.Namespace, device: torch.device) -> None:
    stage_settings = settings.stages[name]
    data_source = open_data_source(settings, stage_settings)
    first = data_source(0)
    size = latent_size(settings, first)
    latent_frames = 2 * stage_settings.batch * _clip_frames(stage_settings, first)  # a pass has clean and noisy frames
    set_thread_count(largest_product(settings.model, latent_frames * settings.model.tokens_per_frame(*size[1:])))
    init_paths = InitPaths(arguments.init, arguments.teacher, arguments.real, arguments.critic)
    stage = build_stage(name, settings, init_paths, size, device)
    trainer = Trainer(
        name,
        stage,
        stage_settings,
        data_source,
        folder,
        dtype=DTYPES[settings.dtype],
        device=device,
        sample=_samples(name, settings, stage, data_source, first.to(device), size, folder, device),
        step_cost=_step_cost(name, settings, first, size, device),
    )
    if arguments.resume:
        trainer.resume()
    stopped: list[int] = []

    def stop(number: int, frame: object) -> None:
        stopped.append(number)
        trainer.stop()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    trainer.run()
    if stopped:
        raise SystemExit(128 + stopped[0])
    state = full_state(dict(trainer.ema.module.state_dict()))
    if rank() == 0:
        export(state, settings, folder)
        print(f"{folder / 'student.safetensors'}: stage {name}, {trainer.step} steps")


def latent_size(settings: Settings, batch: Batch) -> tuple[int, int, int]:
    """Return (C, h, w) of the clips; of the settings for prompts alone. Raise InputError if they differ."""
    if batch.latents is None:
        if settings.latent_size is None:
            raise InputError("latent_size must be given, [C, h, w]: the data are prompts alone")
        return settings.latent_size
    channels, height, width = batch.latents.shape[2:]
    if settings.latent_size not in (None, (channels, height, width)):
        raise InputError(f"latent_size must be {[channels, height, width]} as the data, got {settings.latent_size}")
    return channels, height, width


def _samples(
    name: str,
    settings: Settings,
    stage: Stage,
    data_source: DataSource,
    batch: Batch,
    size: tuple[int, int, int],
    folder: Path,
    device: torch.device,
) -> Samples | None:
    stage_settings, sample_settings = settings.stages[name], settings.samples
    if not stage_settings.sample_every:
        return None
    if name == "base":
        raise InputError("stages.base.sample_every must be 0: what it trains sees the future and cannot be rolled out")
    frames = sample_settings.frames or _clip_frames(stage_settings, batch)
    known = frames if batch.condition.actions is None else batch.condition.actions.shape[1]
    if not sample_settings.initial_frames < frames <= known:
        raise InputError(f"samples.frames must be in {sample_settings.initial_frames + 1}..{known}, got {frames}")
    if sample_settings.initial_frames and batch.latents is None:
        raise InputError(
            f"samples.initial_frames must be 0 where the data are prompts, got {sample_settings.initial_frames}"
        )
    config = settings.rollout
    if sample_settings.steps is not None:
        config = config.replace(steps=sample_settings.steps, first_steps=None)
    network = stage.ema
    assert isinstance(network, CausalWanTransformer)
    return Samples(
        network,
        config,
        batch,
        folder / "samples",
        latent_frames=frames,
        latent_size=size,
        initial_latent_frames=sample_settings.initial_frames,
        codec=open_codec(sample_settings, data_source, device) if rank() == 0 else None,
        fps=sample_settings.fps,
    )


def _clip_frames(stage_settings: StageSettings, batch: Batch) -> int:
    """Return the latent frames of a clip: those of the data, or of the settings where the data are prompts alone."""
    return stage_settings.frames if batch.latents is None else batch.latents.shape[1]


def _step_cost(
    name: str, settings: Settings, batch: Batch, size: tuple[int, int, int], device: torch.device
) -> StepCost | None:
    if device.type != "cuda":
        return None
    stage_settings = settings.stages[name]
    frames = _clip_frames(stage_settings, batch)
    flops = step_flops(name, settings, stage_settings, frames, settings.model.tokens_per_frame(*size[1:]))
    return StepCost(flops, peak_matmul_flops(device, DTYPES[settings.dtype]))


def export(state: dict[str, Tensor], settings: Settings, folder: Path) -> None:
    """Write student.safetensors and student.json, as `load_model` reads them.

    state: the state dict of the student's moving average.
    """
    from safetensors.torch import save_file

    with write_atomically(folder / "student.safetensors") as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary)
    metadata = {**settings.model.to_dict(), "rollout": dataclasses.asdict(settings.rollout)}
    with write_atomically(folder / "student.json") as temporary:
        temporary.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
