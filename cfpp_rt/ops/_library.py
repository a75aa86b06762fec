"""The torch.library namespace of the ops, the compiled modules behind them, and which of them runs."""

import functools
import importlib
import os
import warnings
from types import ModuleType

import torch

from cfpp_rt.errors import InputError

LIBRARY = torch.library.Library("cfpp_rt", "DEF")
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/common/dispatch.h
OPS = ("kv_update_",)

_CHOICES = ("auto", "reference", "cpu", "cuda")
_MODULES = {"cpu": "cfpp_rt._C", "cuda": "cfpp_rt._C_cuda"}


@functools.cache
def _load(device_type: str) -> tuple[ModuleType | None, str]:
    """The compiled module for a device type, and why it is there or not; a failed try is not repeated."""
    name = _MODULES.get(device_type)
    if name is None:
        return None, f"no kernels for {device_type}"
    try:
        return importlib.import_module(name), f"compiled module {name}"
    except ImportError as error:
        hint = "built without nvcc?" if device_type == "cuda" else "built with CFPP_BUILD=none?"
        return None, f"{name} cannot be imported ({hint} {error})"


@functools.cache
def choose(device_type: str) -> tuple[ModuleType | None, str]:
    """The module that runs the ops on a device type (None = the reference), and why.

    CFPP_BACKEND: auto takes the compiled module where there is one; cpu and cuda demand it for their device type;
    reference takes plain PyTorch everywhere. Raises InputError for another value, or a demand that cannot be met.
    """
    wanted = os.environ.get("CFPP_BACKEND", "auto")
    if wanted not in _CHOICES:
        raise InputError(f"CFPP_BACKEND must be one of {', '.join(_CHOICES)}, got {wanted!r}")
    if wanted == "reference":
        return None, "CFPP_BACKEND=reference"
    module, reason = _load(device_type)
    if module is None and wanted == device_type:
        raise InputError(f"CFPP_BACKEND={wanted} cannot be met: {reason}")
    return module, reason


def kernels(device_type: str) -> ModuleType | None:
    """`choose` for the ops themselves: the first time that a kernel is missing, a warning says so."""
    module, reason = choose(device_type)
    if module is None and os.environ.get("CFPP_BACKEND", "auto") != "reference":
        _warn_once(f"cfpp_rt ops on {device_type} run in plain PyTorch: {reason}")
    return module


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, RuntimeWarning, stacklevel=4)


def backends() -> dict[str, dict[str, tuple[str, str]]]:
    """For each op and device type: the backend that runs it ("none" without such a device), and why."""
    rows = {}
    for device_type in _MODULES:
        if device_type == "cuda" and not torch.cuda.is_available():
            rows[device_type] = ("none", f"no CUDA GPU; {_load(device_type)[1]}")
            continue
        module, reason = choose(device_type)
        rows[device_type] = (device_type if module is not None else "reference", reason)
    return {op: rows for op in OPS}
