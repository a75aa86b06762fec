"""How much slower is each command beside a busy process?

Every command runs as a process of its own on the built-in world, alone and then beside `--busy` processes that compute
without end. A row has the command's own figure: seconds per frame or step where the command prints one, else the
seconds of the process. Of `--rounds` runs the fastest counts, since other work on the machine only slows a run down.

    python -m cfpp_rt.bench.model.busy [--busy 1] [--rounds 1] [--only generate-mp4 distill] [--json PATH]
"""

import argparse
import contextlib
import os
import pty
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch

from cfpp_rt.bench import harness

CFPP = (sys.executable, "-m", "cfpp_rt.cli")
ACTIONS = "right*6,up*4,left*6,down*8,interact,right*20,up*12,left*20"
PLAY_S = 10


def run(*words: str) -> tuple[str, float]:
    """Run a command; return what it printed on stdout, and its seconds. Raises CalledProcessError where it fails."""
    began = time.perf_counter()
    done = subprocess.run([*CFPP, *words], stdout=subprocess.PIPE, text=True, check=True)
    return done.stdout, time.perf_counter() - began


def printed(pattern: str, text: str) -> float:
    found = re.search(pattern, text)
    if found is None:
        raise RuntimeError(f"wanted {pattern!r} in the output, got {text!r}")
    return float(found[1])


def generate(folder: Path, name: str) -> float:
    words = ("--student", "world", "--actions", ACTIONS, "--frames", "204", "-o", str(folder / name))
    return 1 / printed(r"\bfps +([0-9.]+)", run("generate", *words)[0])


def play(folder: Path) -> float:
    """Return the median seconds from a key to the frame, in a terminal of its own, for `PLAY_S` seconds at 30 fps."""
    child, terminal = pty.fork()
    if child == 0:
        os.environ |= {"COLUMNS": "100", "LINES": "50"}
        os.execv(CFPP[0], [*CFPP, "play", "--fps", "30"])
    shown: list[bytes] = []
    end = None
    with contextlib.suppress(OSError):  # the terminal is gone when the command ends
        while part := os.read(terminal, 65536):
            shown.append(part)
            if end is None and b" ms " in part:
                end = time.monotonic() + PLAY_S
            if end is not None and time.monotonic() > end:
                os.write(terminal, b"q")
                end += PLAY_S
    os.waitpid(child, 0)
    os.close(terminal)
    found = re.findall(rb"frame +[0-9]+ +([0-9.]+) ms", b"".join(shown))
    return statistics.median(map(float, found)) / 1000


def world_eval(folder: Path) -> float:
    return run("world-eval", "--episodes", "16", "--seeds", "1", "--frames", "32")[1]


def distill(folder: Path, config: Path) -> float:
    import yaml

    settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    settings["stages"]["ar"] |= {"steps": 12, "log_every": 12}
    (folder / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    with tempfile.TemporaryDirectory(dir=folder) as out:
        words = ("--config", str(folder / "config.yaml"), "--stage", "ar", "--out", out)
        return printed(r"([0-9.]+) s/step", run("distill", *words)[0])


def verify(folder: Path) -> float:
    bundle = folder / "bundle"
    if not bundle.exists():
        run("export", "onnx", "--student", "world", "-o", str(bundle))
    return run("export", "verify", str(bundle), "--student", "world", "--quiet")[1]


def bench(folder: Path) -> float:
    words = ("--random-weights", "--model", "world", "--contenders", "ours")
    return printed(r"frame_ms_p50 +([0-9.]+)", run("bench", *words)[0]) / 1000


@contextlib.contextmanager
def busy_processes(count: int) -> Iterator[None]:
    processes = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/world.yaml"), help="default: %(default)s")
    parser.add_argument("--busy", type=int, default=1, help="busy processes (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=1, help="runs of each command (default: %(default)s)")
    parser.add_argument("--only", nargs="+", metavar="COMMAND", help="these commands of the table alone")
    parser.add_argument("--json", metavar="PATH", type=harness.json_path, help="append the rows as JSON lines")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        commands: dict[str, Callable[[], float]] = {
            "generate-mp4": partial(generate, folder, "world.mp4"),
            "generate-rgb": partial(generate, folder, "world.rgb"),
            "play": partial(play, folder),
            "world-eval": partial(world_eval, folder),
            "distill": partial(distill, folder, arguments.config),
            "verify": partial(verify, folder),
            "bench": partial(bench, folder),
        }
        if unknown := set(arguments.only or ()) - set(commands):
            parser.error(f"--only must be of {', '.join(commands)}, got {', '.join(sorted(unknown))}")
        rows = []
        print(f"{'command':<14}{'alone, s':>10}{'busy, s':>10}{'ratio':>7}   beside {arguments.busy} busy processes")
        for name in arguments.only or commands:
            alone, busy = [], []
            for _ in range(arguments.rounds):
                alone.append(commands[name]())
                with busy_processes(arguments.busy):
                    busy.append(commands[name]())
            row = {"alone_s": min(alone), "busy_s": min(busy), "ratio": min(busy) / min(alone)}
            print(f"{name:<14}{row['alone_s']:>10.4f}{row['busy_s']:>10.4f}{row['ratio']:>7.2f}", flush=True)
            rows.append({"bench": "busy", "subject": name, "busy_processes": arguments.busy, **row})
        harness.record(rows, arguments.json, torch.device("cpu"))


if __name__ == "__main__":
    main()
