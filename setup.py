"""Build of the two compiled modules; all other metadata is in pyproject.toml.

CFPP_BUILD=auto|cuda|cpu|none  auto (default): the CPU module, and the CUDA module where nvcc is found; none: no module.
CFPP_CUDA_ARCHS="80;90a;120"   GPU architectures; default: those of the GPUs in this machine, else the list shown.
CFPP_BUILD_JOBS                compilers that run at once; default: one per core.
CUDA_HOME, CXX                 where to look for nvcc first; the host compiler.
No torch header is used, so normal build isolation works and the result serves any torch.
"""

import os
import platform
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext

MODES = ("auto", "cuda", "cpu", "none")
JOBS = "CFPP_BUILD_JOBS"
DEFAULT_ARCHS = "80;90a;120"
HEADERS = sorted(str(path) for pattern in ("*.h", "*.cuh") for path in Path("csrc").glob(f"*/{pattern}"))


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def cuda_library_dirs(nvcc: str) -> list[str]:
    """Folders of libcudart_static.a. nvcc itself is asked for its root: it may be a wrapper script or a link."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    root = re.search(r"\bTOP=(\S+)", dry_run)
    if root is None:
        raise SystemExit(f"cfpp-rt: cannot tell the CUDA folder of {nvcc}; set CUDA_HOME")
    folders = (f"{root[1]}/{name}" for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"))
    return [folder for folder in folders if Path(folder, "libcudart_static.a").exists()]


def cuda_archs() -> list[str]:
    wanted = os.environ.get("CFPP_CUDA_ARCHS", "")
    if not wanted and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout.replace(".", "").split()
        wanted = ";".join({"90": "90a"}.get(cap, cap) for cap in sorted(set(found), key=int) if cap.isdigit())
    archs = (wanted or DEFAULT_ARCHS).replace(",", ";").split(";")
    if not all(re.fullmatch(r"[0-9]{2,3}[af]?", arch) for arch in archs):
        raise SystemExit(f"cfpp-rt: CFPP_CUDA_ARCHS must look like {DEFAULT_ARCHS!r}, got {wanted!r}")
    return archs


def gencode(archs: list[str]) -> list[str]:
    """One cubin per architecture, and the PTX of the first so that newer GPUs can translate it."""
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return [*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"]


class BuildExtension(build_ext):
    def build_extension(self, ext):
        outer = self.build_temp
        self.build_temp = os.path.join(outer, ext.name)  # the two modules compile the same sources differently
        try:
            if ext.name.endswith("_cuda"):
                ext.extra_objects = self.compile_cuda()
            super().build_extension(ext)
        finally:
            self.build_temp = outer

    def compile_cuda(self) -> list[str]:
        nvcc, compilations = find_nvcc(), []
        flags = ["-std=c++17", "-O3", "-lineinfo", "-Icsrc", "-Xcompiler=-fPIC,-fvisibility=hidden"]
        flags += ["-Werror=all-warnings", "-Xptxas=-warn-spills", *gencode(cuda_archs())]
        for source in sorted(Path("csrc").glob("*/*.cu")):
            target = Path(self.build_temp, source).with_suffix(".cu.o")
            target.parent.mkdir(parents=True, exist_ok=True)
            compilations.append([nvcc, *flags, "-c", str(source), "-o", str(target)])
        with ThreadPoolExecutor(int(os.environ.get(JOBS, 0)) or os.cpu_count()) as pool:
            list(pool.map(self.spawn, compilations))
        return [command[-1] for command in compilations]


def extension(name: str, sources: list[str], cuda: int, **options) -> Pybind11Extension:
    options["define_macros"] = [("CFPP_MODULE", name), ("CFPP_CUDA", cuda)]
    options["extra_compile_args"] = ["-O3", "-Wall", "-Wextra", *options.get("extra_compile_args", [])]
    sources = ["csrc/module.cpp", *map(str, sorted(Path("csrc").glob("*/*_binding.cpp"))), *sources]
    return Pybind11Extension(f"cfpp_rt.{name}", sources, depends=HEADERS, include_dirs=["csrc"], cxx_std=17, **options)


def extensions() -> list[Pybind11Extension]:
    mode, nvcc = os.environ.get("CFPP_BUILD", "auto"), find_nvcc()
    if mode not in MODES:
        raise SystemExit(f"cfpp-rt: CFPP_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda" and nvcc is None:
        raise SystemExit("cfpp-rt: CFPP_BUILD=cuda needs nvcc: put it on PATH, set CUDA_HOME, or use CFPP_BUILD=cpu")
    if mode == "none":
        return []
    cpu_sources = [str(path) for path in sorted(Path("csrc").glob("*/*_cpu.cpp"))]
    openmp = {"extra_compile_args": ["-fopenmp"], "extra_link_args": ["-fopenmp"]}
    modules = [extension("_C", cpu_sources, 0, **openmp)]
    if mode != "cpu" and nvcc is not None:
        libraries = ["cudart_static", "dl", "rt", "pthread"]
        depends = sorted(str(path) for path in Path("csrc").glob("*/*.cu"))
        modules.append(extension("_C_cuda", [], 1, libraries=libraries, library_dirs=cuda_library_dirs(nvcc)))
        modules[-1].depends += depends
    return modules


OUTSIDE = ("export", "bench")  # top-level folders, installed as cfpp_rt.<folder>
NESTED = [f"cfpp_rt.{top}.{name}" for top in OUTSIDE for name in find_packages(top)]

ParallelCompile(JOBS).install()  # of the host's sources
setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    packages=[*find_packages(include=["cfpp_rt", "cfpp_rt.*"]), *(f"cfpp_rt.{top}" for top in OUTSIDE), *NESTED],
    package_dir={f"cfpp_rt.{top}": top for top in OUTSIDE},
)
