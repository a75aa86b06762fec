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
from cfpp_rt.export.bundle import CARD, Card, sha256_of

FORMAT, FORMAT_VERSION = "cfpp-rt TensorRT bundle", 1


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


def read_card(folder: str | Path) -> dict[str, Any]:
    """card.json of a bundle. Raises InputError for a folder that is none, or is of another format."""
    path = Path(folder) / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no engine bundle, it has no {CARD}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or no card ({error})") from error
    if not isinstance(values, dict) or values.get("format") != FORMAT:
        raise InputError(f"{path}: must be the card of a {FORMAT!r}, got another file")
    if values.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format_version must be {FORMAT_VERSION}, got {values.get('format_version')!r}:"
            " build the engines again with this cfpp-rt"
        )
    lacking = [name for name in ("student", "library", "library_version", "weights", "engines") if name not in values]
    if lacking:
        raise InputError(f"{path}: the card lacks {', '.join(lacking)}")
    return values


def open_bundle(folder: str | Path, *, architecture: str, library: str, version: str) -> EngineBundle:
    """Verify the engines of one architecture, byte for byte.

    architecture: of the GPU that is to run them, "sm89". library, version: of the TensorRT that is to load them, which
    must be the one that built them. Raises InputError in one line for every mismatch.
    """
    folder = Path(folder)
    values = read_card(folder)
    built_by = f"{values['library']} {values['library_version']}"
    if built_by != f"{library} {version}":
        raise InputError(
            f"{folder}: engines of {built_by} do not load in {library} {version}:"
            f" pip install {built_by.replace(' ', '==')}, or build them again"
        )
    try:
        card = Card.from_dict(values["student"])
        entries = values["engines"].get(architecture)
        if entries is None:
            raise InputError(
                f"no engines for this GPU ({architecture}), only for {', '.join(sorted(values['engines']))}:"
                f" build with --targets {architecture}"
            )
        unknown = sorted(set(entries) - set(card.graphs))
        if unknown:
            raise InputError(f"engines must be of the student's graphs, got {', '.join(unknown)}")
        engines = {name: _verified(folder, name, entry) for name, entry in entries.items()}
    except InputError as error:
        raise InputError(f"{folder}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{folder / CARD}: the card does not fit together: {what}") from error
    return EngineBundle(folder, architecture, engines, card, values)


def _verified(folder: Path, graph: str, entry: Mapping[str, Any]) -> Path:
    file, size, digest = PurePosixPath(entry["file"]), entry["bytes"], entry["sha256"]
    if file.is_absolute() or ".." in file.parts:
        raise InputError(f"the engine of {graph} must lie in the bundle, got {str(file)!r}")
    path = folder / file
    if not path.is_file():
        raise InputError(f"{file}: the engine is missing")
    found = path.stat().st_size
    if found != size:
        raise InputError(f"{file}: must have {size} bytes, got {found}: the engine is truncated or was replaced")
    if sha256_of(path) != digest:
        raise InputError(f"{file}: its contents are not those that were built (sha256 differs)")
    return path


def _licence() -> str:
    texts = (found.read_text("licenses/LICENSE") for found in distributions(name="cfpp-rt"))
    text = next((text for text in texts if text), None)
    if text is None:
        raise InputError("cfpp-rt is installed without its licence file: pip install --force-reinstall cfpp-rt")
    return text
