"""An engine bundle: a folder with a card, the engines by architecture, and the licence. Written whole or not at all.

card.json says what the engines are of, which library built them, and size and sha256 of each; beside it lie
<architecture>/<graph>.engine and LICENSE.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from importlib.metadata import distributions
from pathlib import Path, PurePosixPath
from typing import Any

from cfpp_rt.errors import InputError

FORMAT, FORMAT_VERSION = "cfpp-rt TensorRT bundle", 1
CARD, LICENCE = "card.json", "LICENSE"
_SPACE_MARGIN = 64 * 2**20


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle: the engines of one architecture by graph, verified, and the card they came with."""

    folder: Path
    architecture: str
    engines: dict[str, Path]
    card: dict[str, Any]


@contextlib.contextmanager
def new_folder(target: str | Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its name when the body ends well, and vanishes when it does not.

    Raises InputError where `target` exists or cannot be made, or, in one line, where the disk is full.
    """
    target = Path(target).resolve()
    if target.exists():
        raise InputError(f"{target}: exists already; a bundle is never written over: remove it or choose another name")
    temporary = target.with_name(f".{target.name[:100]}.{secrets.token_hex(4)}")
    try:
        temporary.mkdir()
    except OSError as error:
        raise InputError(f"{target}: cannot be written ({error.strerror})") from error
    try:
        yield temporary
        os.rename(temporary, target)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise InputError(f"{target}: no space left on the disk") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def require_space(folder: str | Path, needed_bytes: int) -> None:
    """Raise InputError unless the disk that will hold `folder` has room for so many bytes and a little more."""
    free = shutil.disk_usage(Path(folder).resolve().parent).free
    if free < needed_bytes + _SPACE_MARGIN:
        raise InputError(
            f"{folder}: the engines need about {needed_bytes / 2**20:.0f} MiB, the disk has {free / 2**20:.0f} MiB free"
        )


def write_card(folder: Path, card: Mapping[str, Any], architectures: Mapping[str, Mapping[str, Any]]) -> None:
    """Complete a folder that holds the engines already: measure them, write card and licence.

    card: what the engines are of; must name `library` and `library_version`. architectures: architecture -> graph ->
    what the card is to say of the build, for every engine in the folder.
    """
    engines: dict[str, dict[str, Any]] = {}
    for architecture, graphs in architectures.items():
        engines[architecture] = {}
        for graph, facts in graphs.items():
            file = PurePosixPath(architecture, f"{graph}.engine")
            path = folder / file
            entry = {"file": str(file), "bytes": path.stat().st_size, "sha256": _sha256(path)}
            engines[architecture][graph] = {**entry, **facts}
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **card, "engines": engines}
    (folder / CARD).write_text(json.dumps(whole, indent=2) + "\n", encoding="utf-8")
    (folder / LICENCE).write_text(_licence(), encoding="utf-8")


def read_card(folder: str | Path) -> dict[str, Any]:
    """The card of a bundle. Raises InputError for a folder that is none, or is of a newer format."""
    path = Path(folder) / CARD
    try:
        card = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no engine bundle, it has no {CARD}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or no card ({error})") from error
    if not isinstance(card, dict) or card.get("format") != FORMAT:
        raise InputError(f"{path}: must be the card of a {FORMAT!r}, got another file")
    if card.get("format_version") != FORMAT_VERSION:
        raise InputError(
            f"{path}: format version must be {FORMAT_VERSION}, got {card.get('format_version')!r}:"
            " build the engines again with this cfpp-rt"
        )
    if not isinstance(card.get("engines"), dict) or not isinstance(card.get("library_version"), str):
        raise InputError(f"{path}: the card lacks its engines or the version of their library")
    return card


def open_bundle(folder: str | Path, *, architecture: str, library: str, version: str) -> Bundle:
    """Verify the engines of one architecture, byte for byte, and return where they are.

    architecture: of the GPU that is to run them, "sm89". library, version: of the TensorRT that is to load them, which
    must be the one that built them. Raises InputError in one line for every mismatch.
    """
    card = read_card(folder)
    if card.get("library") != library or card["library_version"] != version:
        raise InputError(
            f"{folder}: engines of {card.get('library')} {card['library_version']} do not load in {library} {version}:"
            f" pip install {card.get('library')}=={card['library_version']}, or build them again"
        )
    entries = card["engines"].get(architecture)
    if entries is None:
        raise InputError(
            f"{folder}: no engines for this GPU ({architecture}), only for {', '.join(sorted(card['engines']))}:"
            f" build with --targets {architecture}"
        )
    engines = {graph: _verified(Path(folder), graph, entry) for graph, entry in entries.items()}
    return Bundle(Path(folder), architecture, engines, card)


def _verified(folder: Path, graph: str, entry: Any) -> Path:
    try:
        file, size, digest = PurePosixPath(entry["file"]), entry["bytes"], entry["sha256"]
    except (KeyError, TypeError) as error:
        raise InputError(f"{folder / CARD}: the entry of engine {graph} lacks its file, bytes or sha256") from error
    if file.is_absolute() or ".." in file.parts:
        raise InputError(f"{folder / CARD}: an engine must lie in the bundle, got {str(file)!r}")
    path = folder / file
    if not path.is_file():
        raise InputError(f"{path}: the engine is missing")
    found = path.stat().st_size
    if found != size:
        raise InputError(f"{path}: must have {size} bytes, got {found}: the engine is truncated or was replaced")
    if _sha256(path) != digest:
        raise InputError(f"{path}: its contents are not those that were built (sha256 differs)")
    return path


def _licence() -> str:
    texts = (found.read_text("licenses/LICENSE") for found in distributions(name="cfpp-rt"))
    text = next((text for text in texts if text), None)
    if text is None:
        raise InputError(
            "the installed cfpp-rt must hold its licence, it does not: pip install --force-reinstall cfpp-rt"
        )
    return text


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()
