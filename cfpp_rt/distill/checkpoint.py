"""Checkpoints of a training run: folders that are written atomically."""

import os
import re
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch

from cfpp_rt.errors import CheckpointError, InputError
from cfpp_rt.io.checkpoint import read_tensors

_NAME = re.compile(r"step-([0-9]{7})")
_STATE = "state.pt"


def checkpoints(folder: Path) -> dict[int, Path]:
    """Return the complete checkpoints of a run by step, in ascending order."""
    complete = {}
    if folder.is_dir():
        for path in folder.iterdir():
            if (match := _NAME.fullmatch(path.name)) and (path / _STATE).is_file():
                complete[int(match[1])] = path
    return dict(sorted(complete.items()))


def path_of(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint of a step."""
    return folder / f"step-{step:07d}"


def save(folder: Path, step: int, state: dict[str, Any], keep: int) -> Path:
    """Write the checkpoint of a step and delete all but the newest `keep`; return its folder.

    state: nested mappings and lists of tensors and numbers.
    Raise InputError with the reason of the operating system, for example a full disk. Then no trace of the attempt is
    left, and earlier checkpoints are unchanged.
    """
    target = path_of(folder, step)
    temporary = folder / f".{target.name}.{secrets.token_hex(4)}"
    try:
        temporary.mkdir(parents=True)
        with (temporary / _STATE).open("wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if target.exists():  # made by a run that was resumed from an earlier step
            shutil.rmtree(target)
        os.replace(temporary, target)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError for a short write
        reason = error.strerror if isinstance(error, OSError) and error.strerror else " ".join(str(error).split())
        raise InputError(f"{target}: the checkpoint cannot be written ({reason})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    for old in list(checkpoints(folder).values())[:-keep]:
        shutil.rmtree(old, ignore_errors=True)
    return target


def load(path: Path) -> dict[str, Any]:
    """Return the state of a checkpoint folder, read without executing pickled code. Raise CheckpointError."""
    state = read_tensors(path / _STATE)
    missing = {"step", "position", "draws", "networks", "ema", "optimizers"} - set(state)
    if missing:
        raise CheckpointError(f"{path / _STATE}: wanted a training state, missing {', '.join(sorted(missing))}")
    return state
