"""The choice of the Triton kernels, and their compilation for the supported architectures with 16-byte accesses."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.ops import _triton

ARCHS = (80, 90, 120)
WIDTHS = (192, 1536, 5120)  # the small world, the 1.3B and the 14B model
CHANNELS = (96, 192, 384)  # of the VAE


def compile_all() -> None:
    """Print [kernel, writes float8, arch, bits of every access to global memory] as JSON lines."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    from cfpp_rt.ops import (
        adaln_modulate_triton,
        denoise_update_triton,
        gated_residual_triton,
        quantize_rows_triton,
        rms_silu_triton,
    )

    gated = gated_residual_triton._gated_residual
    plain = {"QUANTIZE": False, "codes_scale_ptr": None}
    norms = [
        (adaln_modulate_triton._adaln_modulate, plain),
        (gated, {**plain, "HAS_GATE": True, "SCALE_OFFSET": 1.0}),
        (gated, {**plain, "HAS_GATE": False, "SCALE_OFFSET": 0.0, "gate_ptr": None}),
    ]
    shapes = [quantize_rows_triton.launch_shape(width) for width in WIDTHS]
    jobs = [
        (kernel, {**flags, "BLOCK": shape["BLOCK"]}, shape["num_warps"]) for kernel, flags in norms for shape in shapes
    ]
    span = {"SPAN": denoise_update_triton.SPAN}
    last = {"HAS_NOISE": False, "noise_ptr": None, "next_sigma_ptr": None}
    quantizing = [
        (adaln_modulate_triton._adaln_modulate, {"QUANTIZE": True}),
        (gated, {"QUANTIZE": True, "HAS_GATE": True, "SCALE_OFFSET": 1.0}),
        (quantize_rows_triton._quantize_rows, {"GELU": True}),
    ]
    middle = shapes[1]
    jobs += [(kernel, {**flags, "BLOCK": middle["BLOCK"]}, middle["num_warps"]) for kernel, flags in quantizing]
    jobs += [(denoise_update_triton._denoise_update, {**span, **flags}, 4) for flags in ({"HAS_NOISE": True}, last)]
    for width in CHANNELS:
        shape = rms_silu_triton.launch_shape(width)
        constants = {key: shape[key] for key in ("BLOCK", "PIXELS")}
        for flags in ({"HAS_BIAS": True}, {"HAS_BIAS": False, "bias_ptr": None}):
            jobs.append((rms_silu_triton._rms_silu, {**constants, **flags}, shape["num_warps"]))
    for kernel, constants, warps in jobs:
        latents = kernel is denoise_update_triton._denoise_update
        quantizes = constants.get("QUANTIZE", "GELU" in constants)
        codes = {gated: "normed_ptr", quantize_rows_triton._quantize_rows: "codes_ptr"}.get(kernel, "out_ptr")
        signature, divisible = {}, {}
        for index, name in enumerate(kernel.arg_names):
            narrow = name == "velocity_ptr" or not latents
            pointer = "*bf16" if narrow and not name.endswith(("scales_ptr", "codes_scale_ptr")) else "*fp32"
            if quantizes and name == codes:
                pointer = "*fp8e4nv"
            scalar = "fp32" if name in ("eps", "root") else "i32"
            signature[name] = "constexpr" if name in constants else pointer if name.endswith("_ptr") else scalar
            if signature[name] in ("*bf16", "*fp32", "*fp8e4nv", "i32") and "sigma" not in name:
                divisible[(index,)] = [["tt.divisibility", 16]]  # what a launch finds out about addresses and strides
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        source = ASTSource(kernel, signature, places, divisible)
        for arch in ARCHS if not quantizes else ARCHS[1:]:  # float8 is of capability 8.9 and later
            ptx = compile(source, target=GPUTarget("cuda", arch, 32), options={"num_warps": warps}).asm["ptx"]
            accesses = re.findall(r"(?:ld|st)\.global(?:\.\w+)*?(?:\.v(\d))?\.b(\d+)", ptx)
            print(
                json.dumps(
                    [kernel.__name__, quantizes, arch, [int(count or 1) * int(bits) for count, bits in accesses]]
                )
            )


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_compiles_with_vector_accesses(tmp_path):
    code = "from tests.ops.test_triton import compile_all; compile_all()"
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == len(ARCHS) * (3 * len(WIDTHS) + 2 + 2 * len(CHANNELS)) + len(ARCHS[1:]) * 3
    for kernel, quantizes, arch, widths in rows:
        # One value each: sigma and next_sigma, a row's scale; a few to a program: gamma and bias.
        single = 2 if kernel in ("_denoise_update", "_rms_silu") else int(quantizes)
        assert len([width for width in widths if width != 128]) <= single, (kernel, arch, widths)
        assert widths.count(128) >= 3, (kernel, arch, widths)


@pytest.mark.parametrize(
    ("backend", "installed", "runs"), [("auto", True, True), ("auto", False, False), ("reference", True, False)]
)
def test_triton_runs_if_installed_and_not_disabled(monkeypatch, backend, installed, runs):
    monkeypatch.setenv("CFPP_BACKEND", backend)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: installed or None)
    assert _triton.choose_backend.__wrapped__()[0] is runs


def test_triton_without_a_compiler_does_not_run(monkeypatch):
    monkeypatch.setenv("CFPP_BACKEND", "auto")
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    monkeypatch.setenv("PATH", "")
    assert _triton.choose_backend.__wrapped__() == (False, "Triton lacks a C compiler (gcc, clang or $CC)")


def test_requiring_kernels_without_triton_is_refused(monkeypatch):
    monkeypatch.setenv("CFPP_BACKEND", "cuda")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="CFPP_BACKEND=cuda cannot be met: triton is not installed"):
        _triton.choose_backend.__wrapped__()


def test_the_package_imports_without_triton():
    code = "import sys; sys.modules['triton'] = None; import cfpp_rt.model.transformer, cfpp_rt.runtime.rollout"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
