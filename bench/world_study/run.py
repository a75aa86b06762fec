"""Run the study of the built-in world: which way to a few-step student is worth its cost.

One command produces the tables of docs/distillation.md from nothing. Clips are stored; a teacher of stage ar is trained
for frame-wise and one for chunk-wise generation, and a bidirectional score. From each teacher start students of stage
ode (after its trajectories have been solved and stored), of stage cd, and of neither; each then passes through stage
dmd, with several seeds. All play unseen arenas in 1, 2 and 4 steps, before and after dmd (`cfpp_rt.world.evaluate`).

    python -m cfpp_rt.bench.world_study.run --work outputs/study-work --out outputs/study --jobs 24 --minutes 8
    python -m cfpp_rt.bench.world_study.run --work outputs/smoke-work --out outputs/smoke --smoke

--out then contains study.jsonl (every evaluation; costs of stage 2; speed), students-*.tar (all students, bfloat16) and
logs.tar.gz. If a run fails, the runs that need it do not begin; all others do.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from cfpp_rt.bench import harness
from cfpp_rt.bench.world_study import steps
from cfpp_rt.bench.world_study.plan import Run, Study
from cfpp_rt.errors import InputError

_RESERVE_S = 25.0  # of the time allowed, for the last rows and the archives
_SMOKE_STEPS = {"ar": 6, "base": 3, "ode": 3, "cd": 3, "dmd": 3}


def conduct(study: Study, seconds: float) -> dict[str, str]:
    """Execute the runs of a study, at most `jobs` processes at once; return the outcome of each by name.

    The outcome of a run that succeeded is "done"; no error is raised for one that failed. When the time is over,
    running processes are terminated and no other begins.
    """
    began, waiting = time.perf_counter(), list(study.runs())
    running: dict[str, tuple[subprocess.Popen[bytes], float]] = {}
    outcomes: dict[str, str] = {}
    logs = study.work / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    while waiting or running:
        late = time.perf_counter() - began > seconds
        for run in list(waiting):
            lost = [name for name in run.needs if outcomes.get(name, "done") != "done"]
            if lost or late:
                outcomes[run.name] = f"not begun: {lost[0]} is not there" if lost else "not begun: no time was left"
                waiting.remove(run)
            elif all(outcomes.get(name) == "done" for name in run.needs) and len(running) < study.jobs:
                running[run.name] = (_start(run, logs), time.perf_counter())
                waiting.remove(run)
        for name, (process, start) in list(running.items()):
            if late and process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=5)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                outcomes[name] = "ended: no time was left"
            elif process.poll() is not None:
                outcomes[name] = "done" if process.returncode == 0 else f"failed ({process.returncode})"
            else:
                continue
            del running[name]
            now = time.perf_counter()
            print(f"{now - began:6.0f} s  {name}: {outcomes[name]}, {now - start:.0f} s", flush=True)
            if outcomes[name].startswith("failed"):
                print("\n".join((logs / f"{name}.log").read_text(encoding="utf-8").splitlines()[-12:]), flush=True)
        time.sleep(0.05)
    return outcomes


def _start(run: Run, logs: Path) -> "subprocess.Popen[bytes]":
    command = [sys.executable, "-m", "cfpp_rt.bench.world_study.steps", run.name, json.dumps(run.commands)]
    variables = {"OMP_NUM_THREADS": "1", **os.environ}  # there are more processes than cores
    with (logs / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=variables)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/world-study.yaml"), help="(default: %(default)s)")
    parser.add_argument(
        "--work", type=Path, required=True, metavar="DIR", help="new folder for all intermediate files, some GB"
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder for the results")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600.0, help="time limit (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seeds", type=int, default=3, help="training seeds (default: %(default)s)")
    parser.add_argument(
        "--clips", type=int, default=40_000, help="clips to store, for all stages (default: %(default)s)"
    )
    parser.add_argument(
        "--trajectories", type=int, default=2048, help="trajectories to store, for stage ode (default: %(default)s)"
    )
    parser.add_argument("--frames", type=int, default=300, help="frames of an episode (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=48, help="episodes of an evaluation (default: %(default)s)")
    parser.add_argument("--eval-seeds", type=int, default=1, help="evaluations per student (default: %(default)s)")
    parser.add_argument(
        "--steps",
        action="append",
        default=[],
        metavar="STAGE=N",
        help="training steps of a stage, instead of the config's",
    )
    parser.add_argument(
        "--teachers", type=Path, metavar="DIR", help="students of an earlier study, whose teachers are adopted"
    )
    parser.add_argument(
        "--only", nargs="+", default=[], metavar="RUN", help="run only these, and the runs that they need"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="a test of the study itself: run everything once, with a few steps"
    )
    arguments = parser.parse_args()
    try:
        _study(arguments)
    except InputError as error:
        parser.error(str(error))


def _study(arguments: argparse.Namespace) -> None:
    if arguments.work.exists():
        raise InputError(f"--work {arguments.work}: wanted a new folder, this one exists")
    if not 0.5 <= arguments.minutes < 1e5:
        raise InputError(f"--minutes must be in 0.5..1e5, got {arguments.minutes}")
    study = Study(
        config=arguments.config.resolve(),
        work=arguments.work.resolve(),
        clips=arguments.clips,
        trajectories=arguments.trajectories,
        seeds=arguments.seeds,
        frames=arguments.frames,
        episodes=arguments.episodes,
        eval_seeds=arguments.eval_seeds,
        jobs=arguments.jobs,
        device=arguments.device,
        steps=dict(map(_steps, arguments.steps)),
        teachers=None if arguments.teachers is None else arguments.teachers.resolve(),
        only=tuple(arguments.only),
    )
    study.runs()  # raises if a name is unknown
    if arguments.smoke:
        few = {"clips": 64, "trajectories": 4, "seeds": 1, "frames": 18, "episodes": 2, "eval_seeds": 2}
        study = Study(**{**vars(study), **few, "steps": {**_SMOKE_STEPS, **study.steps}})
    steps.write_configs(study)
    began = time.perf_counter()
    outcomes = conduct(study, 60 * arguments.minutes - _RESERVE_S)
    (study.work / "rows").mkdir(exist_ok=True)
    steps.keep(study, arguments.out)  # first, because the steps that follow may fail
    trained = list(steps.training(study))
    for row in trained:
        print(f"{row['run']:<24}{row['steps']:>7} steps {row['seconds']:>7.0f} s {row['step_ms']:>8.1f} ms per step")
    facts = harness.environment(torch.device(study.eval_device))
    own = str(study.work / "rows" / "study.jsonl")
    harness.append([*steps.costs(study), *trained], own, facts)
    steps.keep_rows(study, arguments.out)
    harness.append(list(steps.paces(study)), own, facts)
    steps.keep_rows(study, arguments.out)
    lost = [f"{name}: {outcome}" for name, outcome in outcomes.items() if outcome != "done"]
    done = len(outcomes) - len(lost)
    print("\n".join([*lost, f"{done} of {len(outcomes)} runs in {(time.perf_counter() - began) / 60:.1f} minutes"]))
    if lost:
        raise SystemExit(1)


def _steps(text: str) -> tuple[str, int]:
    name, _, number = text.partition("=")
    if name not in ("ar", "base", "ode", "cd", "dmd") or not number.isdecimal() or not int(number):
        raise InputError(f"--steps must be STAGE=N with STAGE of ar, base, ode, cd, dmd, got {text!r}")
    return name, int(number)


if __name__ == "__main__":
    main()
