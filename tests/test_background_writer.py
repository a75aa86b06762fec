"""`BackgroundWriter`: order, a bounded queue, errors and aborts, of a controlled writer and of files."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cfpp_rt.errors import InputError
from cfpp_rt.io.background import BackgroundWriter
from cfpp_rt.io.video import FrameWriter, RawWriter, open_writer
from cfpp_rt.values import Frames

ROOT = Path(__file__).parent.parent
WAIT_S = 30  # for what must happen; only a failing test waits so long


class Controlled(FrameWriter):
    """Keeps the indices of its frames. Frames wait for `open`; the frame `fails_at`, or "finish", raises."""

    def __init__(self, fails_at=None):
        super().__init__()
        self.open, self.started = threading.Event(), threading.Event()
        self.fails_at, self.indices, self.ended = fails_at, [], None

    def _put(self, frame, index):
        self.started.set()
        assert self.open.wait(WAIT_S)
        if index == self.fails_at:
            raise InputError("no space left")
        assert int(frame[0, 0, 0]) == index
        self.indices.append(index)

    def _finish(self):
        if self.fails_at == "finish":
            raise InputError("no space left")
        self.ended = "finished"

    def _drop(self):
        self.ended = "dropped"


def frames(start, count=1):
    values = torch.arange(start, start + count, dtype=torch.uint8)
    return Frames(values[None, :, None, None, None].expand(1, count, 2, 2, 3), start)


def opened(**options):
    inner = Controlled(**options)
    inner.open.set()
    return inner


def no_thread_is_left():
    return not [thread for thread in threading.enumerate() if thread.name == "frame writer"]


def test_frames_arrive_in_order_before_close_returns():
    inner = opened()
    with BackgroundWriter(inner, queued=2) as writer:
        for start in range(0, 60, 3):
            writer.write(frames(start, 3))
    assert inner.indices == list(range(60)) and inner.ended == "finished"
    assert writer.work_s > 0 and no_thread_is_left()


def test_a_slow_writer_makes_the_producer_wait():
    inner, written = Controlled(), []
    writer = BackgroundWriter(inner, queued=2)

    def produce():
        for i in range(10):
            writer.write(frames(i))
            written.append(i)

    producer = threading.Thread(target=produce)
    producer.start()
    assert inner.started.wait(WAIT_S)
    while len(written) < 3:  # one frame in progress, two in the queue
        time.sleep(0.001)
    time.sleep(0.05)
    assert len(written) == 3
    inner.open.set()
    producer.join(WAIT_S)
    writer.close()
    assert inner.indices == list(range(10))


@pytest.mark.parametrize("fails_at", [0, 4])
def test_an_error_is_raised_by_a_later_write(fails_at):
    inner = opened(fails_at=fails_at)
    with pytest.raises(InputError, match="no space left"), BackgroundWriter(inner, queued=2) as writer:
        for i in range(100):
            writer.write(frames(i))
    assert i < 20 and inner.indices == list(range(fails_at)) and inner.ended == "dropped"
    assert no_thread_is_left()


@pytest.mark.parametrize("fails_at", [2, "finish"])
def test_an_error_is_raised_by_close(fails_at):
    inner = Controlled(fails_at=fails_at)
    writer = BackgroundWriter(inner)
    for i in range(3):
        writer.write(frames(i))
    inner.open.set()
    with pytest.raises(InputError, match="no space left"):
        writer.close()
    assert inner.ended == ("dropped" if fails_at == 2 else None) and no_thread_is_left()


def test_abort_drops_what_waits():
    inner = Controlled()
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(inner, queued=8) as writer:
        for i in range(8):
            writer.write(frames(i))
        assert inner.started.wait(WAIT_S)
        threading.Timer(0.1, inner.open.set).start()
        raise KeyboardInterrupt
    assert inner.indices == [0] and inner.ended == "dropped" and no_thread_is_left()


def test_abort_abandons_a_writer_that_is_stuck(monkeypatch):
    monkeypatch.setattr("cfpp_rt.io.background._ABORT_S", 0.3)
    inner, began = Controlled(), time.monotonic()
    with pytest.raises(KeyboardInterrupt), BackgroundWriter(inner, queued=2) as writer:
        for i in range(3):
            writer.write(frames(i))
        raise KeyboardInterrupt
    assert 0.3 <= time.monotonic() - began < WAIT_S and not no_thread_is_left()
    inner.open.set()  # whatever it waited for comes after all
    while not no_thread_is_left() and time.monotonic() - began < WAIT_S:
        time.sleep(0.01)
    assert inner.ended == "dropped" and inner.indices == [0]


def test_nothing_written_and_wrong_frames(tmp_path):
    with pytest.raises(InputError, match="no frames were written"):
        BackgroundWriter(RawWriter(tmp_path / "a.rgb")).close()
    with pytest.raises(InputError, match="pixels must be uint8"), BackgroundWriter(RawWriter(tmp_path / "a.rgb")) as w:
        w.write(Frames(torch.zeros(1, 1, 2, 2, 3), 0))
    assert not os.listdir(tmp_path) and no_thread_is_left()


def test_a_video_file(tmp_path):
    av = pytest.importorskip("av")
    pixels = torch.randint(0, 255, (2, 50, 32, 48, 3), dtype=torch.uint8)
    with BackgroundWriter(open_writer(tmp_path / "a.mp4"), row=1) as writer:
        writer.write(Frames(pixels, 0))
    with open_writer(tmp_path / "b.mp4", row=1) as plain:
        plain.write(Frames(pixels, 0))
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    with av.open(str(tmp_path / "a.mp4")) as container:
        assert len(list(container.decode(video=0))) == 50
    with pytest.raises(RuntimeError), BackgroundWriter(open_writer(tmp_path / "c.mp4")) as writer:
        writer.write(Frames(pixels, 0))
        raise RuntimeError
    assert sorted(os.listdir(tmp_path)) == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_leaves_no_file_and_no_process(tmp_path, number):
    pytest.importorskip("av")
    arguments = ["generate", "--student", "world", "--actions", "right*1000000", "-o", str(tmp_path / "a.mp4")]
    child = subprocess.Popen([sys.executable, "-m", "cfpp_rt.cli", *arguments], cwd=ROOT, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 2 * WAIT_S
        while not any(path.stat().st_size for path in tmp_path.iterdir()):  # the encoder has written something
            assert child.poll() is None and time.monotonic() < deadline
            time.sleep(0.05)
        child.send_signal(number)
        assert child.wait(WAIT_S) == (143 if number == signal.SIGTERM else 130)
    finally:
        child.kill()
    assert not os.listdir(tmp_path)
