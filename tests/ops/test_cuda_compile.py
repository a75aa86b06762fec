"""Every CUDA source compiles for the shipped architectures without a warning or a spilled register."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = sorted(ROOT.glob("csrc/*/*.cu"))
ARCHS = ("80", "90a", "120")


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not installed")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_compiles_clean_and_without_spills(source: Path, tmp_path: Path):
    gencode = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    flags = ["-std=c++17", "-O3", f"-I{ROOT / 'csrc'}", "-Werror=all-warnings", "-Xptxas=-v,-warn-spills"]
    command = ["nvcc", *flags, *gencode, "-c", str(source), "-o", str(tmp_path / "object.o")]
    run = subprocess.run(command, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    spills = [int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", run.stderr)]
    assert spills and not any(spills), run.stderr
    for arch in ARCHS:
        assert f"for 'sm_{arch}'" in run.stderr, f"no code for sm_{arch}"
