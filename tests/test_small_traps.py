"""Options and arguments that were once ignored, cut or echoed without a word."""

import subprocess
import sys

import pytest
import torch

from cfpp_rt.bench.latency import command as bench
from cfpp_rt.cli.main import main
from cfpp_rt.distill.data.make import read_prompts
from cfpp_rt.errors import InputError
from cfpp_rt.world.scripted import frames_for
from tests.test_cli import fault

BENCH = ["bench", "--random-weights", "--model", "world"]


def test_every_action_has_a_frame():
    assert frames_for(None, [1] * 5, 1) == 6 and frames_for(None, [1] * 5, 3) == 9 and frames_for(None, [1], 2) == 4
    assert frames_for(9, [1] * 5, 1) == 9
    for requested, n, needed in ((5, 1, 6), (6, 3, 9), (0, 1, 6)):
        with pytest.raises(InputError, match=f"--frames must be at least {needed}, .* 5 actions, got {requested}"):
            frames_for(requested, [1] * 5, n)


@pytest.mark.parametrize(
    "options,message",
    [
        (["--deadline-fps", "24"], "--deadline-fps needs --clients, got none"),
        (["--rate", "2"], "--rate needs --clients"),
        (["--arrival-seed", "0"], "--arrival-seed needs --clients"),
        (["--serving", "turns"], "--serving needs --clients"),
        (["--compare", "a", "b", "--deadline-fps", "24"], "--deadline-fps needs --clients"),
        (["--tolerance", "fps=0.1"], "--tolerance needs --compare"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(capsys, options, message):
    assert message in fault(capsys, [*BENCH, *options])


def test_the_defaults_of_many_clients_stay():
    assert bench._MANY_CLIENTS == {"rate": None, "arrival_seed": 0, "serving": "turns", "deadline_fps": 16.0}


@pytest.mark.parametrize(
    "arguments",
    [
        ["generate", "--random-weights", "--prompt", "a", "--size", "9" * 100_000],
        ["generate", "--random-weights", "--prompt", "a", "--frames", "x" * 100_000],
        ["generate", "--random-weights", "--prompt", "a", "--trajectory", "w*1," * 100_000],
        ["x" * 100_000],
        ["generate", "--engine", "a b " * 30_000],
    ],
    ids=["size", "frames", "trajectory", "command", "path"],
)
def test_a_long_argument_is_not_echoed_whole(capsys, tmp_path, arguments):
    try:
        code = main([*arguments, "-o", str(tmp_path / "a.rgb")])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err
    assert code == 2 and error.count("\n") == 1 and "error: " in error and len(error) < 2100


def test_prompts_are_split_at_line_ends_alone(tmp_path):
    from argparse import Namespace

    from cfpp_rt.cli.generate import _read_prompts

    path = tmp_path / "prompts.txt"
    path.write_bytes("a cat\u2028and a dog\r\nthe\x0chill\n\n\x1cnight\x85 over \u2029the sea\n".encode())
    wanted = ["a cat\u2028and a dog", "the\x0chill", "night\x85 over \u2029the sea"]
    assert _read_prompts(Namespace(embeds=None, prompts=str(path), prompt=None)) == wanted
    assert read_prompts(path) == wanted


@pytest.mark.parametrize("name", ["k_cache", "v_cache", "ranges"])
def test_the_meta_kernel_of_block_attention_wants_one_device(name):
    import cfpp_rt.ops.block_attention  # noqa: F401  registers the op

    q = torch.empty(1, 2, 4, 64, device="meta")
    given = {
        "k_cache": torch.empty(1, 2, 8, 64, device="meta"),
        "v_cache": torch.empty(1, 2, 8, 64, device="meta"),
        "ranges": torch.empty(1, 1, 1, 2, dtype=torch.int32, device="meta"),
    }
    assert torch.ops.cfpp_rt.block_attention(q, *given.values(), 1.0).shape == (1, 4, 128)
    given[name] = torch.empty_like(given[name], device="cpu")
    with pytest.raises(InputError, match=f"block_attention: {name} must be on meta, got cpu"):
        torch.ops.cfpp_rt.block_attention(q, *given.values(), 1.0)


@pytest.mark.parametrize("suffix", [".mkv", ".mp4", ".mov"])
def test_a_quiet_command_writes_nothing_on_stderr(tmp_path, suffix):
    pytest.importorskip("av")
    command = [sys.executable, "-m", "cfpp_rt.cli", "generate", "--student", "world", "--actions", "up*3", "--quiet"]
    done = subprocess.run([*command, "-o", str(tmp_path / f"a{suffix}")], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
