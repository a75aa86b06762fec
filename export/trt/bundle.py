"""An engine bundle: a folder with a card, the engines by architecture, and the licence. Written whole or not at all.

card.json says what the engines are of, which library built them, and size and sha256 of each; beside it lie
<architecture>/<graph>.engine and LICENSE.
"""

import dataclasses
import json
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import CARD, Card, fits_together, read_card, require_file
from cfpp_rt.export.trt.build_worker import WEIGHTS
from cfpp_rt.io.digest import sha256_of

FORMAT, FORMAT_VERSION = "cfpp-rt TensorRT bundle", 2


@dataclasses.dataclass(frozen=True)
class EngineBundle:
    """An opened bundle: the verified engines of one architecture by graph, the student's card, and all of card.json."""

    folder: Path
    architecture: str
    engines: dict[str, Path]
    card: Card
    values: dict[str, Any]


def write_card(folder: Path, values: Mapping[str, Any], builds: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> None:
    """Complete a folder that holds the engines already: measure them, write card and licence.

    values: what the engines are of; must hold `student` (a `Card` as a dict), `library` and `library_version`. builds:
    architecture -> graph -> what the card is to say of the build, for every engine in the folder.
    """
    engines: dict[str, dict[str, Any]] = {}
    for architecture, graphs in builds.items():
        engines[architecture] = {}
        for graph, facts in graphs.items():
            file = PurePosixPath(architecture, f"{graph}.engine")
            path = folder / file
            entry = {"file": str(file), "bytes": path.stat().st_size, "sha256": sha256_of(path)}
            engines[architecture][graph] = {**entry, **facts}
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **values, "engines": engines}
    (folder / CARD).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    (folder / "LICENSE").write_text(_licence(), encoding="utf-8")


def open_bundle(folder: str | Path, *, architecture: str, library: str, version: str) -> EngineBundle:
    """Verify the engines of one architecture, byte for byte.

    architecture: of the GPU that is to run them, "sm89". library, version: of the TensorRT that is to load them, which
    must be the one that built them. Raises InputError in one line for every mismatch.
    """
    folder = Path(folder)
    values = read_card(folder, FORMAT, FORMAT_VERSION)
    with fits_together(folder):
        built_by = f"{values['library']} {values['library_version']}"
        card, engines = Card.from_dict(values["student"]), dict(values["engines"])
        unknown = sorted({graph for entries in engines.values() for graph in entries} - set(card.graphs))
        if unknown:
            raise InputError(f"engines must be of the student's graphs, got {', '.join(unknown)}")
        if values["weights"] not in WEIGHTS:
            raise InputError(f"weights must be {', '.join(WEIGHTS)}, got {values['weights']!r}")
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
