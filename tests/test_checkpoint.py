import json
import os
import pickle
import threading
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.io.checkpoint import read_sharded, read_tensors, require_exact


class Malicious:
    """An object that creates a file when it is unpickled without checks."""

    def __init__(self, trace: Path):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def state():
    return {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2000, dtype=torch.bfloat16)}


def one_line(error) -> str:
    message = str(error.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".bin", ".safetensors"])
def test_reads_every_format(tmp_path, state, suffix):
    path = tmp_path / f"weights{suffix}"
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    read = read_tensors(path)
    assert read.keys() == state.keys()
    assert all(torch.equal(read[name], state[name]) and read[name].dtype == state[name].dtype for name in state)


def test_reads_the_old_pickle_format_and_nested_containers(tmp_path, state):
    path = tmp_path / "old.pt"
    torch.save({"generator_ema": state, "step": 3}, path, _use_new_zipfile_serialization=False)
    read = read_tensors(path)
    assert read["step"] == 3 and torch.equal(read["generator_ema"]["a"], state["a"])


@pytest.mark.parametrize("zipped", [True, False])
def test_refuses_a_pickle_that_would_run_code(tmp_path, zipped):
    trace = tmp_path / "trace"
    path = tmp_path / "evil.pt"
    torch.save({"a": Malicious(trace)}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError, match="refused: it wants to run code") as error:
        read_tensors(path)
    assert one_line(error).startswith(f"{path}: ") and "mkdir" in str(error.value)
    assert not trace.exists()


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_refuses_a_bare_pickle_of_any_protocol(tmp_path, protocol):
    trace = tmp_path / "trace"
    path = tmp_path / "evil.pth"
    path.write_bytes(pickle.dumps({"a": Malicious(trace)}, protocol=protocol))
    with pytest.raises(CheckpointError) as error:
        read_tensors(path)
    assert str(path) in one_line(error)
    assert not trace.exists()


def test_refuses_a_pickled_module(tmp_path):
    path = tmp_path / "module.pt"
    torch.save(torch.nn.Linear(2, 2), path)
    with pytest.raises(CheckpointError, match=r"refused: it wants to run code \(torch.nn.modules.linear.Linear\)"):
        read_tensors(path)


@pytest.mark.parametrize("kind", ["zip", "old", "safetensors"])
def test_truncated_files_are_named(tmp_path, state, kind):
    path = tmp_path / ("cut.safetensors" if kind == "safetensors" else "cut.pt")
    if kind == "safetensors":
        save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    complete = path.read_bytes()
    for length in (1, 3, 9, 100, len(complete) // 2, len(complete) - 1):
        path.write_bytes(complete[:length])
        with pytest.raises(CheckpointError) as error:
            read_tensors(path)
        assert one_line(error).startswith(f"{path}: truncated or not a")


def test_other_unusable_files(tmp_path):
    cases = {
        "missing.pt": (None, "no such file"),
        "empty.pt": (b"", "empty"),
        "empty.safetensors": (b"", "empty"),
        "text.pt": (b"hello world, this is no checkpoint", "not a torch checkpoint"),
        "text.safetensors": (b"hello world, this is no checkpoint", "not a safetensors file"),
        "pointer.safetensors": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS pointer"),
        "weights.zip": (b"PK\x03\x04", "must end in .safetensors, .pt"),
    }
    for name, (content, reason) in cases.items():
        path = tmp_path / name
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(CheckpointError, match=reason) as error:
            read_tensors(path)
        assert one_line(error).startswith(f"{path}: ")
    with pytest.raises(CheckpointError, match="not a file"):
        read_tensors(tmp_path)
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(CheckpointError, match="mapping of names to tensors, got list"):
        read_tensors(tmp_path / "list.pt")


def test_sharded_folder(tmp_path, state):
    for number, name in enumerate(state):
        save_file({name: state[name]}, tmp_path / f"model-{number}.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    weight_map = {name: f"model-{number}.safetensors" for number, name in enumerate(state)}
    index.write_text(json.dumps({"weight_map": weight_map}))
    assert read_sharded(tmp_path, "model").keys() == state.keys()

    index.write_text(json.dumps({"weight_map": {**weight_map, "c": "model-0.safetensors"}}))
    with pytest.raises(CheckpointError, match="c listed but in no shard"):
        read_sharded(tmp_path, "model")
    index.write_text(json.dumps({"weight_map": {"a": "../model-0.safetensors"}}))
    with pytest.raises(CheckpointError, match="same folder"):
        read_sharded(tmp_path, "model")
    for broken in ("{", "[]", '{"weight_map": {"a": [1]}}'):
        index.write_text(broken)
        with pytest.raises(CheckpointError, match="not an index"):
            read_sharded(tmp_path, "model")


def test_require_exact():
    state = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    require_exact(state, {"a": (2, 3), "b": [4], "c": torch.Size([1])}, "file")
    with pytest.raises(CheckpointError) as error:
        require_exact(state, {"a": (3, 2), "b": (4,), **{f"m{n}": (1,) for n in range(5)}}, "weights.pt")
    assert one_line(error) == (
        "weights.pt: missing: m0, m1, m2 and 2 more; unexpected: c; wrong shape: a must be [3, 2], got [2, 3]"
    )
    with pytest.raises(CheckpointError, match="a must be \\[1\\], got no tensor"):
        require_exact({"a": 1}, {"a": (1,)}, "weights.pt")


def test_write_atomically(tmp_path):
    path = tmp_path / "out.bin"
    path.write_text("old")
    with pytest.raises(RuntimeError), write_atomically(path) as temporary:
        temporary.write_text("half")
        assert temporary.parent == tmp_path and temporary.suffix == ".bin"
        raise RuntimeError
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["out.bin"]
    with write_atomically(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["out.bin"]


def test_write_atomically_unwritable_places(tmp_path):
    (tmp_path / "file").write_text("")
    for path, reason in (
        (tmp_path, "is a folder"),
        (tmp_path / "no" / "such" / "folder" / "a.pt", "cannot be written"),
        (tmp_path / "file" / "a.pt", "cannot be written"),
    ):
        with pytest.raises(InputError, match=reason), write_atomically(path):
            pytest.fail("the body must not run")


def test_write_atomically_keeps_links_and_pipes(tmp_path):
    (tmp_path / "target").write_text("old")
    (tmp_path / "link").symlink_to(tmp_path / "target")
    with write_atomically(tmp_path / "link") as temporary:
        temporary.write_text("new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "new"

    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    received = []
    reader = threading.Thread(target=lambda: received.append(pipe.read_text()))
    reader.start()
    with write_atomically(pipe) as yielded:
        assert yielded == pipe
        yielded.write_text("through")
    reader.join(timeout=10)
    assert received == ["through"] and pipe.is_fifo()
