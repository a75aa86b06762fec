"""The commands of the world's study that a process of it runs, and the rows that are read off at the end."""

import csv
import json
import math
import shutil
import sys
import tarfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from cfpp_rt.bench.world_study.plan import FEW_STEPS, LAYOUTS, Study
from cfpp_rt.errors import InputError

_TAR_BYTES = 15 * 2**20


def write_configs(study: Study) -> None:
    """Write one training config per layout and seed. Raises InputError if the study's config lacks a stage."""
    import yaml

    from cfpp_rt.distill.settings import STAGES, Settings

    lacking = set(STAGES) - set(Settings.read(study.config).stages)
    if lacking:
        raise InputError(f"{study.config}: stages must be {', '.join(STAGES)}, got none of {', '.join(lacking)}")
    settings = yaml.safe_load(study.config.read_text(encoding="utf-8"))
    folder = study.work / "configs"
    folder.mkdir(parents=True)
    for layout in LAYOUTS:
        for seed in range(study.seeds):
            path = folder / f"{layout}-s{seed}.yaml"
            path.write_text(yaml.safe_dump(study.settings_of(settings, layout, seed)), encoding="utf-8")
            Settings.read(path)


def store_clips(config: str, clips: str, work: str, jobs: str) -> None:
    """Store the clips of all stages, and the codec that encoded them."""
    from safetensors.torch import save_file

    from cfpp_rt.distill.settings import Settings
    from cfpp_rt.world.codec import fit_codec
    from cfpp_rt.world.dataset import write

    codec = fit_codec(Settings.read(config).data["seed"])
    save_file(codec.state_dict(), f"{work}/codec.safetensors")
    write(Path(config), int(clips), Path(work) / "clips", int(jobs), codec)


def adopt(student: str, work: str, name: str) -> None:
    """Copy a packed student of an earlier study, as a run and as a student."""
    for folder in ("students", "runs"):
        shutil.copytree(student, Path(work) / folder / name)


def pack_student(config: str, run: str, out: str, codec: str) -> None:
    """Pack the student of a finished run, with the codec, as `load_world_pipeline` reads it."""
    from cfpp_rt.world.codec import PatchCodec
    from cfpp_rt.world.pack import pack

    pack(Path(config), Path(run), Path(out), codec=PatchCodec.load(codec))


def do(commands: list[list[str]]) -> int:
    """Run commands one after the other until one fails; return its exit code, or 0."""
    from cfpp_rt.cli.main import main

    for name, *arguments in commands:
        began = time.perf_counter()
        # A row names the command that wrote it: this one, not the process with its list of commands.
        sys.argv, sys.modules["__main__"].__spec__ = ["cfpp", name, *arguments], None
        torch.set_float32_matmul_precision("highest")  # training lowers it on a GPU
        if name == "clips":
            store_clips(*arguments)
        elif name == "adopt":
            adopt(*arguments)
        elif name == "pack":
            pack_student(*arguments)
        elif code := main([name, *arguments]):
            return code
        print(f"{name} took {time.perf_counter() - began:.1f} s", flush=True)
    return 0


def costs(study: Study) -> Iterator[dict[str, Any]]:
    """Yield the costs of stage 2 besides the student's own passes: network evaluations of one clip each, and bytes.

    The student's own passes, forward and backward, are batch * steps clips for both variants.
    """
    from cfpp_rt.distill.data.shards import INDEX, ShardFolder
    from cfpp_rt.distill.settings import Settings

    for layout in LAYOUTS:
        stages = Settings.read(study.work / "configs" / f"{layout}-s0.yaml").stages
        ode, cd = stages["ode"], stages["cd"]
        variants = [("cd", cd, 2 * cd.batch * cd.steps, 0)]  # of the teacher and of the target
        folder = study.work / f"{layout}-trajectories"
        if (folder / INDEX).is_file():
            stored = ShardFolder(folder)
            size = len(stored) * math.prod(stored.columns["trajectory"].shape) * torch.float16.itemsize
            variants.append(("ode", ode, ode.table * len(stored), size))
        for stage, own, evaluations, size in variants:
            yield {
                "bench": "world_stage2",
                "layout": layout,
                "stage": stage,
                "student_clips": own.batch * own.steps,
                "network_evaluations": evaluations,
                "stored_bytes": size,
            }


def training(study: Study) -> Iterator[dict[str, Any]]:
    """Yield the duration of each training, while others shared the device; step_ms leaves out the first step."""
    for path in sorted(study.work.glob("runs/*/log.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            seconds = [float(row["seconds"]) for row in csv.DictReader(file)]
        per_step = (seconds[-1] - seconds[0]) / max(1, len(seconds) - 1)
        yield {
            "bench": "world_training",
            "run": path.parent.name,
            "steps": len(seconds),
            "seconds": seconds[-1],
            "step_ms": 1000 * per_step,
        }


def paces(study: Study, repeats: int = 3) -> Iterator[dict[str, Any]]:
    """Yield the speed of one player alone on the device; it does not depend on the student's weights."""
    from cfpp_rt.world.evaluate import pace
    from cfpp_rt.world.student import load_world_pipeline

    for layout in LAYOUTS:
        folder = study.work / "students" / f"{layout}-ar"
        if not (folder / "student.json").is_file():
            continue
        pipeline = load_world_pipeline(folder, device=study.eval_device)
        for steps in FEW_STEPS:
            config = pipeline.config.replace(steps=steps)
            pace(pipeline, config, num_frames=config.frames_per_block)  # warm-up
            for seed in range(repeats):
                figures = pace(pipeline, config, num_frames=60, seed=seed)
                yield {"bench": "world_pace", "layout": layout, "steps": list(steps), "seed": seed, **figures}


def keep_rows(study: Study, out: Path) -> None:
    """Write all rows into one file."""
    rows = "".join(path.read_text(encoding="utf-8") for path in sorted((study.work / "rows").glob("*.jsonl")))
    (out / "study.jsonl").write_text(rows, encoding="utf-8")


def keep(study: Study, out: Path) -> None:
    """Write the rows, the training logs, and the students in bfloat16, in files of about 15 MiB at most."""
    out.mkdir(parents=True, exist_ok=True)
    keep_rows(study, out)
    with tarfile.open(out / "logs.tar.gz", "w:gz") as tar:
        for pattern in ("logs/*.log", "runs/*/log.csv", "configs/*.yaml"):
            for path in sorted(study.work.glob(pattern)):
                tar.add(path, path.relative_to(study.work))
    archives: list[list[Path]] = [[]]
    size = 0
    for folder in [*sorted((study.work / "students").glob("*")), study.work / "runs" / "base"]:
        if (folder / "student.safetensors").is_file():
            small = _halved(folder / "student.safetensors")
            size += small.stat().st_size
            if size > _TAR_BYTES:
                archives.append([])
                size = small.stat().st_size
            archives[-1].append(small)
    for number, archive in enumerate(archives):
        with tarfile.open(out / f"students-{number}.tar", "w") as tar:
            for small in archive:
                tar.add(small, f"{small.parent.name}/student.safetensors")
                tar.add(small.with_name("student.json"), f"{small.parent.name}/student.json")
            if number == 0 and archive:
                tar.add(study.work / "codec.safetensors", "codec.safetensors")


def _halved(path: Path) -> Path:
    """Write the same tensors in bfloat16 into a file beside `path` and return its path."""
    from safetensors.torch import load_file, save_file

    small = path.with_name("student-bfloat16.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, small)
    return small


if __name__ == "__main__":
    raise SystemExit(do(json.loads(sys.argv[2])))
