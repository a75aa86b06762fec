"""Outputs of commands: refused before the work if they cannot be written, and kept once they are finished."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from cfpp_rt.bench import harness
from cfpp_rt.cli.main import main
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_new_folder, require_writable, write_atomically
from cfpp_rt.io.contact_sheet import SheetWriter
from tests.conftest import DATA
from tests.test_cli import fault

ROOT = Path(__file__).parent.parent
WAIT_S = 60  # for what must happen; only a failing test waits so long
WORLD = ["generate", "--student", "world", "--actions", "right*3", "--quiet"]
RANDOM = ["generate", "--random-weights", "--frames", "5", "--quiet"]


@pytest.fixture
def no_work(monkeypatch):
    """Fail a test whose command begins to load weights."""

    def begun(*_, **__):
        raise AssertionError("the work has begun")

    for name in (
        "cfpp_rt.cli.generate._load_pipeline",
        "cfpp_rt.world.scripted.load_world_pipeline",
        "cfpp_rt.bench.world_eval.load_world_pipeline",
        "cfpp_rt.bench.latency.workload.build",
        "cfpp_rt.export.commands.load_source",
        "cfpp_rt.export.commands.open_bundle",
        "cfpp_rt.export.convert.read_weights",
        "cfpp_rt.distill.data.command._encoder",
    ):
        monkeypatch.setattr(name, begun)


@pytest.mark.parametrize(
    "arguments",
    [
        [*WORLD, "-o", "a.mp4", "--sheet", "{}"],
        [*RANDOM, "--prompt", "x", "-o", "a.mp4", "--sheet", "{}"],
        [*WORLD, "-o", "{}"],
        ["bench", "--random-weights", "--model", "world", "--json", "{}"],
        ["bench", "--random-weights", "--model", "world", "--clients", "2", "--json", "{}"],
        ["bench", "--random-weights", "--model", "world", "--trace", "{}"],
        ["world-eval", "--json", "{}"],
        ["export", "verify", "bundle", "student.pt", "--report", "{}"],
        ["export", "onnx", "student.pt", "-o", "{}"],
        ["convert", "student.pt", "{}"],
        ["distill-data", "negative", "text", "--out", "{}"],
    ],
    ids=lambda arguments: " ".join(arguments[:1] + arguments[-2:-1]),
)
def test_an_output_in_a_missing_folder_is_refused_before_the_work(tmp_path, monkeypatch, capsys, no_work, arguments):
    monkeypatch.chdir(tmp_path)
    suffix = {"--sheet": "png", "-o": "mp4", "student.pt": "safetensors"}.get(arguments[-2], "json")
    line = fault(capsys, [part.format(f"nodir/s.{suffix}") for part in arguments])
    assert "nodir/s." in line and "cannot be written (No such file or directory)" in line
    assert not os.listdir(tmp_path)


def test_the_options_name_themselves(tmp_path):
    (tmp_path / "file").write_text("old")
    for path in ("none/x", "file/x", "x" * 300):
        for append in (False, True):
            with pytest.raises(InputError, match=r"^--json .*cannot be written \("):
                require_writable(tmp_path / path, "--json", append=append)
    with pytest.raises(InputError, match="^--json .*: is a folder, a file name is needed"):
        require_writable(tmp_path, "--json")
    with pytest.raises(InputError, match="^--output .*exists already"):
        require_new_folder(tmp_path, "--output")
    require_writable(tmp_path / "file", "--json")
    require_writable(tmp_path / "file", "--json", append=True)
    require_new_folder(tmp_path / "new", "--output")
    os.mkfifo(tmp_path / "pipe")
    require_writable(tmp_path / "pipe", "--json", append=True)  # without opening it
    with pytest.raises(InputError, match="must be a file, is a pipe or a device"):
        require_writable(tmp_path / "pipe", "target", pipe=False)
    assert sorted(os.listdir(tmp_path)) == ["file", "pipe"] and (tmp_path / "file").read_text() == "old"


def test_rows_of_the_benchmarks_have_a_place_before_they_are_measured(tmp_path, capsys):
    parser = harness.parser("A question.", json=True)
    assert parser.parse_args(["--json", str(tmp_path / "a" / "b.jsonl")]).json == str(tmp_path / "a" / "b.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(SystemExit):
        parser.parse_args(["--json", str(tmp_path / "file" / "b.jsonl")])
    assert "--json" in capsys.readouterr().err


@pytest.mark.parametrize("error", [InputError("s.png: no space left on the disk"), OSError(28, "No space left")])
def test_a_finished_video_is_kept_whatever_fails_after_it(tmp_path, monkeypatch, capsys, error):
    def fails(self):
        raise error

    monkeypatch.setattr(SheetWriter, "_finish", fails)
    video = tmp_path / "a.rgb"
    assert "pace left" in fault(capsys, [*WORLD, "-o", str(video), "--sheet", str(tmp_path / "s.png")])
    assert os.listdir(tmp_path) == ["a.rgb"]
    assert len(np.fromfile(video, np.uint8)) % (384 * 384 * 3) == 0 and video.stat().st_size >= 4 * 384 * 384 * 3


def test_a_video_that_fails_leaves_no_sheet(tmp_path, monkeypatch, capsys):
    def fails(self):
        raise InputError("a.rgb: no space left on the disk")

    monkeypatch.setattr("cfpp_rt.io.video.RawWriter._finish", fails)
    fault(capsys, [*WORLD, "-o", str(tmp_path / "a.rgb"), "--sheet", str(tmp_path / "s.png")])
    assert "s.png" not in os.listdir(tmp_path)


def test_a_sheet_may_lie_in_the_new_folder_of_the_frames(tmp_path):
    assert main([*WORLD, "-o", str(tmp_path / "a"), "--sheet", str(tmp_path / "a" / "sheet.png")]) == 0
    assert (tmp_path / "a" / "sheet.png").exists() and (tmp_path / "a" / "000003.png").exists()


def start(*arguments) -> subprocess.Popen:
    command = [sys.executable, "-m", "cfpp_rt.cli", *map(str, arguments)]
    return subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)


def test_raw_frames_go_through_a_named_pipe(tmp_path):
    os.mkfifo(tmp_path / "p.rgb")
    assert main([*WORLD, "-o", str(tmp_path / "file.rgb")]) == 0
    child = start(*WORLD, "-o", tmp_path / "p.rgb")
    threading.Timer(WAIT_S, child.kill).start()
    received = (tmp_path / "p.rgb").read_bytes()
    _, err = child.communicate()
    assert child.returncode == 0 and not err
    assert received == (tmp_path / "file.rgb").read_bytes() and len(received) >= 4 * 384 * 384 * 3
    assert sorted(os.listdir(tmp_path)) == ["file.rgb", "p.rgb"]


@pytest.mark.parametrize("suffix", [".mp4", ".mov", ".mkv", ""])
def test_a_pipe_that_cannot_be_written_is_one_line(tmp_path, capsys, no_work, suffix):
    pipe = tmp_path / f"p{suffix}"
    os.mkfifo(pipe)
    line = fault(capsys, [*WORLD, "-o", str(pipe)])
    assert str(pipe) in line and ("no pipe or device" in line if suffix else "cannot be written" in line)
    assert os.listdir(tmp_path) == [pipe.name]


def test_a_sheet_and_weights_need_a_file(tmp_path, capsys, no_work):
    for name in ("s.png", "w.safetensors"):
        os.mkfifo(tmp_path / name)
    line = fault(capsys, [*WORLD, "-o", str(tmp_path / "a.rgb"), "--sheet", str(tmp_path / "s.png")])
    assert "--sheet" in line and "must be a file, is a pipe or a device" in line
    line = fault(capsys, ["convert", "student.pt", str(tmp_path / "w.safetensors")])
    assert "w.safetensors: must be a file, is a pipe or a device" in line
    assert sorted(os.listdir(tmp_path)) == ["s.png", "w.safetensors"]


def test_a_reader_that_leaves_is_one_line(tmp_path):
    os.mkfifo(tmp_path / "p.rgb")
    child = start(*WORLD[:3], "--actions", "right*200", "--quiet", "-o", tmp_path / "p.rgb")
    threading.Timer(WAIT_S, child.kill).start()
    with (tmp_path / "p.rgb").open("rb") as pipe:
        assert len(pipe.read(1000)) == 1000
    _, err = child.communicate()
    assert child.returncode == 2 and err.count("\n") == 1 and "p.rgb: cannot be written (Broken pipe)" in err


@pytest.mark.parametrize("reader", ["none", "stalled"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_waits_for_a_reader_ends_at_a_signal(tmp_path, number, reader):
    os.mkfifo(tmp_path / "p.rgb")
    child = start(*WORLD[:3], "--actions", "right*1000", "-o", tmp_path / "p.rgb")
    pipe = None
    try:
        if reader == "stalled":
            pipe = (tmp_path / "p.rgb").open("rb")
            assert pipe.read(1000)
        time.sleep(4)  # until the command waits
        assert child.poll() is None
        child.send_signal(number)
        assert child.wait(WAIT_S) == (143 if number == signal.SIGTERM else 130)
    finally:
        child.kill()
        child.stderr.close()
        if pipe is not None:
            pipe.close()


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o002, 0o664), (0o077, 0o600)])
def test_every_file_follows_the_umask(tmp_path, weights, umask, mode):
    save_file(weights, tmp_path / "student.safetensors")
    config = json.loads((DATA / "meta.json").read_text())["config"]
    (tmp_path / "student.json").write_text(json.dumps(config))
    out = tmp_path / "out"
    out.mkdir()
    before = os.umask(umask)
    try:
        assert main(["convert", str(tmp_path / "student.safetensors"), str(out / "w.safetensors")]) == 0
        for name in ("a.mp4", "b.rgb", "frames"):
            assert main([*WORLD, "-o", str(out / name), "--sheet", str(out / "sheet.png")]) == 0
        with write_atomically(out / "t.safetensors") as path:  # a library that writes a file of its own and renames it
            save_file({"embeds": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in out.rglob("*") if path.is_file()}
    assert len(modes) >= 10 and set(modes.values()) == {mode}, modes


def convertible(tmp_path, weights, value):
    changed = {**weights, "blocks.1.ffn.2.bias": torch.full((256,), 1.0)}
    changed["blocks.1.ffn.2.bias"][7] = value
    save_file(changed, tmp_path / "student.safetensors")
    config = json.loads((DATA / "meta.json").read_text())["config"]
    (tmp_path / "student.json").write_text(json.dumps(config))
    return ["convert", str(tmp_path / "student.safetensors"), str(tmp_path / "out.safetensors"), "--dtype"]


@pytest.mark.parametrize(("dtype", "value"), [("float16", 1e6), ("float16", -65520.0), ("bfloat16", 3.4e38)])
def test_a_weight_that_would_become_infinity_is_refused(tmp_path, weights, capsys, dtype, value):
    line = fault(capsys, [*convertible(tmp_path, weights, value), dtype])
    assert f"got {dtype}, which ends at" in line and f"for {abs(value):g} in blocks.1.ffn.2.bias" in line
    assert sorted(os.listdir(tmp_path)) == ["student.json", "student.safetensors"]


@pytest.mark.parametrize("value", [65504.0, float("inf")])
def test_a_weight_that_fits_is_converted(tmp_path, weights, value):
    assert main([*convertible(tmp_path, weights, value), "float16"]) == 0
    assert load_file(tmp_path / "out.safetensors")["blocks.1.ffn.2.bias"][7] == value
