"""Half blocks and keys; the terminal is given back as it was."""

import os
import pty
import re
import subprocess
import sys
import termios

import numpy as np
import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.world.terminal import cells, keys, screen


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
