"""The plan of the world's study: its runs, what each of them waits for, and the commands of each."""

import dataclasses
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError

LAYOUTS = {"frame": (1, 3), "chunk": (3, 6)}  # (frames per block, window: the block and the frames before it)
INITS = ("ar", "ode", "cd")
FEW_STEPS = ((1000,), (1000, 250), (1000, 750, 500, 250))
MANY_STEPS = tuple(round(1000 * (1 - i / 16)) for i in range(16))  # of the multi-step teacher


@dataclasses.dataclass(frozen=True)
class Run:
    """One process of the study.

    needs: names of the runs that must be done before it begins.
    commands: arguments of `cfpp`, or of a command of `steps.do`.
    """

    name: str
    needs: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """The settings of a study.

    config: training config with all stages and the world's own data source.
    work: folder for data, checkpoints and students.
    clips, trajectories: numbers to store.
    seeds: number of training seeds; teachers have one.
    frames, episodes, eval_seeds: size of an evaluation.
    jobs: processes at once.
    steps: training steps by stage, instead of those of the config.
    teachers: students of an earlier study; its teachers and score are adopted instead of trained.
    only: names of runs, which run together with those that they need; empty = all.
    """

    config: Path
    work: Path
    clips: int
    trajectories: int
    seeds: int
    frames: int
    episodes: int
    eval_seeds: int
    jobs: int
    device: str
    steps: dict[str, int] = dataclasses.field(default_factory=dict)
    teachers: Path | None = None
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for name in ("clips", "trajectories", "seeds", "frames", "episodes", "eval_seeds", "jobs"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.trajectories > self.clips:
            raise InputError(f"trajectories must be <= clips={self.clips}, got {self.trajectories}")

    def settings_of(self, settings: dict[str, Any], layout: str, seed: int) -> dict[str, Any]:
        """Return the training config of one layout and seed, derived from that of the study."""
        block, window = LAYOUTS[layout]
        stored = {
            "source": "cfpp_rt.distill.data.data_source:open_data_source",
            "folder": str(self.work / "clips"),
            "seed": seed,
        }
        stages = {name: {**own, "seed": seed} for name, own in settings["stages"].items()}
        for name, steps in self.steps.items():
            stages[name]["steps"] = steps
        stages["ode"]["data"] = {**stored, "folder": str(self.work / f"{layout}-trajectories")}
        stages["dmd"]["initial_frames"] = block
        return {
            **settings,
            "device": self.device,
            "layout": {**settings["layout"], "block": block, "window": window},
            "rollout": {**settings["rollout"], "frames_per_block": block, "window": window},
            "data": stored,
            "stages": stages,
        }

    def runs(self) -> list[Run]:
        """Return the runs in order of priority. Raises InputError if a name in `only` is unknown."""
        known = {run.name: run for run in self._all_runs()}
        unknown = [name for name in self.only if name not in known]
        if unknown:
            raise InputError(f"only must name runs of {', '.join(known)}, got {', '.join(unknown)}")
        wanted, reached = list(self.only or known), set()
        while wanted:
            name = wanted.pop()
            reached.add(name)
            wanted += [needed for needed in known[name].needs if needed not in reached]
        return [run for name, run in known.items() if name in reached]

    def _all_runs(self) -> list[Run]:
        clips = ("clips", str(self.config), str(self.clips), str(self.work), str(self.jobs))
        runs = [Run("clips", (), (clips,))]
        runs += [Run(f"{layout}-ar", ("clips",), self._train("ar", layout, 0)) for layout in LAYOUTS]
        runs.append(Run("base", ("clips",), self._train("base", "frame", 0)[:1]))
        runs += [self._trajectories(layout) for layout in LAYOUTS]
        for seed in range(self.seeds):
            runs += [self._student(init, layout, seed) for init in ("cd", "ode", "ar") for layout in LAYOUTS]
        for layout in LAYOUTS:
            name = f"{layout}-ar"
            # A teacher has one training seed, so it is evaluated with as many seeds as a student has training seeds.
            evaluated = [
                self._eval(name, steps, max(self.eval_seeds, self.seeds)) for steps in (*FEW_STEPS, MANY_STEPS)
            ]
            runs.append(Run(f"{name}-eval", (name,), tuple(evaluated)))
        return runs

    def _trajectories(self, layout: str) -> Run:
        teacher, out = f"{layout}-ar", f"{layout}-trajectories"
        command = ["distill-data", "trajectories", str(self.work / "clips"), "--config", str(self._config(layout, 0))]
        command += ["--teacher", str(self._weights(teacher)), "--out", str(self.work / out)]
        return Run(out, (teacher,), ((*command, "--batch", "64", "--clips", str(self.trajectories)),))

    def _student(self, init: str, layout: str, seed: int) -> Run:
        """Return the run of stages 2 and 3 of one student and of its evaluations."""
        teacher, begin, done = f"{layout}-ar", f"{layout}-{init}-s{seed}", f"{layout}-{init}+dmd-s{seed}"
        needs = [teacher, "base", *([f"{layout}-trajectories"] if init == "ode" else [])]
        commands: list[tuple[str, ...]] = []
        if init == "ar":
            begin = teacher
        else:
            commands += self._train(init, layout, seed, "--init", str(self._weights(teacher)), name=begin)
        real = str(self._weights("base"))
        commands += self._train("dmd", layout, seed, "--init", str(self._weights(begin)), "--real", real, name=done)
        students = [done] if init == "ar" else [done, begin]
        commands += [
            self._eval(student, steps) for steps in (FEW_STEPS[1], FEW_STEPS[2], FEW_STEPS[0]) for student in students
        ]
        return Run(done, tuple(needs), tuple(commands))

    def _train(self, stage: str, layout: str, seed: int, *more: str, name: str = "") -> tuple[tuple[str, ...], ...]:
        name = name or (stage if stage == "base" else f"{layout}-{stage}")
        if self.teachers is not None and stage in ("ar", "base"):
            return (("adopt", str(self.teachers / name), str(self.work), name),)
        config, out = str(self._config(layout, seed)), str(self.work / "runs" / name)
        train = ("distill", "--config", config, "--stage", stage, "--out", out, *more)
        return train, ("pack", config, out, str(self.work / "students" / name), str(self.work / "codec.safetensors"))

    def _eval(self, student: str, steps: tuple[int, ...], seeds: int | None = None) -> tuple[str, ...]:
        command = ["world-eval", "--student", f"{student}={self.work / 'students' / student}", "--no-pace"]
        command += ["--steps", ",".join(map(str, steps)), "--frames", str(self.frames), "--device", self.eval_device]
        command += ["--episodes", str(self.episodes), "--seeds", str(seeds or self.eval_seeds)]
        return *command, "--json", str(self.work / "rows" / f"{student}.jsonl")

    @property
    def eval_device(self) -> str:
        import torch

        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"

    def _config(self, layout: str, seed: int) -> Path:
        return self.work / "configs" / f"{layout}-s{seed}.yaml"

    def _weights(self, run: str) -> Path:
        return self.work / "runs" / run / "student.safetensors"
