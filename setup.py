"""Build of the two compiled modules by ninja; all other metadata is in pyproject.toml.

CFPP_BUILD=auto|cuda|cpu|none  auto (default): the CPU module, and the CUDA module where nvcc is found; none: no module.
CFPP_CUDA_ARCHS="80;90a;120"   GPU architectures; default: those of the GPUs in this machine, else the list shown.
CFPP_BUILD_JOBS                compilers that run at once; default: one per core.
CUDA_HOME, CXX                 where to look for nvcc first; the host compiler (default c++).
No torch header is used, so normal build isolation works and the result serves any torch.
"""

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11
from ninja.ninja_syntax import Writer
from setuptools import Extension, find_packages, setup
from setuptools.command.build_ext import build_ext

MODES = ("auto", "cuda", "cpu", "none")
DEFAULT_ARCHS = "80;90a;120"
CXX_FLAGS = "-std=c++17 -O3 -DNDEBUG -fPIC -fvisibility=hidden -fopenmp -Wall -Wextra -Wno-psabi -Icsrc"
NVCC_FLAGS = "-std=c++17 -O3 -lineinfo -Xcompiler=-fPIC,-fvisibility=hidden -Icsrc"
NVCC_CHECKS = "-Werror=all-warnings -Xptxas=-warn-spills"


def find_nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return (shutil.which("nvcc", path=f"{home}/bin") if home else None) or shutil.which("nvcc")


def cuda_libraries(nvcc: str) -> str:
    """Linker flags of the static CUDA runtime. nvcc names its own root: it may be a wrapper script or a link."""
    dry_run = subprocess.run([nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    root = re.search(r"\bTOP=(\S+)", dry_run)
    if root is None:
        raise SystemExit(f"cfpp-rt: cannot tell the CUDA folder of {nvcc}; set CUDA_HOME")
    folders = (f"{root[1]}/{name}" for name in ("lib64", "lib", f"targets/{platform.machine()}-linux/lib"))
    found = [f"-L{shlex.quote(folder)}" for folder in folders if Path(folder, "libcudart_static.a").exists()]
    return " ".join([*found, "-lcudart_static -ldl -lrt -lpthread"])


def gencode() -> str:
    """One cubin per architecture, and the PTX of the first so that newer GPUs can translate it."""
    wanted = os.environ.get("CFPP_CUDA_ARCHS", "")
    if not wanted and shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=compute_cap", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True).stdout.replace(".", "").split()
        wanted = ";".join({"90": "90a"}.get(cap, cap) for cap in sorted(set(found), key=int) if cap.isdigit())
    archs = (wanted or DEFAULT_ARCHS).replace(",", ";").split(";")
    if not all(re.fullmatch(r"[0-9]{2,3}[af]?", arch) for arch in archs):
        raise SystemExit(f"cfpp-rt: CFPP_CUDA_ARCHS must look like {DEFAULT_ARCHS!r}, got {wanted!r}")
    flags = [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in archs]
    return " ".join([*flags, f"-gencode=arch=compute_{archs[0]},code=compute_{archs[0]}"])


def write_graph(folder: Path, modules: list[str]) -> None:
    """Write `folder`/build.ninja, which builds `folder`/<module>.so for each of the modules _C and _C_cuda."""
    # pip's isolated builds install pybind11 in a new folder every time. A copy in a folder named after its version
    # keeps the command line, by which ninja decides, the same until the version changes.
    headers = Path(folder, f"pybind11-{pybind11.__version__}")
    shutil.copytree(pybind11.get_include(), headers, dirs_exist_ok=True)
    includes = f"-isystem {headers} -isystem {shlex.quote(sysconfig.get_path('include'))}"
    cxx, nvcc = os.environ.get("CXX", "c++"), find_nvcc()
    with open(folder / "build.ninja", "w") as file:
        graph = Writer(file, width=1000)
        graph.variable("builddir", folder)
        dependencies = {"depfile": "$out.d", "deps": "gcc"}
        command = f"{cxx} {CXX_FLAGS} $flags -MMD -MF $out.d -c $in -o $out"
        graph.rule("cxx", command, description="c++ $in", **dependencies)
        if "_C_cuda" in modules:
            command = f"{shlex.quote(nvcc)} {NVCC_FLAGS} {NVCC_CHECKS} {gencode()} -MMD -MF $out.d -c $in -o $out"
            graph.rule("nvcc", command, description="nvcc $in", **dependencies)
        graph.rule("link", f"{cxx} -shared $in -o $out $libraries", description="link $out")
        for module in modules:
            cuda = module == "_C_cuda"
            flags = f"-DCFPP_MODULE={module} -DCFPP_CUDA={int(cuda)} {includes}"
            binding = f"{folder}/{module}.o"
            graph.build(binding, "cxx", "csrc/module.cpp", variables={"flags": flags})
            sources = sorted(set(Path("csrc").rglob("*.cu" if cuda else "*.cpp")) - {Path("csrc/module.cpp")})
            objects = [f"{folder}/{source}.o" for source in sources]
            for source, target in zip(sources, objects, strict=True):
                graph.build(target, "nvcc" if cuda else "cxx", str(source))
            libraries = cuda_libraries(nvcc) if cuda else "-fopenmp"
            graph.build(f"{folder}/{module}.so", "link", [binding, *objects], variables={"libraries": libraries})


class BuildExtension(build_ext):
    def build_extensions(self) -> None:
        # Not in build_temp, which pip deletes: what an earlier build compiled is reused.
        folder = Path("build", sysconfig.get_config_var("SOABI"))
        folder.mkdir(parents=True, exist_ok=True)
        modules = {extension.name.rpartition(".")[2]: extension.name for extension in self.extensions}
        write_graph(folder, list(modules))
        jobs = os.environ.get("CFPP_BUILD_JOBS")
        command = [sys.executable, "-m", "ninja", "-f", str(folder / "build.ninja")]
        subprocess.run([*command, "-j", jobs] if jobs else command, check=True)
        self.force = True  # copies also over a file that is newer
        for module, name in modules.items():
            target = self.get_ext_fullpath(name)
            self.mkpath(os.path.dirname(target))
            self.copy_file(str(folder / f"{module}.so"), target)


def extensions() -> list[Extension]:
    mode, nvcc = os.environ.get("CFPP_BUILD", "auto"), find_nvcc()
    if mode not in MODES:
        raise SystemExit(f"cfpp-rt: CFPP_BUILD must be one of {', '.join(MODES)}, got {mode!r}")
    if mode == "cuda" and nvcc is None:
        raise SystemExit("cfpp-rt: CFPP_BUILD=cuda needs nvcc: put it on PATH, set CUDA_HOME, or use CFPP_BUILD=cpu")
    if mode == "none":
        return []
    names = ["_C", "_C_cuda"] if mode != "cpu" and nvcc is not None else ["_C"]
    return [Extension(f"cfpp_rt.{name}", []) for name in names]


OUTSIDE = ("export", "bench")  # top-level folders, installed as cfpp_rt.<folder>
NESTED = [f"cfpp_rt.{top}.{name}" for top in OUTSIDE for name in find_packages(top)]

setup(
    ext_modules=extensions(),
    cmdclass={"build_ext": BuildExtension},
    packages=[*find_packages(include=["cfpp_rt", "cfpp_rt.*"]), *(f"cfpp_rt.{top}" for top in OUTSIDE), *NESTED],
    package_dir={f"cfpp_rt.{top}": top for top in OUTSIDE},
)
