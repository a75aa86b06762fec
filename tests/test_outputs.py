"""Outputs of commands: refused before the work if they cannot be written, and kept once they are finished."""

import os

import numpy as np
import pytest

pytest.importorskip("av")
pytest.importorskip("PIL.Image")

from cfpp_rt.bench import harness
from cfpp_rt.cli.main import main
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_new_folder, require_writable
from cfpp_rt.io.contact_sheet import SheetWriter
from tests.test_cli import fault

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
