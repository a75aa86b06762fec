"""`cfpp distill`: one stage of the pipeline, from a config."""

import argparse
import dataclasses
import json
import signal
from pathlib import Path

import torch
from torch import Tensor

from cfpp_rt.device.peak import peak_matmul_flops
from cfpp_rt.device.threads import largest_product, set_thread_count
from cfpp_rt.distill.assemble import Weights, build_stage, open_feed
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.checkpoint import checkpoints
from cfpp_rt.distill.flops import step_flops
from cfpp_rt.distill.processes import joined, rank, whole
from cfpp_rt.distill.samples import Samples, open_codec
from cfpp_rt.distill.settings import STAGES, Settings, StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.distill.train import Feed, Trainer, Work
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.values import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="as in configs/")
    parser.add_argument("--stage", required=True, choices=STAGES, help="base is for models without a pretrained one")
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoints, log.csv and the finished student")
    parser.add_argument("--init", metavar="FILE", type=Path, help="weights that the student starts from")
    parser.add_argument("--teacher", metavar="FILE", type=Path, help="stages ode and cd (default: --init)")
    parser.add_argument("--real", metavar="FILE", type=Path, help="stage dmd: the bidirectional model")
    parser.add_argument(
        "--critic", metavar="FILE", type=Path, help="stage dmd: what its critic starts from (default: --real)"
    )
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")


def run(arguments: argparse.Namespace) -> None:
    settings, folder = Settings.read(arguments.config), Path(arguments.out)
    name = arguments.stage
    if name not in settings.stages:
        raise InputError(f"{arguments.config}: stages must have {name}, got {', '.join(settings.stages)}")
    if not arguments.resume and checkpoints(folder):
        raise InputError(f"--out {folder} holds a run already: give --resume to go on with it, or another folder")
    with joined(settings.device) as device:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # TF32 where float32 remains, as published
        _train(name, settings, folder, arguments, device)


def _train(name: str, settings: Settings, folder: Path, arguments: argparse.Namespace, device: torch.device) -> None:
    own = settings.stages[name]
    feed = open_feed(settings, own)
    first = feed(0)
    size = latent_size(settings, first)
    frames = 2 * own.batch * _clip_frames(own, first)  # a pass has clean and noisy frames
    set_thread_count(largest_product(settings.model, frames * settings.model.tokens_per_frame(*size[1:])))
    weights = Weights(arguments.init, arguments.teacher, arguments.real, arguments.critic)
    stage = build_stage(name, settings, weights, size, device)
    trainer = Trainer(
        name,
        stage,
        own,
        feed,
        folder,
        dtype=DTYPES[settings.dtype],
        device=device,
        sample=_samples(name, settings, stage, feed, first.to(device), size, folder, device),
        work=_work(name, settings, first, size, device),
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
    state = whole(dict(trainer.ema.module.state_dict()))
    if rank() == 0:
        export(state, settings, folder)
        print(f"{folder / 'student.safetensors'}: stage {name}, {trainer.step} steps")


def latent_size(settings: Settings, batch: Batch) -> tuple[int, int, int]:
    """(C, h, w) of the clips, which prompts alone do not tell. Raises InputError where settings and data differ."""
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
    feed: Feed,
    batch: Batch,
    size: tuple[int, int, int],
    folder: Path,
    device: torch.device,
) -> Samples | None:
    own, wanted = settings.stages[name], settings.samples
    if not own.sample_every:
        return None
    if name == "base":
        raise InputError("stages.base.sample_every must be 0: what it trains sees the future and cannot be rolled out")
    frames = wanted.frames or _clip_frames(own, batch)
    known = frames if batch.condition.actions is None else batch.condition.actions.shape[1]
    if not wanted.initial_frames < frames <= known:
        raise InputError(f"samples.frames must be in {wanted.initial_frames + 1}..{known}, got {frames}")
    if wanted.initial_frames and batch.latents is None:
        raise InputError(f"samples.initial_frames must be 0 where the data are prompts, got {wanted.initial_frames}")
    network = stage.ema
    assert isinstance(network, CausalWanTransformer)
    return Samples(
        network,
        settings.rollout if wanted.steps is None else settings.rollout.replace(steps=wanted.steps, first_steps=None),
        batch,
        folder / "samples",
        frames=frames,
        latent_size=size,
        initial=wanted.initial_frames,
        codec=open_codec(wanted, feed, device) if rank() == 0 else None,
        fps=wanted.fps,
    )


def _clip_frames(own: StageSettings, batch: Batch) -> int:
    """Return the latent frames of a clip: those of the data, or of the settings where the data are prompts alone."""
    return own.frames if batch.latents is None else batch.latents.shape[1]


def _work(name: str, settings: Settings, batch: Batch, size: tuple[int, int, int], device: torch.device) -> Work | None:
    if device.type != "cuda":
        return None
    own = settings.stages[name]
    frames = _clip_frames(own, batch)
    flops = step_flops(name, settings, own, frames, settings.model.tokens_per_frame(*size[1:]))
    return Work(flops, peak_matmul_flops(device, DTYPES[settings.dtype]))


def export(state: dict[str, Tensor], settings: Settings, folder: Path) -> None:
    """Write the student's moving average as student.safetensors and student.json, which `load_model` reads."""
    from safetensors.torch import save_file

    with write_atomically(folder / "student.safetensors") as temporary:
        save_file({name: tensor.cpu().contiguous() for name, tensor in state.items()}, temporary)
    described = {**settings.model.to_dict(), "rollout": dataclasses.asdict(settings.rollout)}
    with write_atomically(folder / "student.json") as temporary:
        temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
