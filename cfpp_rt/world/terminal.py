"""Frames in a terminal, with two pixels per character cell (an upper half block in two colours), and its keys."""

import os
import select
import shutil
import sys
import time
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
_LEAVE_S = 1.0  # how long the end waits for a terminal that takes nothing


def cell_colours(frame: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Return the colours of a frame's cells, top and bottom: uint8 [height, width, 3] to [height / 2, width, 6]."""
    return np.concatenate([frame[::2], frame[1::2]], axis=2)


def cells(frame: NDArray[np.uint8]) -> str:
    """Return a frame uint8 [height, width, 3] of even height as lines of half blocks in 24-bit colours."""
    return "\r\n".join(_half_blocks(line) for line in cell_colours(frame))


def changed_cells(before: NDArray[np.uint8], after: NDArray[np.uint8]) -> str:
    """Return what turns the cells `before` into `after`, both as `cell_colours` returns them: moves and half blocks."""
    text = []
    for row, changed in enumerate((before != after).any(axis=2)):
        columns = np.flatnonzero(changed)
        for run in np.split(columns, np.flatnonzero(np.diff(columns) > 1) + 1):
            if len(run):
                text.append(f"\x1b[{row + 1};{run[0] + 1}H{_half_blocks(after[row, run[0] : run[-1] + 1])}")
    return "".join(text)


def _half_blocks(colours: NDArray[np.uint8]) -> str:
    """Return a row of cells, colours uint8 [cells, 6], as half blocks."""
    line, before = [], None
    for cell in colours.tolist():
        if cell != before:  # send a colour once per run
            line.append("\x1b[38;2;{};{};{};48;2;{};{};{}m".format(*cell))
            before = cell
        line.append("\N{UPPER HALF BLOCK}")
    return "".join(line) + "\x1b[0m"


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
    """The terminal in use; `screen` makes it.

    Output never waits for the terminal: what it does not take yet is sent while keys are awaited, and frames that are
    shown meanwhile are dropped, so a slow terminal shows fewer frames and no key waits.

    keyboard, display: file descriptors; display does not block.
    """

    def __init__(self, keyboard: int, display: int):
        self._keyboard, self._display = keyboard, display
        self._unsent = b""
        self._size: tuple[int, int] | None = None  # of the terminal, when the last frame was drawn
        self._colours, self._status = np.empty((0, 0, 6), np.uint8), ""  # as drawn

    def show(self, frame: NDArray[np.uint8], status: str) -> None:
        """Draw a frame uint8 [height, width, 3], enlarged by an integer factor to fit, and a line below it.

        Only what has changed is sent; nothing, if the terminal has not taken the frame before yet.
        """
        self.send()
        if self._unsent:
            return
        columns, lines = size = shutil.get_terminal_size()
        height, width = frame.shape[:2]
        factor = max(1, min(columns // width, 2 * (lines - 1) // height))
        colours, status = cell_colours(frame.repeat(factor, 0).repeat(factor, 1)), status[: columns - 1]
        if size != self._size:
            text = f"\x1b[2J\x1b[H{cells(frame.repeat(factor, 0).repeat(factor, 1))}"
        else:
            text = changed_cells(self._colours, colours)
        if size != self._size or status != self._status:
            text += f"\x1b[{len(colours) + 1};1H\x1b[K{status}"
        self._size, self._colours, self._status = size, colours, status
        self._unsent = text.encode()
        self.send()

    def send(self, text: str = "") -> None:
        """Send as much as the terminal takes now of what is unsent and of `text`."""
        self._unsent += text.encode()
        while self._unsent:
            try:
                self._unsent = self._unsent[os.write(self._display, self._unsent) :]
            except BlockingIOError:
                return

    def typed(self, seconds: float) -> list[str]:
        """Return the keys typed so far, or the first within a number of seconds; send what is unsent meanwhile."""
        end = time.monotonic() + seconds
        while True:
            left = max(0.0, end - time.monotonic())
            display = [self._display] if self._unsent else []
            readable, writable, _ = select.select([self._keyboard], display, [], left)
            if writable:
                self.send()
            if readable:
                typed = os.read(self._keyboard, 1024)
                return keys(typed) if typed else ["quit"]  # nothing to read: the terminal is gone
            if time.monotonic() >= end:
                return []

    def leave(self) -> None:
        """Send the end of the drawing; drop what is unsent, and with it what the terminal has not taken yet."""
        import termios

        if self._unsent:
            termios.tcflush(self._display, termios.TCOFLUSH)
        self._unsent = _LEAVE.encode()
        end = time.monotonic() + _LEAVE_S
        self.send()
        while self._unsent and (left := end - time.monotonic()) > 0:
            select.select([], [self._display], [], left)
            self.send()


@contextmanager
def screen() -> Iterator[Screen]:
    """Take over the terminal and restore it at exit, also after an error. Raise InputError if there is no terminal."""
    if not (sys.stdin.isatty() and sys.stdout.isatty()):
        raise InputError("stdin and stdout must be a terminal, got a pipe or a file")
    import termios
    import tty

    sys.stdout.flush()
    keyboard = sys.stdin.fileno()
    with _without_blocking(sys.stdout.fileno()) as display:
        before, terminal = termios.tcgetattr(keyboard), Screen(keyboard, display)
        try:
            tty.setraw(keyboard)
            terminal.send(_ENTER)
            yield terminal
        finally:
            try:
                terminal.leave()
            finally:
                termios.tcflush(keyboard, termios.TCIFLUSH)
                termios.tcsetattr(keyboard, termios.TCSANOW, before)  # without waiting for a terminal that is stopped


@contextmanager
def _without_blocking(terminal: int) -> Iterator[int]:
    """Return a descriptor of a terminal whose writes do not block; other users of the terminal keep theirs."""
    try:
        display = os.open(os.ttyname(terminal), os.O_WRONLY | os.O_NOCTTY | os.O_NONBLOCK)
    except OSError:  # its name is not visible here, as in some containers
        os.set_blocking(terminal, False)
        try:
            yield terminal
        finally:
            os.set_blocking(terminal, True)
        return
    try:
        yield display
    finally:
        os.close(display)
