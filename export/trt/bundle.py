"""An engine bundle: a folder with a card, the engines by architecture, and the licence. Complete, or not there at all.

card.json records the student, the library that built the engines, and size and sha256 of each engine. Beside it are
<architecture>/<graph>.engine and LICENSE.
"""

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import CARD, Card, name_card_on_error, read_card, require_file
from cfpp_rt.export.trt.build_worker import WEIGHT_MODES
from cfpp_rt.io.digest import sha256_of

FORMAT, FORMAT_VERSION = "cfpp-rt TensorRT bundle", 2


@dataclasses.dataclass(frozen=True)
class EngineBundle:
    """An opened bundle.

    engines: the verified engine file of each graph, for one architecture.
    card: the student's card.
    values: all of card.json.
    """

    folder: Path
    architecture: str
    engines: dict[str, Path]
    card: Card
    values: dict[str, Any]


def write_engine_card(
    folder: Path, values: Mapping[str, Any], builds: Mapping[str, Mapping[str, Mapping[str, Any]]]
) -> None:
    """Complete a folder that contains all engines: record their sizes and sha256, write card and licence.

    values: the card's other values; must have `student` (`Card.to_dict`), `library` and `library_version`.
    builds: architecture -> graph -> the card's entry about the build, for every engine in the folder.
    """
    engines: dict[str, dict[str, Any]] = {}
    for architecture, graphs in builds.items():
        engines[architecture] = {}
        for graph, facts in graphs.items():
            file = PurePosixPath(architecture, f"{graph}.engine")
            path = folder / file
            entry = {"file": str(file), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            engines[architecture][graph] = {**entry, **facts}
    card = {"format": FORMAT, "format_version": FORMAT_VERSION, **values, "engines": engines}
    (folder / CARD).write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    (folder / "LICENSE").write_text(_licence(), encoding="utf-8")


def open_engine_bundle(folder: str | Path, *, architecture: str, library: str, version: str) -> EngineBundle:
    """Verify the engines of one architecture, byte for byte.

    architecture: that of the GPU that will run them, "sm89" etc.
    library, version: the TensorRT that will load them, which must be the one that built them.

    Raises InputError in one line for every mismatch.
    """
    folder = Path(folder)
    values = read_card(folder, FORMAT, FORMAT_VERSION)
    with name_card_on_error(folder):
        built_by = f"{values['library']} {values['library_version']}"
        card, engines = Card.from_dict(values["student"]), dict(values["engines"])
        unknown = sorted({graph for entries in engines.values() for graph in entries} - set(card.graphs))
        if unknown:
            raise InputError(f"engines must be of the student's graphs, got {', '.join(unknown)}")
        if values["weights"] not in WEIGHT_MODES:
            raise InputError(f"weights must be {', '.join(WEIGHT_MODES)}, got {values['weights']!r}")
        expected = {
            graph: (entry["file"], entry["bytes"], entry["sha256"])
            for graph, entry in engines.get(architecture, {}).items()
        }
    if built_by != f"{library} {version}":
        raise InputError(
            f"{folder}: engines of {built_by} do not load in {library} {version}:"
            f" pip install {built_by.replace(' ', '==')}, or build them again"
        )
    if not expected:
        raise InputError(
            f"{folder}: no engines for this GPU ({architecture}), only for {', '.join(sorted(engines))}:"
            f" build with --targets {architecture}"
        )
    files = {graph: require_file(folder, *entry) for graph, entry in expected.items()}
    return EngineBundle(folder, architecture, files, card, values)


def _licence() -> str:
    texts = (found.read_text("licenses/LICENSE") for found in distributions(name="cfpp-rt"))
    text = next((text for text in texts if text), None)
    if text is None:
        raise InputError("cfpp-rt is installed without its licence file: pip install --force-reinstall cfpp-rt")
    return text
