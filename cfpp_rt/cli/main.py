"""The `cfpp` command. It imports the module of a sub-command only when that one is run."""

import argparse
import importlib
import re
import signal
import sys
from types import FrameType
from typing import NoReturn

_LONGEST_MESSAGE = 2000  # characters

COMMANDS = {
    "generate": ("cfpp_rt.cli.generate", "prompt or image in, video out"),
    "convert": ("cfpp_rt.export.convert", "any public checkpoint to one safetensors file"),
    "export": ("cfpp_rt.export.commands", "a student to ONNX graphs, proven against PyTorch"),
    "play": ("cfpp_rt.world.play", "the built-in world in a terminal, by arrow keys"),
    "world-eval": ("cfpp_rt.bench.world_eval", "how well a student of the built-in world keeps to its rules"),
    "bench": (
        "cfpp_rt.bench.latency.command",
        "latency on this machine beside its baselines; comparison of two results",
    ),
    "distill": ("cfpp_rt.distill.command", "train a student, stage by stage"),
    "distill-data": ("cfpp_rt.distill.data.command", "folders of training data: clips, prompts, trajectories"),
    "doctor": ("cfpp_rt.cli.doctor", "what is installed, which backend runs each op, and what is missing"),
}


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {_one_line(message)}\n")


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="cfpp",
        allow_abbrev=False,
        description="Real-time runtime for few-step autoregressive video diffusion students.",
        epilog="Each command explains itself: cfpp COMMAND --help",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="store_true", help="print the version and exit")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", parser_class=_Parser)
    requested = next((word for word in argv if not word.startswith("-")), None)
    for name, (module, summary) in COMMANDS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        sub = commands.add_parser(name, help=summary, description=description, allow_abbrev=False)
        if name == requested:
            command = importlib.import_module(module)
            command.add_arguments(sub)
            sub.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    if arguments.version:
        from importlib.metadata import version

        print(f"cfpp-rt {version('cfpp-rt')}")
        raise SystemExit(0)
    if arguments.command is None:
        parser.print_help()
        raise SystemExit(2)
    return arguments


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code. An error that the user can mend is one line on stderr and exit code 2."""
    from cfpp_rt.device.threads import set_wait_policy
    from cfpp_rt.errors import InputError, MissingExtraError, NonFiniteError, OutOfMemoryError

    set_wait_policy()  # before a command imports torch
    argv = sys.argv[1:] if argv is None else argv
    for stop in (signal.SIGTERM, signal.SIGHUP):  # leave through the context managers: no half-written file stays
        signal.signal(stop, _leave)
    name = "cfpp"
    try:
        arguments = _parse(argv)
        name = f"cfpp {arguments.command}"
        arguments.run(arguments)
        sys.stdout.flush()
    except (InputError, MissingExtraError, NonFiniteError, OutOfMemoryError) as error:
        message = str(error)
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        message = f"{error.filename or 'output'}: {error.strerror or error}"
    except (RuntimeError, MemoryError) as error:
        if not _is_out_of_memory(error):
            raise
        message = f"out of memory: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
        message += "; a smaller --size, --window or --dtype bfloat16 needs less"
    else:
        return 0
    print(f"{name}: error: {_one_line(message)}", file=sys.stderr)
    return 2


def _one_line(message: str) -> str:
    """Return a message on one line; the middle of a long argument in it is left out."""
    message = re.sub(r"\S{400,}", lambda match: f"{match[0][:100]}...{match[0][-20:]}", " ".join(message.split()))
    return message if len(message) <= _LONGEST_MESSAGE else f"{message[:1000]} ... {message[-500:]}"


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def _is_out_of_memory(error: Exception) -> bool:
    text = str(error)
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or "can't allocate memory" in text
        or "not enough memory" in text
    )
