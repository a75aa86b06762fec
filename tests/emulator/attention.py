"""Builds the CUDA sources of block_attention for the host and calls their kernels on CPU tensors."""

import ctypes
import os
import shlex
import subprocess
from pathlib import Path

import torch
from torch import Tensor

from cfpp_rt.errors import InputError

ROOT = Path(__file__).parents[2]
SOURCES = [*sorted(ROOT.glob("csrc/block_attention/**/*.cu")), ROOT / "tests/emulator/block_attention.cpp"]
INCLUDES = [f"-I{ROOT / folder}" for folder in ("tests", "tests/emulator", "csrc")]
COMPILER = shlex.split(os.environ.get("CXX", "g++"))
# _FORTIFY_SOURCE refuses a longjmp to another stack.
FLAGS = ["-std=c++17", "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-U_FORTIFY_SOURCE", "-DCFPP_EMULATE", *INCLUDES]
DEVICES = {"sm_80": 0, "sm_86": 1, "sm_90": 2}  # rows of kEmulatedDevices
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Params(ctypes.Structure):
    """BlockAttentionParams, field by field."""

    _fields_ = [
        ("dtype", ctypes.c_int32),
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "ranges", "workspace")),
        *((name, ctypes.c_int64) for name in ("batch", "heads", "queries", "head_dim", "capacity", "groups", "count")),
        *((name, ctypes.c_int64 * 3) for name in ("q_stride", "k_stride", "v_stride")),
        ("scale", ctypes.c_float),
    ]


def compile_for_host(source: Path, folder: Path) -> Path:
    target = folder / f"{source.parent.name}_{source.stem}.o"
    subprocess.run([*COMPILER, *FLAGS, "-O2", "-fPIC", "-x", "c++", "-c", source, "-o", target], check=True)
    return target


class EmulatedAttention:
    """The kernels, linked from the objects of SOURCES."""

    def __init__(self, folder: Path, objects: list[Path]):
        library = folder / "attention_emulated.so"
        subprocess.run([*COMPILER, "-shared", *objects, "-o", library], check=True)
        self.objects = objects
        self._run = ctypes.CDLL(str(library)).emulate_block_attention
        self._run.restype = ctypes.c_char_p
        self._run.argtypes = [ctypes.c_void_p, *[ctypes.c_int] * 3, ctypes.c_int64, ctypes.c_uint64]

    def __call__(
        self, out: Tensor, q: Tensor, k: Tensor, v: Tensor, ranges: Tensor, scale: float, *, device: str = "sm_80",
        ctas: int = 0, splits: int = 1, seed: int = 0
    ) -> None:  # fmt: skip
        """Writes `out` [B, Sq, H, D]. ctas 0: the dispatcher's plan, else this grid with remainder tiles in `splits`
        pieces. seed: order of threads and CTAs, 0 the plain one. Raises InputError with the launcher's status, or with
        what the emulator stopped at."""
        batch, heads, queries, head_dim = q.shape
        workspace = torch.full((4 << 20,), float("nan"))
        pointers = (t.data_ptr() for t in (q, k, v, out, ranges, workspace))
        sizes = (batch, heads, queries, head_dim, k.shape[2], ranges.shape[1], ranges.shape[2])
        strides = ((ctypes.c_int64 * 3)(*t.stride()[:3]) for t in (q, k, v))
        params = Params(DTYPES[q.dtype], *pointers, *sizes, *strides, scale)
        bytes_ = workspace.numel() * workspace.element_size()
        error = self._run(ctypes.byref(params), DEVICES[device], ctas, splits, bytes_, seed)
        if error is not None:
            raise InputError(error.decode())
