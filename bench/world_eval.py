"""Evaluate students of the built-in world: how well they keep to its rules, and how fast they run.

Every student plays unseen arenas beside the simulator with the same keys; `cfpp_rt.world.evaluate` defines the scores.
Each seed means other arenas, other keys and other noise.

    cfpp world-eval --student cd=runs/cd --student dmd=runs/dmd --steps 1000,500 --steps 1000 --frames 300
"""

import argparse
import statistics
from typing import Any

import torch

from cfpp_rt.bench import harness
from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_writable
from cfpp_rt.options import parse_steps
from cfpp_rt.pipeline import Pipeline, choose_threads
from cfpp_rt.world.evaluate import ERROR_FRAMES, pace, run_episodes, score
from cfpp_rt.world.sprites import SIZE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline

_COLUMNS = {  # metric: (heading, digits)
    "follow": ("follow", 3),
    "follow_moving": ("moving", 3),
    "error_16_px": ("px @16", 2),
    "error_64_px": ("px @64", 2),
    "error_300_px": ("px @300", 2),
    "clean": ("clean", 3),
    "colour": ("colour", 3),
    "first_ms": ("first ms", 0),
    "fps": ("fps", 0),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--student", action="append", metavar="[NAME=]DIR", help="student to evaluate (default: the shipped one)"
    )
    parser.add_argument(
        "--steps", action="append", metavar="LIST", help="timesteps such as 1000,500 (default: the student's own)"
    )
    parser.add_argument("--frames", type=int, default=64, help="frames of an episode (default: %(default)s)")
    parser.add_argument("--episodes", type=int, default=32, help="episodes per seed (default: %(default)s)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds, for the spread (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="cpu or cuda (default: %(default)s)")
    parser.add_argument("--no-pace", action="store_true", help="leave out first_ms and fps")
    parser.add_argument("--json", metavar="PATH", help="append the rows as JSON lines")


def run(arguments: argparse.Namespace) -> None:
    for name in ("frames", "episodes", "seeds"):
        if getattr(arguments, name) < 1:
            raise InputError(f"--{name} must be >= 1, got {getattr(arguments, name)}")
    if arguments.json is not None:
        require_writable(arguments.json, "--json", append=True)
    students = dict(_named(text) for text in arguments.student or [f"shipped={SHIPPED}"])
    steps = [parse_steps(text) for text in arguments.steps or []]
    rows: list[dict[str, Any]] = []
    device = torch.device(arguments.device)
    hidden = {"first_ms", "fps"} if arguments.no_pace else set()
    hidden |= {f"error_{n}_px" for n in ERROR_FRAMES if n > arguments.frames}
    shown = [key for key in _COLUMNS if key not in hidden]
    print(f"{'student':<16}{'steps':<22}" + "".join(f"{_COLUMNS[key][0]:>10}" for key in shown))
    for name, folder in students.items():
        pipeline = load_world_pipeline(folder, device=device)
        for own in steps or [pipeline.config.steps]:
            config = pipeline.config.replace(steps=own)
            choose_threads(pipeline, config, (SIZE, SIZE), arguments.episodes)
            made = [_row(name, pipeline, config, arguments, seed) for seed in range(arguments.seeds)]
            rows += made
            print(_line(name, own, made, shown))
    harness.record(rows, arguments.json, device)


def _row(
    name: str, pipeline: Pipeline, config: RolloutConfig, arguments: argparse.Namespace, seed: int
) -> dict[str, Any]:
    n = config.frames_per_block
    num_frames = -(-arguments.frames // n) * n
    episodes = run_episodes(
        pipeline, config, episodes=arguments.episodes, num_frames=num_frames, seed=seed, noise_seed=seed
    )
    return {
        "bench": "world_eval",
        "student": name,
        "steps": list(config.steps),
        "frames_per_block": n,
        "frames": num_frames,
        "episodes": arguments.episodes,
        "seed": seed,
        **score(episodes),
        **({} if arguments.no_pace else pace(pipeline, config, num_frames=60, seed=seed)),
    }


def _line(name: str, steps: tuple[int, ...], rows: list[dict[str, Any]], shown: list[str]) -> str:
    """Return the means over the seeds, and in a second line half the range from minimum to maximum."""
    means, spreads = [], []
    for key in shown:
        values, digits = [row[key] for row in rows], _COLUMNS[key][1]
        means.append(f"{statistics.mean(values):>10.{digits}f}")
        spreads.append(f"{'+-' + format((max(values) - min(values)) / 2, f'.{digits}f'):>10}")
    listed = ",".join(map(str, steps))
    return f"{name:<16}{listed:<22}" + "".join(means) + f"\n{'':<38}" + "".join(spreads)


def _named(text: str) -> tuple[str, str]:
    name, found, folder = text.partition("=")
    return (name, folder) if found else (text, text)
