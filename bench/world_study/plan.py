"""The runs of the world's study: which there are, what each waits for and which commands it is made of."""

import dataclasses
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError

LAYOUTS = {"frame": (1, 3), "chunk": (3, 6)}  # frames of a block, frames seen: the block and those before it
INITS = ("ar", "ode", "cd")
FEW = ((1000,), (1000, 250), (1000, 750, 500, 250))
MANY = tuple(round(1000 * (1 - i / 16)) for i in range(16))  # of the multi-step teacher


@dataclasses.dataclass(frozen=True)
class Run:
    """One process. needs: runs that are to be done before. commands: words, of `cfpp` or of `world_study --do`."""

    name: str
    needs: tuple[str, ...]
    commands: tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Study:
    """What the study is made of. config: a training config with all stages, the world's own feed as its data.

    work: folder of data, checkpoints and students. clips, trajectories: how many are stored. seeds: of training;
    teachers have one. frames, episodes, eval_seeds: of an evaluation. jobs: processes at once. steps: of a stage,
    instead of the config's. teachers: folder of an earlier study's students, whose teachers and score are taken over
    instead of trained. only: names of runs, with those that they wait for; none = all.
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
        """The config of the runs of one layout and seed, from the study's."""
        block, window = LAYOUTS[layout]
        stored = {"source": "cfpp_rt.distill.data.data_source:open_data_source", "folder": str(self.work / "clips"), "seed": seed}
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
        """In the order in which they are to begin where several can. Raises InputError for a name in `only` of none."""
        found = {run.name: run for run in self._all_runs()}
        unknown = [name for name in self.only if name not in found]
        if unknown:
            raise InputError(f"only must name runs of {', '.join(found)}, got {', '.join(unknown)}")
        wanted, reached = list(self.only or found), set()
        while wanted:
            name = wanted.pop()
            reached.add(name)
            wanted += [needed for needed in found[name].needs if needed not in reached]
        return [run for name, run in found.items() if name in reached]

    def _all_runs(self) -> list[Run]:
        clips = ("clips", str(self.config), str(self.clips), str(self.work), str(self.jobs))
        found = [Run("clips", (), (clips,))]
        found += [Run(f"{layout}-ar", ("clips",), self._train("ar", layout, 0)) for layout in LAYOUTS]
        found.append(Run("base", ("clips",), self._train("base", "frame", 0)[:1]))
        found += [self._trajectories(layout) for layout in LAYOUTS]
        for seed in range(self.seeds):
            found += [self._student(init, layout, seed) for init in ("cd", "ode", "ar") for layout in LAYOUTS]
        for layout in LAYOUTS:
            name = f"{layout}-ar"
            # There is one teacher: it is evaluated with as many seeds as there are of a student's training.
            evaluated = [self._eval(name, steps, max(self.eval_seeds, self.seeds)) for steps in (*FEW, MANY)]
            found.append(Run(f"{name}-eval", (name,), tuple(evaluated)))
        return found

    def _trajectories(self, layout: str) -> Run:
        teacher, out = f"{layout}-ar", f"{layout}-trajectories"
        words = ["distill-data", "trajectories", str(self.work / "clips"), "--config", str(self._config(layout, 0))]
        words += ["--teacher", str(self._weights(teacher)), "--out", str(self.work / out)]
        return Run(out, (teacher,), ((*words, "--batch", "64", "--clips", str(self.trajectories)),))

    def _student(self, init: str, layout: str, seed: int) -> Run:
        """Stages 2 and 3 of one student, and what is measured of it."""
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
        commands += [self._eval(student, steps) for steps in (FEW[1], FEW[2], FEW[0]) for student in students]
        return Run(done, tuple(needs), tuple(commands))

    def _train(self, stage: str, layout: str, seed: int, *more: str, name: str = "") -> tuple[tuple[str, ...], ...]:
        name = name or (stage if stage == "base" else f"{layout}-{stage}")
        if self.teachers is not None and stage in ("ar", "base"):
            return (("adopt", str(self.teachers / name), str(self.work), name),)
        config, out = str(self._config(layout, seed)), str(self.work / "runs" / name)
        train = ("distill", "--config", config, "--stage", stage, "--out", out, *more)
        return train, ("pack", config, out, str(self.work / "students" / name), str(self.work / "codec.safetensors"))

    def _eval(self, student: str, steps: tuple[int, ...], seeds: int | None = None) -> tuple[str, ...]:
        words = ["world-eval", "--student", f"{student}={self.work / 'students' / student}", "--no-pace"]
        words += ["--steps", ",".join(map(str, steps)), "--frames", str(self.frames), "--device", self.eval_device]
        words += ["--episodes", str(self.episodes), "--seeds", str(seeds or self.eval_seeds)]
        return *words, "--json", str(self.work / "rows" / f"{student}.jsonl")

    @property
    def eval_device(self) -> str:
        import torch

        return "cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu"

    def _config(self, layout: str, seed: int) -> Path:
        return self.work / "configs" / f"{layout}-s{seed}.yaml"

    def _weights(self, run: str) -> Path:
        return self.work / "runs" / run / "student.safetensors"
