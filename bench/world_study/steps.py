"""The parts of `world_study` that do the work: what a process of it does, and what is read off when all are done."""

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

from cfpp_rt.bench.world_study.plan import FEW, LAYOUTS, Study
from cfpp_rt.errors import InputError

_TAR_BYTES = 15 * 2**20


def write_configs(study: Study) -> None:
    """One training config per layout and seed. Raises InputError for a study's config that lacks something."""
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
    """The clips of all stages, and the codec that they went through."""
    from safetensors.torch import save_file

    from cfpp_rt.distill.settings import Settings
    from cfpp_rt.world.codec import fit_codec
    from cfpp_rt.world.dataset import write

    codec = fit_codec(Settings.read(config).data["seed"])
    save_file(codec.state_dict(), f"{work}/codec.safetensors")
    write(Path(config), int(clips), Path(work) / "clips", int(jobs), codec)


def adopt(student: str, work: str, name: str) -> None:
    """Take over a packed student of an earlier study, as a run and as a student."""
    for folder in ("students", "runs"):
        shutil.copytree(student, Path(work) / folder / name)


def pack_student(config: str, run: str, out: str, codec: str) -> None:
    from cfpp_rt.world.codec import PatchCodec
    from cfpp_rt.world.pack import pack

    pack(Path(config), Path(run), Path(out), codec=PatchCodec.load(codec))


def do(commands: list[list[str]]) -> int:
    """One command after the other, until one fails; returns its exit code."""
    from cfpp_rt.cli.main import main

    for name, *words in commands:
        began = time.perf_counter()
        # Rows tell the command that made them: this one, not the whole list.
        sys.argv, sys.modules["__main__"].__spec__ = ["cfpp", name, *words], None
        torch.set_float32_matmul_precision("highest")  # training lowers it on a GPU
        if name == "clips":
            store_clips(*words)
        elif name == "adopt":
            adopt(*words)
        elif name == "pack":
            pack_student(*words)
        elif code := main([name, *words]):
            return code
        print(f"{name} took {time.perf_counter() - began:.1f} s", flush=True)
    return 0


def costs(study: Study) -> Iterator[dict[str, Any]]:
    """What stage 2 takes besides the student's own passes: evaluations of a network, each of one clip, and bytes.

    Student's own passes, forward and backward, are batch * steps clips for both.
    """
    from cfpp_rt.distill.data.shards import INDEX, ShardFolder
    from cfpp_rt.distill.settings import Settings

    for layout in LAYOUTS:
        stages = Settings.read(study.work / "configs" / f"{layout}-s0.yaml").stages
        ode, cd = stages["ode"], stages["cd"]
        found = [("cd", cd, 2 * cd.batch * cd.steps, 0)]  # the teacher's and the target's
        folder = study.work / f"{layout}-trajectories"
        if (folder / INDEX).is_file():
            stored = ShardFolder(folder)
            size = len(stored) * math.prod(stored.columns["trajectory"].shape) * torch.float16.itemsize
            found.append(("ode", ode, ode.table * len(stored), size))
        for stage, own, evaluations, size in found:
            yield {
                "bench": "world_stage2",
                "layout": layout,
                "stage": stage,
                "student_clips": own.batch * own.steps,
                "network_evaluations": evaluations,
                "stored_bytes": size,
            }


def training(study: Study) -> Iterator[dict[str, Any]]:
    """How long each training took, while others shared the device: its first step, which compiles, apart."""
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
    """Speed of one player, with nothing else on the device: it does not depend on what a student has learnt."""
    from cfpp_rt.world.evaluate import pace
    from cfpp_rt.world.student import load_world_pipeline

    for layout in LAYOUTS:
        folder = study.work / "students" / f"{layout}-ar"
        if not (folder / "student.json").is_file():
            continue
        pipeline = load_world_pipeline(folder, device=study.eval_device)
        for steps in FEW:
            rollout = pipeline.config.replace(steps=steps)
            pace(pipeline, rollout, num_frames=rollout.frames_per_block)  # warm-up
            for seed in range(repeats):
                figures = pace(pipeline, rollout, num_frames=60, seed=seed)
                yield {"bench": "world_pace", "layout": layout, "steps": list(steps), "seed": seed, **figures}


def keep_rows(study: Study, out: Path) -> None:
    """All rows that there are, as one file."""
    rows = "".join(path.read_text(encoding="utf-8") for path in sorted((study.work / "rows").glob("*.jsonl")))
    (out / "study.jsonl").write_text(rows, encoding="utf-8")


def keep(study: Study, out: Path) -> None:
    """The rows, the logs of training, and the students in bfloat16: files of at most 15 MiB or so."""
    out.mkdir(parents=True, exist_ok=True)
    keep_rows(study, out)
    with tarfile.open(out / "logs.tar.gz", "w:gz") as tar:
        for pattern in ("logs/*.log", "runs/*/log.csv", "configs/*.yaml"):
            for path in sorted(study.work.glob(pattern)):
                tar.add(path, path.relative_to(study.work))
    parcels: list[list[Path]] = [[]]
    size = 0
    for folder in [*sorted((study.work / "students").glob("*")), study.work / "runs" / "base"]:
        if (folder / "student.safetensors").is_file():
            small = _halved(folder / "student.safetensors")
            size += small.stat().st_size
            if size > _TAR_BYTES:
                parcels.append([])
                size = small.stat().st_size
            parcels[-1].append(small)
    for number, parcel in enumerate(parcels):
        with tarfile.open(out / f"students-{number}.tar", "w") as tar:
            for small in parcel:
                tar.add(small, f"{small.parent.name}/student.safetensors")
                tar.add(small.with_name("student.json"), f"{small.parent.name}/student.json")
            if number == 0 and parcel:
                tar.add(study.work / "codec.safetensors", "codec.safetensors")


def _halved(path: Path) -> Path:
    """The same tensors in bfloat16, in a file beside it."""
    from safetensors.torch import load_file, save_file

    small = path.with_name("student-bfloat16.safetensors")
    save_file({name: tensor.bfloat16() for name, tensor in load_file(path).items()}, small)
    return small


if __name__ == "__main__":
    raise SystemExit(do(json.loads(sys.argv[2])))
