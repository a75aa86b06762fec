"""The choice of Triton for the pointwise ops on CUDA. Triton is imported at the first call on CUDA, not before."""

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
def choose_backend() -> tuple[bool, str]:
    """Return True if Triton runs the pointwise ops on CUDA (else the reference does), and the reason.

    CFPP_BACKEND decides, see `_library.choose_backend`.
    """
    wanted = os.environ.get("CFPP_BACKEND", "auto")
    if wanted == "reference":
        return False, "CFPP_BACKEND=reference"
    installed = importlib.util.find_spec("triton") is not None
    missing = _missing_build_tool()
    if installed and not missing:
        return True, "Triton kernel, compiled at its first call"
    reason = f"Triton lacks {missing}" if installed else "triton is not installed (pip install triton)"
    if wanted == "cuda":
        raise InputError(f"CFPP_BACKEND=cuda cannot be met: {reason}")
    return False, reason


def _missing_build_tool() -> str:
    """Return the missing tool that Triton needs to compile its launcher at the first call of a kernel; "" = none."""
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")):
        return "a C compiler (gcc, clang or $CC)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.is_file() else f"{header} (python3-dev)"


@functools.cache
def triton_kernels(op: str) -> ModuleType | None:
    """Return the module of an op's Triton kernel.

    None = the reference runs, with a warning unless the reference was requested.
    """
    available, reason = choose_backend()
    if available:
        return importlib.import_module(f"cfpp_rt.ops.{op}_triton")
    if os.environ.get("CFPP_BACKEND", "auto") != "reference":
        warnings.warn(f"cfpp_rt's {op} on cuda runs in plain PyTorch: {reason}", RuntimeWarning, stacklevel=4)
    return None
