"""An ONNX bundle: a folder of graphs, their weights, and a card for the runner. Needs neither torch nor onnx.

card.json      sizes, steps and rollout settings of the student; bytes and sha256 of every other file
<graph>.onnx   one per graph of `cfpp_rt.export.contract`, and those of the codec, if any
weights.bin    the network's weights, shared by its graphs
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import GraphSpec, Sizes, network_graphs
from cfpp_rt.io.digest import sha256_of

FORMAT, FORMAT_VERSION = "cfpp-rt ONNX bundle", 2
CARD, WEIGHTS = "card.json", "weights.bin"
BUNDLE_LINEAR_DTYPES = ("float8_e4m3",)  # dtypes of the blocks' linear layers besides the dtype of the bundle
_CARD_KEYS = {"config": "rollout", "latent_frames": "frames"}  # field of `Card` -> key in card.json, where they differ


@dataclasses.dataclass(frozen=True)
class Step:
    """One denoising step: the index of its timestep in the card's list, and its noise level."""

    timestep: int
    sigma: float


@dataclasses.dataclass(frozen=True)
class Card:
    """The facts about a student that its runner needs.

    sizes: the numbers behind all shapes.
    config: the student's rollout settings ("rollout" in card.json).
    latent_frames: latent frames that fit into the cache of a bundle without a window; None with a window ("frames" in
        card.json).
    timesteps: every timestep that the rollout uses.
    steps, first_steps: the steps of a block, and of the first generated block.
    context, given: index of the timestep of the clean pass, and of the one for given frames.
    linear_dtype: dtype in which the linear layers of the blocks multiply, one of `BUNDLE_LINEAR_DTYPES`; None = the
        bundle's dtype.
    codec: the codec's graphs by name; None without a codec.
    temporal_factor: frames per latent frame after the first; 1 without a codec.
    about: student, checkpoint and versions, for people.
    """

    sizes: Sizes
    config: RolloutConfig
    latent_frames: int | None
    timesteps: tuple[float, ...]
    steps: tuple[Step, ...]
    first_steps: tuple[Step, ...]
    context: int
    given: int
    linear_dtype: str | None
    codec: dict[str, GraphSpec] | None
    temporal_factor: int
    about: dict[str, Any]

    @property
    def graphs(self) -> dict[str, GraphSpec]:
        """All graphs of the bundle by name."""
        return {**network_graphs(self.sizes), **(self.codec or {})}

    def ring(self) -> FrameRing:
        """Return an empty ring of the bundle's frame slots."""
        return FrameRing(self.sizes.sinks, self.sizes.ring, self.sizes.frames_per_block)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values, under the keys of card.json."""
        values = {_CARD_KEYS.get(name, name): value for name, value in dataclasses.asdict(self).items()}
        return {**values, "sizes": self.sizes.to_dict()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Card":
        """Return the card that `to_dict` wrote.

        Raises KeyError, TypeError or InputError where something is missing or does not fit.
        """
        sizes, codec = Sizes.from_dict(values["sizes"]), values["codec"]
        card = cls(
            sizes=sizes,
            config=RolloutConfig(**values["rollout"]),
            latent_frames=values["frames"],
            timesteps=tuple(float(t) for t in values["timesteps"]),
            steps=_read_steps(values["steps"]),
            first_steps=_read_steps(values["first_steps"]),
            context=int(values["context"]),
            given=int(values["given"]),
            linear_dtype=values["linear_dtype"],
            codec=None if codec is None else {name: GraphSpec.from_dict(graph) for name, graph in codec.items()},
            temporal_factor=int(values["temporal_factor"]),
            about=dict(values["about"]),
        )
        if not all(0 <= step.sigma <= 1 for step in (*card.steps, *card.first_steps)):  # False for NaN
            raise InputError("sigma of a step must be in 0..1")
        if card.temporal_factor < 1:
            raise InputError(f"temporal_factor must be >= 1, got {card.temporal_factor}")
        require_linear_dtype(card.linear_dtype)
        known = range(len(card.timesteps))
        used = {card.context, card.given, *(step.timestep for step in (*card.steps, *card.first_steps))}
        if card.sizes.num_timesteps != len(known) or not used <= set(known) or not card.steps or not card.first_steps:
            raise InputError(f"timesteps must be the {card.sizes.num_timesteps} that the steps use, got {len(known)}")
        card.ring()  # raises where slots and block do not fit together
        return card


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and card."""

    folder: Path
    card: Card

    def path(self, graph: str) -> Path:
        """Return the path of a graph's file."""
        return self.folder / f"{graph}.onnx"


def open_bundle(folder: str | Path) -> Bundle:
    """Read the card and check every file against it, byte for byte.

    Raises InputError, one line, for a folder that is no bundle, another format, and files that are missing, truncated
    or changed.
    """
    folder = Path(folder)
    values = read_card(folder, FORMAT, FORMAT_VERSION)
    with name_card_on_error(folder):
        card, files = Card.from_dict(values), dict(values["files"])
        missing = {WEIGHTS, *(f"{name}.onnx" for name in card.graphs)} - set(files)
        if missing:
            raise InputError(f"files must list {', '.join(sorted(missing))}")
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    for name, (size, sha256) in expected.items():
        require_file(folder, name, size, sha256)
    return Bundle(folder, card)


def read_card(folder: Path, wanted: str, version: int) -> dict[str, Any]:
    """Return the values of a folder's card.json. Raises InputError, one line, for another format or version."""
    path = folder / CARD
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{folder}: no bundle, it has no {CARD}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: truncated or no card ({error})") from error
    found = values.get("format") if isinstance(values, dict) else None
    if found != wanted:
        raise InputError(f"{path}: must be the card of a {wanted!r}, got {repr(found) if found else 'another file'}")
    if values.get("format_version") != version:
        found = values.get("format_version")
        raise InputError(f"{path}: format_version must be {version}, got {found!r}: export again with this cfpp-rt")
    return values


@contextlib.contextmanager
def name_card_on_error(folder: Path) -> Iterator[None]:
    """Turn every error that the body raises while it reads a card's values into one line that names the card."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # InputError is a ValueError
        fault = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{folder / CARD}: the card does not fit together: {fault}") from error


def write_card(folder: Path, card: Card) -> None:
    """Complete a folder that contains all other files: record their sizes and sha256, and write the card."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    values = {"format": FORMAT, "format_version": FORMAT_VERSION, **card.to_dict(), "files": files}
    (folder / CARD).write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


def require_file(folder: Path, name: str, size: int, sha256: str) -> Path:
    """Return the path of a bundle's file. Raises InputError unless it is in the folder, with this size and sha256."""
    if PurePosixPath(name).is_absolute() or ".." in PurePosixPath(name).parts:
        raise InputError(f"{folder / CARD}: a file must lie in the bundle, got {name!r}")
    path = folder / name
    if not path.is_file():
        raise InputError(f"{path}: the file is missing")
    if path.stat().st_size != size:
        raise InputError(f"{path}: must have {size} bytes, got {path.stat().st_size}: truncated or replaced")
    if sha256_of(path) != sha256:
        raise InputError(f"{path}: is not what was exported (sha256 differs)")
    return path


def require_linear_dtype(linear_dtype: str | None) -> None:
    """Raise InputError for a linear_dtype that no bundle has."""
    if linear_dtype not in (None, *BUNDLE_LINEAR_DTYPES):
        raise InputError(f"linear_dtype must be None or {', '.join(BUNDLE_LINEAR_DTYPES)}, got {linear_dtype!r}")


def index_steps(timesteps: Sequence[float], sigmas: Sequence[float], known: Sequence[float]) -> tuple[Step, ...]:
    """Return the steps of a block, with timesteps as indices into `known`."""
    return tuple(Step(known.index(t), sigma) for t, sigma in zip(timesteps, sigmas, strict=True))


def _read_steps(steps: Sequence[Mapping[str, Any]]) -> tuple[Step, ...]:
    return tuple(Step(int(step["timestep"]), float(step["sigma"])) for step in steps)
