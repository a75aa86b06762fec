"""The command line as a user meets it: a published checkpoint to a video file, one clear line for every fault."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from cfpp_rt.cli.main import main

av = pytest.importorskip("av")
DATA = Path(__file__).parent / "data"


@pytest.fixture(scope="module")
def files(tmp_path_factory, weights, meta):
    """A student as published (FSDP names, EMA), the original VAE file beside it, text embeddings, a real photograph."""
    folder = tmp_path_factory.mktemp("published")
    state = {f"model._fsdp_wrapped_module.{name}": tensor for name, tensor in weights.items()}
    torch.save({"generator_ema": state}, folder / "student.pt")
    (folder / "student.json").write_text(json.dumps(meta["config"]))
    base = folder / "Wan2.1"
    base.mkdir()
    from safetensors.torch import load_file

    torch.save(load_file(DATA / "vae_weights.safetensors"), base / "Wan2.1_VAE.pth")
    save_file({"embeds": torch.randn(1, 16, 32)}, folder / "embeds.safetensors")
    return folder


def command(files, output, *extra, frames=9, size="64x96"):
    return [
        "generate",
        *("--checkpoint", str(files / "student.pt"), "--base", str(files / "Wan2.1")),
        *("--embeds", str(files / "embeds.safetensors"), "--dtype", "float32"),
        *("--frames", str(frames), "--size", size, "--output", str(output)),
        *extra,
    ]


def read_back(path):
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        return np.stack(frames), float(stream.average_rate)


def test_published_checkpoint_to_mp4(files, tmp_path, capsys):
    assert main(command(files, tmp_path / "boat.mp4")) == 0
    frames, rate = read_back(tmp_path / "boat.mp4")
    assert frames.shape == (9, 64, 96, 3) and rate == 16
    assert frames.std() > 1, "a picture, not one colour"
    table = capsys.readouterr().out
    for word in ("ttff_ms", "frame_ms_p50", "frame_ms_p99", "fps", "diffuse_ms", "decode_ms", "peak_memory_mib"):
        assert word in table
    assert os.listdir(tmp_path) == ["boat.mp4"]


@pytest.mark.parametrize("student,frames", [("framewise-1step", 5), ("framewise-4step", 5), ("chunkwise-4step", 21)])
def test_every_student(files, tmp_path, student, frames):
    assert main(command(files, tmp_path / "out.mp4", "--student", student, "--quiet", frames=frames)) == 0
    assert len(read_back(tmp_path / "out.mp4")[0]) == frames


def test_a_real_photograph_is_the_first_frame(files, tmp_path):
    """Image-to-video: the photograph goes through the encoder, opens the video, and changes what follows."""
    datasets = pytest.importorskip("sklearn.datasets")
    from PIL import Image

    Image.fromarray(datasets.load_sample_image("china.jpg")).save(tmp_path / "china.jpg")
    made = []
    for name, extra in (("plain", ()), ("photo", ("--image", str(tmp_path / "china.jpg")))):
        assert main(command(files, tmp_path / f"{name}.rgb", "--quiet", *extra)) == 0
        made.append(np.fromfile(tmp_path / f"{name}.rgb", np.uint8).reshape(9, 64, 96, 3).astype(float))
    from cfpp_rt.codec.streaming import to_uint8
    from cfpp_rt.codec.wan import WanVAE
    from cfpp_rt.io.video import read_image

    vae = WanVAE.from_pretrained(files / "Wan2.1", dtype=torch.float32, device="cpu")
    with torch.inference_mode():
        expected = to_uint8(vae.decode(vae.encode(read_image(tmp_path / "china.jpg", 64, 96))))[0, 0].numpy()
    assert np.abs(made[1][0] - expected).max() <= 1
    assert np.abs(made[0] - made[1])[1:].mean() > 1


def test_video_extension(files, tmp_path):
    assert main(command(files, tmp_path / "first.mp4", "--quiet", frames=5)) == 0
    assert (
        main(command(files, tmp_path / "longer.mp4", "--quiet", "--video", str(tmp_path / "first.mp4"), frames=13)) == 0
    )
    assert len(read_back(tmp_path / "longer.mp4")[0]) == 13


def test_a_trajectory_is_followed(tmp_path, capsys):
    """As long as the trajectory, and another film than another one's, with the same noise."""
    random = ["generate", "--random-weights", "--student", "camera-chunkwise-4step", "--prompt", "x", "--quiet"]
    made = []
    for name, more in (("w", ()), ("s", ()), ("w", ("--intrinsics", "published-cli"))):
        arguments = [*random, "--dtype", "float32", "--size", "32x48", "--trajectory", f"{name}*3", *more]
        assert main([*arguments, "--output", str(tmp_path / "out.rgb")]) == 0
        made.append((tmp_path / "out.rgb").read_bytes())
    assert len(made[0]) == 13 * 32 * 48 * 3 and len(set(made)) == 3
    for options, message in (
        (("--trajectory", "w*3", "--frames", "9"), "--frames must be 13 for a trajectory of 4 latent frames, got 9"),
        (("--trajectory", "wd*3"), "got the part 'wd*3'"),
        (("--intrinsics", "training"), "--intrinsics needs a --trajectory"),
    ):
        assert main([*random, *options, "--output", str(tmp_path / "bad.rgb")]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "bad.rgb").exists()


def test_a_float8_cache_makes_nearly_the_same_video(files, tmp_path):
    made = []
    for name, extra in (("plain", ()), ("float8", ("--kv-dtype", "float8_e4m3"))):
        assert main(command(files, tmp_path / f"{name}.rgb", "--quiet", *extra)) == 0
        made.append(np.fromfile(tmp_path / f"{name}.rgb", np.uint8).astype(float))
    assert 0 < np.abs(made[0] - made[1]).mean() < 2


@pytest.mark.skipif(not torch.cpu._is_vnni_supported(), reason="the CPU has no VNNI")
def test_int8_linears_make_nearly_the_same_video(files, tmp_path):
    made = []
    for name, extra in (("plain", ()), ("int8", ("--linear-dtype", "int8"))):
        assert main(command(files, tmp_path / f"{name}.rgb", "--quiet", *extra)) == 0
        made.append(np.fromfile(tmp_path / f"{name}.rgb", np.uint8).astype(float))
    assert 0 < np.abs(made[0] - made[1]).mean() < 2


def test_same_seed_same_video_and_prompts_file(files, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        assert main(command(files, tmp_path / f"{name}.rgb", "--quiet", "--seed", str(seed), frames=5)) == 0
    a, b, c = ((tmp_path / f"{name}.rgb").read_bytes() for name in "abc")
    assert a == b != c
    (tmp_path / "prompts.txt").write_text("ein Boot bei Flut\n\nЛодка 🚣\n", encoding="utf-8")
    random = ["generate", "--random-weights", "--prompts", str(tmp_path / "prompts.txt"), "--frames", "5", "--quiet"]
    assert main([*random, "--size", "32x48", "--output", str(tmp_path / "many.rgb")]) == 0
    made = sorted(tmp_path.glob("many*"))
    assert [p.name for p in made] == ["many-000.rgb", "many-001.rgb"] and made[0].read_bytes() != made[1].read_bytes()


def test_a_full_disk_is_one_line(files, capsys):
    if not Path("/dev/full").exists():
        pytest.skip("no /dev/full")
    link = Path("full.rgb")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(files)
        link.symlink_to("/dev/full")
        try:
            assert "No space left" in fault(capsys, command(files, link, "--quiet", frames=41, size="128x128"))
        finally:
            link.unlink()


def test_random_weights_take_no_files(tmp_path, capsys):
    for option in ("--checkpoint", "--base", "--config", "--key", "--tiny-vae"):
        arguments = ["generate", "--random-weights", "--prompt", "x", option, "y", "-o", str(tmp_path / "x.mp4")]
        assert f"--random-weights takes no {option}" in fault(capsys, arguments)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("signal_name", ["SIGINT", "SIGTERM"])
def test_a_stopped_command_leaves_nothing(files, tmp_path, signal_name):
    import signal
    import time

    arguments = command(files, tmp_path / "long.mp4", "--quiet", frames=4001)
    process = subprocess.Popen([sys.executable, "-m", "cfpp_rt.cli", *arguments], stderr=subprocess.PIPE, text=True)
    while not list(tmp_path.iterdir()) and process.poll() is None:
        time.sleep(0.05)
    time.sleep(2)
    process.send_signal(getattr(signal, signal_name))
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == {"SIGINT": 130, "SIGTERM": 143}[signal_name]
    assert "Traceback" not in stderr and not list(tmp_path.iterdir())


def test_png_frames(files, tmp_path):
    assert main(command(files, tmp_path / "pictures", "--quiet", frames=5)) == 0
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 5


def fault(capsys, arguments):
    """Run a command that must fail: exit code 2, one line on stderr, nothing printed. Returns the line."""
    try:
        code = main(arguments)
    except SystemExit as stop:
        code = stop.code
    out, err = capsys.readouterr()
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize(
    "extra,message",
    [
        (["--checkpoint", "nowhere.pt"], "nowhere.pt: no such file"),
        (["--student", "framewise-3step"], "student must be one of framewise-2step.*got 'framewise-3step'"),
        (["--size", "60x96"], "multiples of 16, got 60x96"),
        (["--size", "0x96"], "multiples of 16, got 0x96"),
        (["--size", "large"], "HEIGHTxWIDTH in multiples of 16, got large"),
        (["--frames", "0"], "frames must be .* got 0"),
        (["--frames", "-3"], "frames must be .* got -3"),
        (["--frames", "10"], "such as 9 or 13.*got 10"),
        (["--frames", "many"], "--frames"),
        (["--steps", "500,1000"], "steps must be descending"),
        (["--steps", "fast"], "--steps must be integers as 1000,500, got fast"),
        (["--window", "0"], "window must be an integer >= 1, got 0"),
        (["--sinks", "4", "--window", "2"], "window must hold the sinks and one block"),
        (["--device", "abacus"], "--device must be cpu, cuda or cuda:N, got abacus"),
        (["--seed", "-1"], "seed must be in 0"),
        (["--image", str(DATA / "meta.json")], "meta.json.*image"),
        (["--image", "nowhere.jpg"], "nowhere.jpg"),
        (["--output", "/nowhere/out.mp4"], "/nowhere/out.mp4"),
        (["--output", ""], "--output must name a file"),
        (["--output", "film.avi"], "the suffix must be one of"),
        (["--output", "x" * 300 + ".mp4"], "cannot be written"),
        (["--image", ""], "no such file|not an image"),
        (["--student", "chunkwise-4step", "--image", "x.jpg"], "--image is one latent frame, student chunkwise-4step"),
        (["--sinks", "3"], "sinks need a window"),
        (["--kv-dtype", "int8"], "--kv-dtype.*invalid choice: 'int8'"),
        (["--linear-dtype", "float8_e4m3"], "float8_e4m3 linears need a bfloat16 model on a GPU.*on cpu"),
        (["--steps", "9" * 5000], "--steps must be integers"),
        (["--fram", "5"], "--fram"),
        (["--embeds", str(DATA / "vectors.safetensors")], "wanted a tensor 'embeds'"),
        (["--key", "critic"], "wanted key 'critic'"),
        (["--unknown"], "--unknown"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line(files, tmp_path, capsys, extra, message):
    import re

    line = fault(capsys, command(files, tmp_path / "out.mp4", "--quiet", *extra))
    assert re.search(message, line), line
    assert not list(tmp_path.iterdir()), "nothing half-written"


def test_bad_files_are_one_line(files, tmp_path, capsys, weights):
    def refuse(arguments, *words):
        line = fault(capsys, arguments)
        assert all(word in line for word in words), line
        assert not (tmp_path / "out.mp4").exists()

    whole = (files / "student.pt").read_bytes()
    (tmp_path / "cut.pt").write_bytes(whole[: len(whole) // 2])
    refuse(command(files, tmp_path / "out.mp4", "--checkpoint", str(tmp_path / "cut.pt")), "cut.pt", "truncated")

    class Evil:
        def __reduce__(self):
            return os.system, (f"touch {tmp_path / 'pwned'}",)

    torch.save({"generator_ema": Evil()}, tmp_path / "evil.pt")
    refuse(command(files, tmp_path / "out.mp4", "--checkpoint", str(tmp_path / "evil.pt")), "evil.pt", "refused")
    assert not (tmp_path / "pwned").exists()

    extra = {**weights, "blocks.0.surplus": torch.zeros(3)}
    torch.save(extra, tmp_path / "extra.pt")
    (tmp_path / "extra.json").write_text((files / "student.json").read_text())
    refuse(command(files, tmp_path / "out.mp4", "--checkpoint", str(tmp_path / "extra.pt")), "blocks.0.surplus")

    (tmp_path / "prompts.txt").write_bytes(b"caf\xe9\n")
    random = ["generate", "--random-weights", "--output", str(tmp_path / "out.mp4")]
    refuse([*random, "--prompts", str(tmp_path / "prompts.txt")], "must be UTF-8, byte 3")
    (tmp_path / "prompts.txt").write_text("\n")
    refuse([*random, "--prompts", str(tmp_path / "prompts.txt")], "found none")
    refuse(random, "one of --prompt, --prompts or --embeds is needed")
    refuse(["generate", "--prompt", "x", "--output", str(tmp_path / "out.mp4")], "--checkpoint is needed")


def test_nan_in_the_model_names_frame_and_layer(files, tmp_path, capsys, weights):
    broken = {**weights, "blocks.1.ffn.2.bias": torch.full((256,), float("nan"))}
    torch.save(broken, tmp_path / "nan.pt")
    (tmp_path / "nan.json").write_text((files / "student.json").read_text())
    line = fault(capsys, command(files, tmp_path / "out.mp4", "--quiet", "--checkpoint", str(tmp_path / "nan.pt")))
    assert "NaN or infinity at latent frame 0, step 1, layer 1" in line
    assert not (tmp_path / "out.mp4").exists()


def test_out_of_memory_says_what_would_fit(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cfpp_rt.cache.available_bytes", lambda device: 258 << 20)
    line = fault(capsys, command(files, tmp_path / "out.mp4", "--quiet", frames=401))
    assert "KV cache of 101 latent frames" in line and "a window of" in line
    assert not list(tmp_path.iterdir())


def test_convert_and_generate_from_what_it_wrote(files, tmp_path, capsys):
    target = tmp_path / "student.safetensors"
    assert main(["convert", str(files / "student.pt"), str(target), "--dtype", "float32"]) == 0
    assert "parameters" in capsys.readouterr().out
    assert main(command(files, tmp_path / "a.rgb", "--quiet", "--checkpoint", str(target), frames=5)) == 0
    assert main(command(files, tmp_path / "b.rgb", "--quiet", frames=5)) == 0
    a, b = (np.fromfile(tmp_path / f"{name}.rgb", np.uint8).astype(int) for name in "ab")
    assert np.abs(a - b).max() <= 1, "the same weights; where they lie in memory may change the last bit of a sum"


def test_doctor_names_every_op_and_extra(capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in ("cfpp-rt", "torch", "kv_update_", "cpu", "extras", "wan", "diffusers"):
        assert word in out


@pytest.mark.parametrize("arguments", [["--help"], ["generate", "--help"], ["convert", "--help"], ["--version"]])
def test_help(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 0 and "cfpp" in capsys.readouterr().out


def test_a_missing_extra_is_named_with_its_command(tmp_path):
    """Without the extra's packages, the core imports and the command says what to install."""
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('diffusers', 'transformers', 'av', 'PIL'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "import cfpp_rt; cfpp_rt.Rollout; cfpp_rt.Pipeline\n"
        "from cfpp_rt.cli.main import main\n"
        f"sys.exit(main(['generate', '--random-weights', '--prompt', 'x', '-o', {str(tmp_path / 'x.mp4')!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "pip install 'cfpp-rt[video]'" in done.stderr
