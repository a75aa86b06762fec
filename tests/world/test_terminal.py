"""Half blocks and keys; the terminal is given back as it was."""

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import numpy as np
import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.world.terminal import Screen, cell_colours, cells, changed_cells, keys, screen


def test_two_pixels_per_cell_and_one_colour_code_per_run():
    frame = np.zeros((4, 3, 3), dtype=np.uint8)
    frame[0] = (255, 0, 0)
    frame[1] = (0, 255, 0)
    frame[2:, 2] = (1, 2, 3)
    first, second = cells(frame).split("\r\n")
    assert first.count("\N{UPPER HALF BLOCK}") == second.count("\N{UPPER HALF BLOCK}") == 3
    assert re.findall(r"38;2;([\d;]+);48;2;([\d;]+)m", first) == [("255;0;0", "0;255;0")]
    assert re.findall(r"38;2;([\d;]+);48;2;([\d;]+)m", second) == [("0;0;0", "0;0;0"), ("1;2;3", "1;2;3")]


def test_keys_are_split_and_unknown_ones_left_out():
    assert keys(b"\x1b[A\x1b[Dx \x1bOCq") == ["up", "left", "interact", "right", "quit"]
    assert keys(b"\x1b") == ["quit"] and keys(b"\x03") == ["quit"] and keys(b"") == []


def test_no_terminal_is_an_error(monkeypatch):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(InputError, match="must be a terminal"), screen():
            pass


@pytest.mark.parametrize("ends", ["pass", "raise SystemExit(7)", "raise KeyboardInterrupt"])
def test_the_terminal_is_given_back(ends):
    leader, follower = pty.openpty()
    before = termios.tcgetattr(follower)
    code = f"from cfpp_rt.world.terminal import screen\nwith screen():\n    {ends}"
    subprocess.run([sys.executable, "-c", code], stdin=follower, stdout=follower, stderr=subprocess.DEVNULL, timeout=60)
    assert termios.tcgetattr(follower) == before
    written = os.read(leader, 4096)
    assert written.startswith(b"\x1b[?1049h") and written.endswith(b"\x1b[?1049l")


def test_only_changed_cells_are_sent():
    before = np.zeros((4, 6, 3), dtype=np.uint8)
    after = before.copy()
    after[2, 1:3] = (9, 8, 7)
    after[3, 5] = (1, 2, 3)
    drawn = changed_cells(cell_colours(before), cell_colours(after))
    block = "\N{UPPER HALF BLOCK}"
    assert drawn == (
        f"\x1b[2;2H\x1b[38;2;9;8;7;48;2;0;0;0m{block}{block}\x1b[0m\x1b[2;6H\x1b[38;2;0;0;0;48;2;1;2;3m{block}\x1b[0m"
    )
    assert changed_cells(cell_colours(after), cell_colours(after)) == ""


def test_frames_that_a_slow_terminal_does_not_take_are_dropped_and_the_newest_is_drawn(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("LINES", "60")
    reader, display = os.pipe()
    keyboard, typist = os.pipe()
    os.set_blocking(display, False)
    terminal, received = Screen(keyboard, display), b""
    frames = np.random.default_rng(0).integers(0, 255, (20, 48, 48, 3), dtype=np.uint8)
    for number, frame in enumerate(frames):  # the pipe is full after the first few: none of these calls waits
        terminal.show(frame, f"frame {number}")
        assert terminal.typed(0) == []
    os.write(typist, b"q")
    assert terminal.typed(1) == ["quit"]
    os.set_blocking(reader, False)
    for _ in range(1000):
        try:
            received += os.read(reader, 4096)
        except BlockingIOError:
            if not terminal._unsent:
                break
            terminal.typed(0)
    terminal.show(frames[19], "frame 19")
    assert not received.count(b"frame 10") and b"frame 0" in received
    assert (terminal._colours == cell_colours(frames[19].repeat(2, 0).repeat(2, 1))).all()
    os.write(typist, b"")
    os.close(typist)
    assert terminal.typed(1) == ["quit"]  # a terminal that is gone
    for descriptor in (reader, display, keyboard):
        os.close(descriptor)


@pytest.mark.parametrize("fps", ["10", "1000"])
@pytest.mark.parametrize("speed", [0, 700_000], ids=["stopped", "slow"])
@pytest.mark.parametrize("key", [b"q", b"\x03"], ids=["q", "ctrl-c"])
def test_play_ends_over_a_slow_terminal_and_restores_it(fps, speed, key):
    """The reader of the terminal takes `speed` bytes per second, or nothing once the play has begun."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 60, 200, 0, 0))
    before = termios.tcgetattr(follower)
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    process = subprocess.Popen(
        [sys.executable, "-m", "cfpp_rt.cli", "play", "--fps", fps],
        stdin=follower,
        stdout=follower,
        stderr=subprocess.DEVNULL,
        env=environment,
        cwd=Path(__file__).parents[2],
    )
    try:
        received = b""
        while b"frame" not in received:  # it plays
            received += os.read(leader, 4096)
        received, began, sent = b"", time.monotonic(), False
        while process.poll() is None and time.monotonic() - began < 20:
            if speed:
                received += os.read(leader, 7000) if select.select([leader], [], [], 0.01)[0] else b""
            time.sleep(0.01)
            if not sent and time.monotonic() - began > 1:
                os.write(leader, key)
                sent, began = True, time.monotonic()
        assert process.poll() == 0 and time.monotonic() - began < 10
        assert termios.tcgetattr(follower) == before
        while select.select([leader], [], [], 0.1)[0]:
            received += os.read(leader, 4096)
        assert received.endswith(b"\x1b[?1049l")
    finally:
        process.kill()
        process.wait()
        os.close(leader)
        os.close(follower)
