"""The study of the world: its plan is complete, its commands parse, and a failed run affects only its dependents."""

import argparse
import importlib
from pathlib import Path

import pytest

from cfpp_rt.bench.world_study import run as study_run
from cfpp_rt.bench.world_study import steps
from cfpp_rt.bench.world_study.plan import FEW_STEPS, INITS, LAYOUTS, Run, Study
from cfpp_rt.bench.world_study.table import groups, spread, table
from cfpp_rt.cli.main import COMMANDS
from cfpp_rt.distill.settings import Settings

CONFIG = Path(__file__).parents[2] / "configs" / "world-study.yaml"
SIZES = {"clips": 8, "trajectories": 4, "seeds": 2, "frames": 18, "episodes": 2, "eval_seeds": 1, "jobs": 2}


@pytest.fixture
def study(tmp_path):
    return Study(config=CONFIG, work=tmp_path / "work", device="cpu", steps={"dmd": 7}, **SIZES)


def test_every_run_needs_the_runs_whose_files_it_reads(study):
    runs = {run.name: run for run in study.runs()}
    assert len(runs) == len(study.runs()) == 4 + 2 * len(LAYOUTS) + len(LAYOUTS) * len(INITS) * study.seeds
    made: dict[str, set[str]] = {}  # files that exist once a run is done
    for run in runs.values():
        made[run.name] = {str(study.work / "clips"), str(study.work / "configs")} if run.name == "clips" else set()
        known = set().union(*(made[name] for name in run.needs), made["clips"], made[run.name])
        for name, *options in run.commands:
            if name in COMMANDS:
                module = importlib.import_module(COMMANDS[name][0])
                parser = argparse.ArgumentParser()
                module.add_arguments(parser)
                arguments = vars(parser.parse_args(options))
                for option in ("init", "real", "teacher"):
                    if arguments.get(option) is not None:
                        assert str(arguments[option].parent) in known, (run.name, option)
                out = arguments.get("out") or ""
            else:
                out = options[2]
            known.add(out)
            made[run.name].add(out)
        if "ode" in run.name:
            assert str(study.work / f"{run.name.split('-')[0]}-trajectories") in known


def test_configs_of_layouts_and_seeds(study):
    steps.write_configs(study)
    for layout, (block, window) in LAYOUTS.items():
        for seed in range(study.seeds):
            found = Settings.read(study.work / "configs" / f"{layout}-s{seed}.yaml")
            assert (found.layout.block, found.layout.window) == (block, window)
            assert (found.rollout.frames_per_block, found.rollout.window) == (block, window)
            assert {own.seed for own in found.stages.values()} == {seed} and found.data["seed"] == seed
            assert found.stages["dmd"].initial_frames == block and found.stages["dmd"].steps == 7
            assert found.data_of(found.stages["ode"])["folder"].endswith(f"{layout}-trajectories")
            assert {FEW_STEPS[-1]} == {found.rollout.steps}


def test_a_failed_run_stops_only_its_dependents(study, monkeypatch, capsys):
    bad = Run("bad", (), (("world-eval", "--frames", "0"),))
    runs = [bad, Run("child", ("bad",), ()), Run("grandchild", ("child",), ()), Run("other", (), ())]
    monkeypatch.setattr(Study, "runs", lambda self: runs)
    assert study_run.conduct(study, 60) == {
        "bad": "failed (2)",
        "child": "not begun: bad is not there",
        "grandchild": "not begun: child is not there",
        "other": "done",
    }
    assert "--frames must be >= 1, got 0" in capsys.readouterr().out
    late = study_run.conduct(study, -1)
    assert late["bad"] == late["other"] == "not begun: no time was left" and late["child"].startswith("not begun")


def test_spread_is_over_training_seeds_if_there_are_several():
    def row(student, seed, value):
        figures = {"follow": value, "follow_moving": value, "error_16_px": value, "clean": value, "colour": value}
        return {"bench": "world_eval", "student": student, "steps": [1000], "seed": seed, **figures}

    rows = [row("frame-ar", 0, 1.0), row("frame-ar", 1, 2.0), {"bench": "world_pace"}]
    rows += [row(f"frame-cd+dmd-s{s}", e, value) for s, e, value in ((0, 0, 1), (0, 1, 3), (1, 0, 4), (1, 1, 4))]
    found = groups(rows)
    assert [(*key[:2], len(by_seed)) for key, by_seed in found.items()] == [("frame", "ar", 1), ("frame", "cd+dmd", 2)]
    assert spread(found["frame", "ar", 1], "clean") == (1.5, 1.0, 2.0)
    assert spread(found["frame", "cd+dmd", 1], "clean") == (3.0, 2.0, 4.0)
    assert "| cd, then dmd | frame-wise | 1 | 2 | 3.000 ± 1.000 |" in table(rows)
