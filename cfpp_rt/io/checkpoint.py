"""Reading of weights files, without ever running code that they contain."""

import json
import pickle
import re
import struct
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from cfpp_rt.errors import CheckpointError
from cfpp_rt.io.text import name_list

PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")

# A repository cloned without Git LFS has a text file in place of the weights, which begins like this.
_LFS_POINTER = b"version https://git-lfs"


def read_tensors(path: str | Path) -> dict[str, Any]:
    """Read a `.safetensors` file or a pickle written by `torch.save` to the CPU, memory-mapped if possible.

    Pickles are read with `weights_only=True`: one that would run code is refused before that code runs.

    Returns the stored mapping of name -> tensor; in pickles a value may also be a nested mapping.
    Raises CheckpointError, one line, for a file that is missing, empty, truncated, unsafe or not a checkpoint.
    """
    path = Path(path)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file")
    if not path.is_file():
        raise CheckpointError(f"{path}: not a file")
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(len(_LFS_POINTER))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    if size == 0:
        raise CheckpointError(f"{path}: the file is empty")
    if start == _LFS_POINTER:
        raise CheckpointError(f"{path}: a Git LFS pointer, not the weights: run 'git lfs pull' where it came from")
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix in PICKLE_SUFFIXES:
        return _read_pickle(path)
    raise CheckpointError(f"{path}: a weights file must end in .safetensors, {', '.join(PICKLE_SUFFIXES)}")


def read_sharded(folder: str | Path, stem: str) -> dict[str, torch.Tensor]:
    """Read `<stem>.safetensors` from a folder, or all the shards that `<stem>.safetensors.index.json` lists.

    Returns name -> tensor of all shards. Raises CheckpointError like `read_tensors`, also for a broken index.
    """
    folder = Path(folder)
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return read_tensors(folder / f"{stem}.safetensors")
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(weight_map.values()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index}: not an index of shards ({type(error).__name__})") from error
    state: dict[str, torch.Tensor] = {}
    for shard in shards:
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise CheckpointError(f"{index}: a shard must be a file of the same folder, got {shard!r}")
        state.update(read_tensors(folder / shard))
    missing = [name for name in weight_map if name not in state]
    if missing:
        raise CheckpointError(f"{index}: {name_list(missing)} listed but in no shard")
    return state


def require_exact(state: Mapping[str, Any], expected_shapes: Mapping[str, Sequence[int]], source: str | Path) -> None:
    """Check that a state dict has exactly the expected names and shapes, and dense floating-point tensors.

    state: name -> tensor.
    expected_shapes: name -> shape.
    source: the file that the error names.

    Raises CheckpointError listing up to three missing, unexpected and wrong-shape names each, with both shapes.
    """
    wanted = {name: tuple(shape) for name, shape in expected_shapes.items()}
    missing = [name for name in wanted if name not in state]
    unexpected = [name for name in state if name not in wanted]
    wrong_shape = [
        f"{name} must be {list(shape)}, got {list(state[name].shape) if torch.is_tensor(state[name]) else 'no tensor'}"
        for name, shape in wanted.items()
        if name in state and not (torch.is_tensor(state[name]) and tuple(state[name].shape) == shape)
    ]
    not_dense_float = [
        f"{name} ({tensor.dtype}, {tensor.layout})"
        for name, tensor in state.items()
        if torch.is_tensor(tensor) and not (tensor.is_floating_point() and tensor.layout == torch.strided)
    ]
    faults = [
        f"{label}: {name_list(names)}"
        for label, names in (
            ("missing", missing),
            ("unexpected", unexpected),
            ("wrong shape", wrong_shape),
            ("not a dense float", not_dense_float),
        )
        if names
    ]
    if faults:
        raise CheckpointError(f"{source}: {'; '.join(faults)}")


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path}: truncated or not a safetensors file ({_one_line(error)})") from error


def _read_pickle(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        start = file.read(4)
    zipped = start == b"PK\x03\x04"
    try:
        with warnings.catch_warnings():  # about pickle protocols: loading succeeds or raises an error
            warnings.simplefilter("ignore")
            # Files written by torch < 1.6 are not zip archives and cannot be memory-mapped.
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: {_refusal(str(error), is_pickle=zipped or start[:1] == pickle.PROTO)}"
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{path}: truncated or not a torch checkpoint ({_one_line(error)})") from error
    except (
        OSError,
        EOFError,
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{path}: truncated or not a torch checkpoint") from error
    if not isinstance(loaded, Mapping):
        raise CheckpointError(f"{path}: must contain a mapping of names to tensors, got {type(loaded).__name__}")
    return dict(loaded)


def _refusal(message: str, is_pickle: bool) -> str:
    """Return why the weights-only reader of torch stopped, without its advice to switch the check off."""
    code = re.search(r"GLOBAL:? (\S+)|(?:BUILD for|instantiate|callable) (\S+)", message)
    if code:
        return f"refused: it wants to run code ({next(filter(None, code.groups())).rstrip('.,')})"
    if is_pickle and re.search(r"[Uu]nsupported|not allowed|can only", message):
        return "refused: a pickle of more than tensors and plain containers, it may want to run code"
    return "truncated or not a torch checkpoint"


def _one_line(error: BaseException) -> str:
    """Return the message of an error on one line of at most 160 characters, or its type if it has none."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 160 else text[:157] + "..."
