"""`cfpp distill`: one stage of the pipeline, from a config."""

import argparse
import dataclasses
import json
import signal
from pathlib import Path

from cfpp_rt.checkpoint import write_atomically
from cfpp_rt.distill.assemble import Weights, build_stage, open_feed
from cfpp_rt.distill.checkpoint import checkpoints
from cfpp_rt.distill.settings import STAGES, Settings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.distill.train import Trainer
from cfpp_rt.errors import InputError


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="YAML", help="as in configs/")
    parser.add_argument("--stage", required=True, choices=STAGES, help="base is for models without a pretrained one")
    parser.add_argument("--out", required=True, metavar="DIR", help="checkpoints, log.csv and the finished student")
    parser.add_argument("--init", metavar="FILE", type=Path, help="weights that the student starts from")
    parser.add_argument("--teacher", metavar="FILE", type=Path, help="stages ode and cd (default: --init)")
    parser.add_argument("--real", metavar="FILE", type=Path, help="stage dmd: the bidirectional model")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in --out")


def run(arguments: argparse.Namespace) -> None:
    settings, folder = Settings.read(arguments.config), Path(arguments.out)
    name = arguments.stage
    if name not in settings.stages:
        raise InputError(f"{arguments.config}: stages must have {name}, got {', '.join(settings.stages)}")
    if not arguments.resume and checkpoints(folder):
        raise InputError(f"--out {folder} holds a run already: give --resume to go on with it, or another folder")
    own = settings.stages[name]
    feed = open_feed(settings, own)
    latents = feed(0).latents
    if latents is None:
        raise InputError(f"data must have latents for stage {name}, got prompts alone")
    weights = Weights(arguments.init, arguments.teacher, arguments.real)
    channels, height, width = latents.shape[2:]
    stage = build_stage(name, settings, weights, (channels, height, width))
    trainer = Trainer(name, stage, own, feed, folder)
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
    export(stage, settings, folder)
    print(f"{folder / 'student.safetensors'}: stage {name}, {trainer.step} steps")


def export(stage: Stage, settings: Settings, folder: Path) -> None:
    """Write the student's moving average as student.safetensors and student.json, which `load_model` reads."""
    from safetensors.torch import save_file

    with write_atomically(folder / "student.safetensors") as temporary:
        save_file({name: tensor.contiguous() for name, tensor in stage.ema.state_dict().items()}, temporary)
    described = {**settings.model.to_dict(), "rollout": dataclasses.asdict(settings.rollout)}
    with write_atomically(folder / "student.json") as temporary:
        temporary.write_text(json.dumps(described, indent=1) + "\n", encoding="utf-8")
