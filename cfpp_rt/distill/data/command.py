"""The command `cfpp distill-data`: make folders of training data from published files or your own."""

import argparse
from pathlib import Path

import torch

from cfpp_rt.distill.data import make
from cfpp_rt.distill.data.shards import ShardFolder
from cfpp_rt.errors import InputError
from cfpp_rt.io.progress import progress_bar
from cfpp_rt.values import DTYPES


def add_arguments(parser: argparse.ArgumentParser) -> None:
    kinds = parser.add_subparsers(dest="kind", metavar="KIND", required=True)
    lmdb = kinds.add_parser("lmdb", help="clips, or states of an ODE, in the published LMDB layout")
    lmdb.add_argument("source", metavar="LMDB")
    lmdb.add_argument("--trajectories", action="store_true", help="keep the states before the clean clip: stage ode")
    lmdb.add_argument("--no-text", action="store_true", help="do not encode prompts, for a model without text")
    prompts = kinds.add_parser("prompts", help="text embeddings of a file with one prompt per line")
    prompts.add_argument("source", metavar="FILE")
    negative = kinds.add_parser("negative", help="embeddings of one text, for guidance")
    negative.add_argument("source", metavar="TEXT")
    for kind in (lmdb, prompts, negative):
        kind.add_argument("--base", metavar="DIR", help="text encoder and tokenizer: the Wan2.1 directory")
        kind.add_argument("--device", default="cpu", help="device of the text encoder")
        kind.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the text encoder")
        kind.add_argument("--text-len", type=int, default=512, help="rows of an embedding (tokens)")
    ode = kinds.add_parser("trajectories", help="solve the ODE of stage ar's model for every clip: stage ode")
    ode.add_argument("source", metavar="DIR", help="a folder of clips")
    ode.add_argument(
        "--config", required=True, metavar="YAML", help="training config with a stage ode, whose guidance is used"
    )
    ode.add_argument("--teacher", required=True, metavar="FILE", type=Path)
    ode.add_argument("--seed", type=int, default=0, help="seed of the noise")
    ode.add_argument("--batch", type=int, default=1, help="clips per solve (default: 1)")
    ode.add_argument("--clips", type=int, metavar="N", help="take the first N clips only (default: all)")
    check = kinds.add_parser("check", help="read every byte of a folder and name the files that have changed")
    check.add_argument("source", metavar="DIR")
    for kind in (lmdb, prompts, negative, ode):
        kind.add_argument("--out", "-o", required=True, metavar="PATH", help="a new folder; negative: a file")
    for kind in (lmdb, prompts, ode):
        kind.add_argument("--resume", action="store_true", help="continue an unfinished folder")


def run(arguments: argparse.Namespace) -> None:
    {
        "lmdb": _lmdb,
        "prompts": _prompts,
        "negative": _negative,
        "trajectories": _trajectories,
        "check": _check,
    }[arguments.kind](arguments)


def _lmdb(arguments: argparse.Namespace) -> None:
    source = make.LmdbClips(arguments.source)
    encode = None if arguments.no_text else _encoder(arguments)
    with progress_bar("clips", len(source), unit="row") as progress:
        rows = make.convert_lmdb(
            source,
            arguments.out,
            encode,
            trajectories=arguments.trajectories,
            resume=arguments.resume,
            progress=progress,
        )
    print(f"{arguments.out}: {rows} rows")


def _prompts(arguments: argparse.Namespace) -> None:
    prompts = make.read_prompts(arguments.source)
    with progress_bar("prompts", len(prompts), unit="row") as progress:
        make.encode_prompts(prompts, arguments.out, _encoder(arguments), resume=arguments.resume, progress=progress)
    print(f"{arguments.out}: {len(prompts)} prompts")


def _negative(arguments: argparse.Namespace) -> None:
    from safetensors.torch import save_file

    from cfpp_rt.io.atomic import require_writable, write_atomically

    require_writable(arguments.out, "--out", pipe=False)
    prompt_embeds = _encoder(arguments)([arguments.source]).cpu().contiguous()
    with write_atomically(arguments.out) as temporary:
        save_file({"embeds": prompt_embeds}, temporary)
    print(f"{arguments.out}: {list(prompt_embeds.shape)}")


def _trajectories(arguments: argparse.Namespace) -> None:
    from cfpp_rt.distill.assemble import guidance_of, load_frozen
    from cfpp_rt.distill.causal_cd import timestep_table
    from cfpp_rt.distill.forward import Denoiser
    from cfpp_rt.distill.processes import process_group
    from cfpp_rt.distill.settings import Settings

    settings = Settings.read(arguments.config)
    if "ode" not in settings.stages:
        raise InputError(f"{arguments.config}: stages must have ode, got {', '.join(settings.stages)}")
    stage_settings = settings.stages["ode"]
    for name in ("batch", "clips"):
        if (value := getattr(arguments, name)) is not None and value < 1:
            raise InputError(f"--{name} must be >= 1, got {value}")
    source = ShardFolder(arguments.source)
    total = len(source) if arguments.clips is None else min(arguments.clips, len(source))
    with process_group(settings.device) as device, progress_bar("trajectories", total, unit="row") as progress:
        if device.type == "cuda":
            torch.set_float32_matmul_precision("high")  # as in training
        teacher = Denoiser(load_frozen(settings, arguments.teacher, device), settings.layout)
        rows = make.solve_trajectories(
            teacher,
            source,
            arguments.out,
            timestep_table(stage_settings.table, settings.rollout.shift),
            guidance=guidance_of(settings, stage_settings),
            seed=arguments.seed,
            batch=arguments.batch,
            max_rows=arguments.clips,
            resume=arguments.resume,
            progress=progress,
        )
    print(f"{arguments.out}: {rows} rows")


def _check(arguments: argparse.Namespace) -> None:
    folder = ShardFolder(arguments.source)
    faults = list(folder.check())
    if faults:
        raise InputError("; ".join(f"{path}: {fault}" for path, fault in faults))
    print(f"{arguments.source}: {len(folder)} rows, every byte as it was written")


def _encoder(arguments: argparse.Namespace) -> make.Encode:
    from cfpp_rt.text import TextEncoder

    if arguments.base is None:
        raise InputError("--base must be given: the directory of the text encoder (lmdb: or --no-text)")
    encoder = TextEncoder.from_pretrained(
        arguments.base,
        dtype=DTYPES[arguments.dtype],
        device=torch.device(arguments.device),
        text_len=arguments.text_len,
    )
    return lambda prompts: encoder(list(prompts))
