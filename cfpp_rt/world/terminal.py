"""Frames in a terminal, with two pixels per character cell (an upper half block in two colours), and its keys."""

import os
import select
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.errors import InputError

_KEYS = {
    b"\x1b[A": "up",
    b"\x1b[B": "down",
    b"\x1b[C": "right",
    b"\x1b[D": "left",
    b"\x1bOA": "up",  # as sent in application mode
    b"\x1bOB": "down",
    b"\x1bOC": "right",
    b"\x1bOD": "left",
    b"w": "up",
    b"s": "down",
    b"d": "right",
    b"a": "left",
    b" ": "interact",
    b"e": "interact",
    b"r": "restart",
    b"q": "quit",
    b"\x03": "quit",
    b"\x04": "quit",
    b"\x1b": "quit",
}
_ENTER = "\x1b[?1049h\x1b[?25l\x1b[2J"  # alternate screen, no cursor
_LEAVE = "\x1b[0m\x1b[?25h\x1b[?1049l"


def cells(frame: NDArray[np.uint8]) -> str:
    """Return a frame uint8 [height, width, 3] of even height as lines of half blocks in 24-bit colours."""
    lines = []
    for upper, lower in zip(frame[::2], frame[1::2], strict=True):
        line, before = [], None
        for top, bottom in zip(upper.tolist(), lower.tolist(), strict=True):
            colours = (*top, *bottom)
            if colours != before:  # send a colour once per run
                line.append("\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*colours))
                before = colours
            line.append("\N{UPPER HALF BLOCK}")
        lines.append("".join(line) + "\x1b[0m")
    return "\r\n".join(lines)


def keys(typed: bytes) -> list[str]:
    """Return the names of typed keys; unknown keys are left out."""
    names, longest = [], max(map(len, _KEYS))
    while typed:
        for length in range(longest, 0, -1):
            if typed[:length] in _KEYS:
                names.append(_KEYS[typed[:length]])
                break
        else:
            length = 1
        typed = typed[length:]
    return names


class Screen:
    """The terminal in use; `screen` makes it."""

    def show(self, frame: NDArray[np.uint8], status: str) -> None:
        """Draw a frame uint8 [height, width, 3], enlarged by an integer factor to fit, and a line below it."""
        columns, lines = shutil.get_terminal_size()
        height, width = frame.shape[:2]
        factor = max(1, min(columns // width, 2 * (lines - 1) // height))
        shown = frame.repeat(factor, 0).repeat(factor, 1)
        text = f"\x1b[H{cells(shown)}\r\n\x1b[K{status[: columns - 1]}"
        sys.stdout.write(text)
        sys.stdout.flush()

    def typed(self, seconds: float) -> list[str]:
        """Return the keys typed so far, or the first within a number of seconds."""
        ready, _, _ = select.select([sys.stdin], [], [], max(0.0, seconds))
        return keys(os.read(sys.stdin.fileno(), 1024)) if ready else []


@contextmanager
def screen() -> Iterator[Screen]:
    """Take over the terminal and restore it at exit, also after an error. Raise InputError if there is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError("stdin and stdout must be a terminal, got a pipe or a file")
    import termios
    import tty

    before = termios.tcgetattr(sys.stdin)
    try:
        tty.setraw(sys.stdin)
        sys.stdout.write(_ENTER)
        yield Screen()
    finally:
        sys.stdout.write(_LEAVE)
        sys.stdout.flush()
        termios.tcsetattr(sys.stdin, termios.TCSAFLUSH, before)
