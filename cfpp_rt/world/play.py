"""The command `cfpp play`: the built-in world in a terminal. The student makes every frame after the first."""

import argparse
import time

from cfpp_rt.errors import InputError
from cfpp_rt.pipeline import choose_threads
from cfpp_rt.runtime.stream import Stream
from cfpp_rt.world.simulator import ACTIONS
from cfpp_rt.world.sprites import SIZE
from cfpp_rt.world.student import SHIPPED, load_world_pipeline, start
from cfpp_rt.world.terminal import screen

_HELD_S = 0.25  # terminals report no key releases: a key counts as held for this long after its last repeat


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.epilog = "keys: arrows or wasd move, space opens and closes the gate, r: another arena, q: quit"
    parser.add_argument("--seed", type=int, default=0, help="seed of the arena and of the student's noise (default: 0)")
    parser.add_argument("--fps", type=float, default=10.0, help="most frames per second (default: %(default)s)")
    parser.add_argument(
        "--student", metavar="DIR", default=SHIPPED, help="folder of a student (default: the shipped one)"
    )


def run(arguments: argparse.Namespace) -> None:
    if not 0 <= arguments.seed < 2**62:
        raise InputError(f"--seed must be in 0..2**62 - 1, got {arguments.seed}")
    if not 0.1 <= arguments.fps <= 1000:
        raise InputError(f"--fps must be in 0.1..1000, got {arguments.fps}")
    pipeline = load_world_pipeline(arguments.student)
    choose_threads(pipeline, pipeline.config, (SIZE, SIZE))
    seed, again = arguments.seed, True
    with screen() as terminal:
        while again:
            stream = start(pipeline, seed, config=pipeline.config.replace(refresh="separate"))
            again = _play(stream, terminal, 1 / arguments.fps)
            seed += 1


def _play(stream: Stream, terminal, interval: float) -> bool:  # type: ignore[no-untyped-def]
    """Play in one arena; return True when the player wants another arena, False to quit."""
    terminal.show(next(stream).pixels[0, -1].numpy(), "")
    held, until, due = "none", 0.0, time.monotonic()
    while True:
        due = max(due + interval, time.monotonic())
        stream.refresh()  # run the clean pass in the idle time, to shorten the latency of a key
        while True:  # keys are polled at least once per frame, however late it is
            names = terminal.typed(max(0.0, due - time.monotonic()))
            if "quit" in names or "restart" in names:
                return "quit" not in names
            if names:
                held, until = names[-1], time.monotonic() + _HELD_S
                if "interact" in names:  # must not be lost to an arrow typed with it
                    held = "interact"
            if time.monotonic() >= due:
                break
        began = time.perf_counter()
        stream.set_actions(ACTIONS.index(held))
        pixels = next(stream).pixels[0, -1].numpy()
        spent = 1000 * (time.perf_counter() - began)
        frame = stream.rollout.next_latent_frame
        terminal.show(pixels, f" {held:<9} frame {frame:<6} {spent:5.1f} ms   arrows, space, r: new arena, q: quit")
        if held == "interact" or time.monotonic() > until:
            held = "none"
