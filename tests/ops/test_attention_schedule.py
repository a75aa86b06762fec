"""Host tests in C++: who computes what in block_attention on CUDA, and the emulator that runs its kernels here."""

import shutil
import subprocess
from pathlib import Path

import pytest

from tests.emulator.attention import COMPILER, FLAGS, ROOT

PROGRAMS = sorted((ROOT / "tests" / "csrc").glob("test_*.cpp"))
SANITIZE = ["-fsanitize=undefined", "-fno-sanitize-recover=all"]


@pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="no host compiler")
@pytest.mark.parametrize("source", PROGRAMS, ids=lambda path: path.stem)
def test_program_succeeds(source: Path, tmp_path: Path):
    program = tmp_path / source.stem
    subprocess.run([*COMPILER, *FLAGS, "-O1", *SANITIZE, source, "-o", program], check=True)
    run = subprocess.run([program], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
