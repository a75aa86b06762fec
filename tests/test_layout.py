"""The rules of the tree, kept by a test: who may import whom, one op one room, no torch in csrc, no long files."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = {"cfpp_rt": ROOT / "cfpp_rt", "cfpp_rt.export": ROOT / "export", "cfpp_rt.bench": ROOT / "bench"}

# A module may import from its own layer and from the layers above it in this list.
LAYERS = [
    {"errors", "config", "values"},
    {"core", "device", "io", "options"},
    {"reference"},
    {"ops"},
    {"cache", "codec", "text"},
    {"model"},
    {"speed", "runtime"},
    {"pipeline"},
    {"distill"},
    {"random_weights"},
    {"world"},
    {"cli"},
    {"export", "bench"},
]
# Memory-bound ops: their CUDA kernels are written in Triton, and one benchmark times them all.
POINTWISE = {"adaln_modulate", "gated_residual", "denoise_update"}

# Names that the vocabulary of CONTRIBUTING.md has replaced: whole identifiers, and words that identifiers are made of.
RETIRED = {
    *("Conditioning", "StreamBatch", "Graphs", "GraphedPasses", "CachePass", "CameraPass", "MaskedCamera", "TimeRows"),
    *("Engine", "EngineRollout", "EngineStream", "EngineDecoder", "EngineCameras", "EngineFilm", "TensorRTEngine"),
    *("STUDENTS", "load_student", "switch_prompt", "why_not_graphs", "Draws", "encode_text", "student_name"),
    *("most_keys", "sees", "upshot", "in_turns", "give_back"),
}
RETIRED_WORDS = {"picture", "pictures", "film", "films", "lend", "lent", "roof", "contender", "told", "asked", "draws"}


def modules():
    for package, folder in PACKAGES.items():
        for path in folder.rglob("*.py"):
            parts = [*package.split("."), *path.relative_to(folder).with_suffix("").parts]
            yield path, [part for part in parts if part != "__init__"]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module


def layer(room):
    return next(i for i, rooms in enumerate(LAYERS) if room in rooms)


@pytest.mark.parametrize("path,name", [pytest.param(p, n, id=".".join(n)) for p, n in modules()])
def test_imports_point_one_way(path, name):
    if len(name) == 1:
        return  # the package itself gathers the public names
    room = name[1]
    for imported in imports(path):
        parts = imported.split(".")
        if parts[0] == "cfpp_rt" and len(parts) > 1:
            assert layer(parts[1]) <= layer(room), f"{room} imports {imported}"


def test_the_root_stays_small():
    assert len(list((ROOT / "cfpp_rt").glob("*.py"))) <= 10


def test_one_op_one_room():
    for folder in (ROOT / "csrc").iterdir():
        if not folder.is_dir() or folder.name == "common":
            continue
        op = folder.name
        wanted = [folder / f"{op}{end}" for end in (".h", "_cpu.cpp", "_binding.h")]
        wanted += [ROOT / "cfpp_rt" / room / f"{op}.py" for room in ("ops", "reference")]
        bench = "pointwise" if op in POINTWISE else op
        wanted += [ROOT / "tests" / "ops" / f"test_{op}.py", ROOT / "bench" / "ops" / f"{bench}.py"]
        wanted += [ROOT / "cfpp_rt" / "ops" / f"{op}_triton.py" if op in POINTWISE else folder / f"{op}.cu"]
        assert not [str(path.relative_to(ROOT)) for path in wanted if not path.exists()]


def test_an_op_of_triton_alone_has_its_room_too():
    for kernel in (ROOT / "cfpp_rt" / "ops").glob("[!_]*_triton.py"):
        op = f"{kernel.stem.removesuffix('_triton')}.py"
        wanted = [ROOT / "cfpp_rt" / "ops" / op, ROOT / "cfpp_rt" / "reference" / op]
        wanted.append(ROOT / "tests" / "ops" / f"test_{op}")
        assert not [str(path.relative_to(ROOT)) for path in wanted if not path.exists()]


def identifiers(path):
    """Identifiers of a Python file: names, attributes, arguments, definitions, keywords."""
    for node in ast.walk(ast.parse(path.read_text())):
        for field in ("id", "attr", "arg", "name"):
            if isinstance(value := getattr(node, field, None), str):
                yield value


@pytest.mark.parametrize("folder", ["cfpp_rt", "export", "bench", "tests"])
def test_retired_names_stay_retired(folder):
    """One name per concept: see the vocabulary in CONTRIBUTING.md."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for name in identifiers(path):
            words = re.split(r"[_.]+|(?<=[a-z])(?=[A-Z])", name)
            if name in RETIRED or RETIRED_WORDS & {word.lower() for word in words}:
                found.add(f"{path.relative_to(ROOT)}: {name}")
    assert not sorted(found)


@pytest.mark.parametrize("folder", ["cfpp_rt", "export", "bench"])
def test_docstrings_begin_with_what_the_thing_is_or_does(folder):
    riddles = re.compile(r"(Of|Those|As|All that|To the|Nobody|Who|What|Whether|Where)\b(?!.*\?$)", re.MULTILINE)
    found = []
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if riddles.match(text):
                    found.append(f"{path.relative_to(ROOT)}: {text.splitlines()[0]}")
    assert not found


def test_public_names_have_types():
    """`__init__.pyi` lists what `__init__.py` gives, from the same modules."""
    import cfpp_rt

    stub = (ROOT / "cfpp_rt" / "__init__.pyi").read_text()
    listed = re.findall(r"^from cfpp_rt\.(\S+) import (\w+) as \2$", stub, re.MULTILINE)
    assert {name: module for module, name in listed} == cfpp_rt._PUBLIC


def test_csrc_is_free_of_torch():
    for path in (ROOT / "csrc").rglob("*.*"):
        includes = [line for line in path.read_text().splitlines() if line.startswith("#include")]
        assert not [line for line in includes if any(word in line for word in ("torch", "ATen", "c10"))], path


def test_files_stay_readable():
    code = [p for folder in ("csrc", "cfpp_rt", "export", "bench", "tests") for p in (ROOT / folder).rglob("*")]
    long = {
        p.name: n
        for p in code
        if p.suffix in {".py", ".cpp", ".cu", ".cuh", ".h"}
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_core_imports_are_light():
    """The package imports with none of the extras, and the command's help without even torch."""
    for statement, banned in (
        ("import cfpp_rt", {"diffusers", "transformers", "av", "PIL", "matplotlib", "triton"}),
        ("import cfpp_rt.cli.main", {"torch"}),
    ):
        code = f"import sys; {statement}; print(sorted({banned!r} & set(sys.modules)))"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
        assert done.stdout.strip() == "[]", f"{statement} imports {done.stdout.strip()}"
