"""Which of the pointwise ops have their Triton kernel on CUDA. It is imported when a CUDA tensor asks, not before."""

import functools
import importlib
import importlib.util
import os
import shutil
import sysconfig
import warnings
from pathlib import Path
from types import ModuleType

from cfpp_rt.errors import InputError


@functools.cache
def choose() -> tuple[bool, str]:
    """Whether Triton runs the pointwise ops on CUDA (else the reference does), and why; as `_library.choose`."""
    wanted = os.environ.get("CFPP_BACKEND", "auto")
    if wanted == "reference":
        return False, "CFPP_BACKEND=reference"
    installed = importlib.util.find_spec("triton") is not None
    lacking = _lacking()
    if installed and not lacking:
        return True, "Triton kernel, compiled at its first call"
    reason = f"Triton lacks {lacking}" if installed else "triton is not installed (pip install triton)"
    if wanted == "cuda":
        raise InputError(f"CFPP_BACKEND=cuda cannot be met: {reason}")
    return False, reason


def _lacking() -> str:
    """What Triton compiles its launcher with, at the first call of a kernel, and does not find here; "" = nothing."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang or $CC)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"{header} (python3-dev)"


@functools.cache
def triton_kernels(op: str) -> ModuleType | None:
    """The module of an op's Triton kernel; None = the reference runs, and where that was not asked for, a warning."""
    ours, reason = choose()
    if ours:
        return importlib.import_module(f"cfpp_rt.ops.{op}_triton")
    if os.environ.get("CFPP_BACKEND", "auto") != "reference":
        warnings.warn(f"cfpp_rt's {op} on cuda runs in plain PyTorch: {reason}", RuntimeWarning, stacklevel=4)
    return None
