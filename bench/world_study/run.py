"""Which way to a few-step student of the built-in world is worth its cost?

From nothing to the table of docs/distillation.md in one command: clips are stored; a teacher of stage ar is trained for
frame-wise and one for chunk-wise generation, and a bidirectional score; from each teacher go students of stage ode
(after its trajectories have been solved and stored), of stage cd, and none; each then goes through stage dmd, with
several seeds. All play unseen arenas in 1, 2 and 4 steps, before and after dmd (`cfpp_rt.world.evaluate`).

    python -m cfpp_rt.bench.world_study.run --work outputs/study-work --out outputs/study --jobs 24 --minutes 8
    python -m cfpp_rt.bench.world_study.run --work outputs/smoke-work --out outputs/smoke --smoke

--out then holds study.jsonl (every evaluation; what stage 2 cost; speed), students-*.tar (all students, bfloat16) and
logs.tar. A run that fails takes those with it that wait for it, and no others.
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

_RESERVE_S = 25.0  # of the time allowed: for the last figures and the archives
_SMOKE_STEPS = {"ar": 6, "base": 3, "ode": 3, "cd": 3, "dmd": 3}


def conduct(study: Study, seconds: float) -> dict[str, str]:
    """Run what can be run, at most `jobs` processes at once; what happened to each, by name: "done" if all went well.

    When the time is over, what still runs is ended and nothing else begins. Raises nothing for a run that fails.
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
    environment = {"OMP_NUM_THREADS": "1", **os.environ}  # there are more processes than cores
    with (logs / f"{run.name}.log").open("wb") as log:
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)


def main() -> None:
    parser = harness.parser(__doc__)
    parser.add_argument("--config", type=Path, default=Path("configs/world-study.yaml"), help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="a new folder, for some GB")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="what is kept")
    parser.add_argument("--jobs", type=int, default=4, help="processes at once (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=600.0, help="at most (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--seeds", type=int, default=3, help="of training (default: %(default)s)")
    parser.add_argument("--clips", type=int, default=40_000, help="stored, for all stages (default: %(default)s)")
    parser.add_argument("--trajectories", type=int, default=2048, help="stored, for stage ode (default: %(default)s)")
    parser.add_argument("--frames", type=int, default=300, help="of an evaluated episode (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=48, help="of an evaluation (default: %(default)s)")
    parser.add_argument("--eval-seeds", type=int, default=1, help="evaluations of a student (default: %(default)s)")
    parser.add_argument("--steps", action="append", default=[], metavar="STAGE=N", help="instead of the config's")
    parser.add_argument("--teachers", type=Path, metavar="DIR", help="of an earlier study (its students), taken over")
    parser.add_argument("--only", nargs="+", default=[], metavar="RUN", help="these, and what they wait for")
    parser.add_argument("--smoke", action="store_true", help="everything once, with a few steps: does it run?")
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
    study.runs()  # raises for a name of none
    if arguments.smoke:
        few = {"clips": 64, "trajectories": 4, "seeds": 1, "frames": 18, "episodes": 2, "eval_seeds": 2}
        study = Study(**{**vars(study), **few, "steps": {**_SMOKE_STEPS, **study.steps}})
    steps.write_configs(study)
    began = time.perf_counter()
    outcomes = conduct(study, 60 * arguments.minutes - _RESERVE_S)
    (study.work / "rows").mkdir(exist_ok=True)
    steps.keep(study, arguments.out)  # first of all: what follows may fail
    trained = list(steps.training(study))
    for row in trained:
        print(f"{row['run']:<24}{row['steps']:>7} steps {row['seconds']:>7.0f} s {row['step_ms']:>8.1f} ms per step")
    facts = harness.environment(torch.device(study.eval_device))
    own = str(study.work / "rows" / "study.jsonl")
    harness.append([*steps.costs(study), *trained], own, facts)
    steps.keep_rows(study, arguments.out)
    harness.append(list(steps.paces(study)), own, facts)
    steps.keep_rows(study, arguments.out)
    lost = [f"{name}: {what}" for name, what in outcomes.items() if what != "done"]
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
