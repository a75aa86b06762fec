"""Every CUDA source compiles for the supported architectures without a warning or a spilled register, and the attention
kernels contain the instructions they are written for. Needs nvcc, but no GPU."""

import importlib.metadata
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/**/*.cu"))
ARCHS = ("80", "89", "90a", "120")
FLAGS = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror=all-warnings"]


def label(source: Path) -> str:
    return "-".join(source.relative_to(ROOT / "csrc").with_suffix("").parts)


pytestmark = pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """compiled(source, arch): the cubin and what the compiler said. Each is made once."""
    folder, done = tmp_path_factory.mktemp("cubins"), {}

    def compile_once(source: Path, arch: str) -> tuple[Path, str]:
        if (source, arch) not in done:
            cubin = folder / f"{label(source)}.{arch}.cubin"
            command = ["nvcc", *FLAGS, "-Xptxas=-v", f"-arch=sm_{arch}", "-cubin", str(source), "-o", str(cubin)]
            run = subprocess.run(command, capture_output=True, text=True)
            assert run.returncode == 0, run.stderr
            done[source, arch] = cubin, run.stderr
        return done[source, arch]

    return compile_once


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("source", SOURCES, ids=label)
def test_device_code_has_no_spills(compiled, source: Path, arch: str):
    _, log = compiled(source, arch)
    found = re.findall(r"entry function '(\w+)' for 'sm_(\w+)'[^']*?(\d+) bytes spill stores, (\d+) bytes spill", log)
    kernels = set(re.findall(r"entry function '(\w+)'", log))
    assert {name for name, *_ in found} == kernels, log
    assert all(built_for == arch for _, built_for, *_ in found), log
    assert not {name: (stores, loads) for name, _, stores, loads in found if (stores, loads) != ("0", "0")}
    # What ptxas says when it ignores setmaxnreg (C7508) or runs wgmma one by one (C7510 to C7515).
    assert not re.findall(r".*C75(?:08|1[0-5]).*", log)


@pytest.mark.parametrize("source", SOURCES, ids=label)
def test_host_code_compiles_clean(source: Path, tmp_path: Path):
    flags = [*FLAGS, "-Xcompiler=-Wall,-Wextra", "-gencode=arch=compute_80,code=compute_80"]
    run = subprocess.run(["nvcc", *flags, "-c", source, "-o", tmp_path / "object.o"], capture_output=True, text=True)
    assert run.returncode == 0 and "warning" not in run.stderr, run.stderr


def find_nvdisasm() -> str | None:
    """On PATH, in NVIDIA's package, or in Triton's."""
    if path := shutil.which("nvdisasm"):
        return path
    for package in ("nvidia-cuda-nvdisasm", "triton"):
        try:
            files = importlib.metadata.files(package) or []
        except importlib.metadata.PackageNotFoundError:
            continue
        for file in files:
            if file.name == "nvdisasm":
                return str(file.locate())
    return None


def instructions(cubin: Path) -> dict[str, Counter]:
    """How often each SASS instruction (without its modifiers, and with) stands in each kernel."""
    nvdisasm = find_nvdisasm()
    if nvdisasm is None:
        pytest.skip("nvdisasm is not installed: pip install nvidia-cuda-nvdisasm")
    text = subprocess.run([nvdisasm, "-c", str(cubin)], capture_output=True, text=True, check=True).stdout
    kernels = {}
    for section in re.split(r"\.section\s+\.text\.", text)[1:]:
        found = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", section)
        names = [full.split(".")[0] for full in found]
        kernels[section.split(",")[0]] = Counter(names) + Counter(full for full in found if "." in full)
    assert kernels
    return kernels


def attention_source(architecture: str) -> Path:
    return ROOT / "csrc/block_attention" / architecture / "kernel.cu"


@pytest.mark.parametrize("arch", ["80", "89", "120"])
def test_sm80_kernels_use_tensor_cores_and_asynchronous_copies(compiled, arch: str):
    kernels = instructions(compiled(attention_source("sm80"), arch)[0])
    assert len(kernels) == 6  # two dtypes, three tile shapes
    for name, count in kernels.items():
        head_dim, warps, row_tiles, kv_rows = map(int, re.findall(r"Li(\d+)E", name)[:4])
        # At least: one tile of keys, both products, 16x8x16 each.
        assert count["HMMA"] >= 2 * row_tiles * (kv_rows // 8) * (head_dim // 16), name
        rows = 16 * row_tiles * warps + 2 * 2 * kv_rows  # Q; K and V, loaded before the loop and in it
        assert count["LDGSTS"] >= rows * head_dim // 8 // (32 * warps), name
        # Four matrices at a time: Q and K step by step along head_dim, V along the keys.
        steps, v_loads = head_dim // 16, (kv_rows // 16) * (head_dim // 16)
        assert count["LDSM"] >= steps * (row_tiles + kv_rows // 16) + v_loads, name
        assert count["LDL"] == count["STL"] == 0, name


def test_sm90_kernels_use_wgmma_and_tma(compiled):
    kernels = instructions(compiled(attention_source("sm90"), "90a")[0])
    assert len(kernels) == 4  # two dtypes, two head sizes
    for name, count in kernels.items():
        assert count["HGMMA"] and count["UTMALDG"] and count["USETMAXREG"] == 2, name
        assert count["LDL"] == count["STL"] == 0, name
        # As many as there are products would mean that ptxas waits for each of them.
        assert count["WARPGROUP.ARRIVE"] < count["HGMMA"] and count["WARPGROUP.DEPBAR"] < count["HGMMA"], name
