"""An ONNX bundle: a folder of graphs, their weights and a card that tells a runner all it must know. No torch, no onnx.

card.json      sizes, steps and rollout of the student; bytes and sha256 of every other file
<graph>.onnx   one per graph of `cfpp_rt.export.contract`, and the codec's, if any
weights.bin    the network's weights, shared by its graphs
"""

import contextlib
import dataclasses
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from cfpp_rt.config import ModelConfig, RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import GraphSpec, Sizes, network_graphs
from cfpp_rt.io.digest import sha256_of

FORMAT, FORMAT_VERSION = "cfpp-rt ONNX bundle", 2
CARD, WEIGHTS = "card.json", "weights.bin"
LINEAR_DTYPES = ("float8_e4m3",)  # what linear layers may compute in besides the dtype of all


@dataclasses.dataclass(frozen=True)
class Step:
    """One denoising step: index of its timestep in the card's list, and its noise level."""

    timestep: int
    sigma: float


@dataclasses.dataclass(frozen=True)
class Card:
    """What the exporter knows of the student and the runner needs.

    sizes: all shapes. rollout: settings of the student; frames: latent frames that fit without a window, None with one.
    timesteps: every timestep that the rollout uses. steps, first_steps: of a block, of the first generated block.
    context, given: index of the timestep of the clean pass, and of the one of given frames. linear_dtype: what the
    linear layers of the blocks multiply, one of `LINEAR_DTYPES`; None = as all. codec: graphs that decode, by name, and
    `temporal_factor`; None without. about: student, checkpoint, versions: for people.
    """

    sizes: Sizes
    rollout: RolloutConfig
    frames: int | None
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
        return {**network_graphs(self.sizes), **(self.codec or {})}

    def ring(self) -> FrameRing:
        return FrameRing(self.sizes.sinks, self.sizes.ring, self.sizes.block)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Card":
        """Raises KeyError, TypeError or InputError where something is missing or does not fit."""
        sizes = dict(values["sizes"])
        sizes["model"], sizes["latent_size"] = ModelConfig.from_dict(sizes["model"]), tuple(sizes["latent_size"])
        codec = values["codec"]
        card = cls(
            sizes=Sizes(**sizes),
            rollout=RolloutConfig(**values["rollout"]),
            frames=values["frames"],
            timesteps=tuple(float(t) for t in values["timesteps"]),
            steps=tuple(Step(int(step["timestep"]), float(step["sigma"])) for step in values["steps"]),
            first_steps=tuple(Step(int(step["timestep"]), float(step["sigma"])) for step in values["first_steps"]),
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
        if card.linear_dtype not in (None, *LINEAR_DTYPES):
            raise InputError(f"linear_dtype must be None or {', '.join(LINEAR_DTYPES)}, got {card.linear_dtype!r}")
        known = range(len(card.timesteps))
        used = {card.context, card.given, *(step.timestep for step in (*card.steps, *card.first_steps))}
        if card.sizes.timesteps != len(known) or not used <= set(known) or not card.steps or not card.first_steps:
            raise InputError(f"timesteps must be the {card.sizes.timesteps} that the steps use, got {len(known)}")
        card.ring()  # raises where slots and block do not fit together
        return card


@dataclasses.dataclass(frozen=True)
class Bundle:
    """An opened bundle: its folder and card."""

    folder: Path
    card: Card

    def path(self, graph: str) -> Path:
        return self.folder / f"{graph}.onnx"


def open_bundle(folder: str | Path) -> Bundle:
    """Read the card and check every file against it, byte for byte.

    Raises InputError, one line, for a folder that is no bundle, another format, and files that are missing, truncated
    or changed.
    """
    folder = Path(folder)
    values = read_card(folder, FORMAT, FORMAT_VERSION)
    with fits_together(folder):
        card, files = Card.from_dict(values), dict(values["files"])
        missing = {WEIGHTS, *(f"{name}.onnx" for name in card.graphs)} - set(files)
        if missing:
            raise InputError(f"files must list {', '.join(sorted(missing))}")
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    for name, (size, sha256) in expected.items():
        require_file(folder, name, size, sha256)
    return Bundle(folder, card)


def read_card(folder: Path, wanted: str, version: int) -> dict[str, Any]:
    """card.json of a bundle whose format is `wanted` in that version; InputError, one line, for anything else."""
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
def fits_together(folder: Path) -> Iterator[None]:
    """Whatever reading a card's values raises becomes one line that names the card."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # InputError is a ValueError
        what = f"lacks {error}" if isinstance(error, KeyError) else str(error)
        raise InputError(f"{folder / CARD}: the card does not fit together: {what}") from error


def write_card(folder: Path, card: Card) -> None:
    """Complete a folder that holds all other files already: measure them and write the card."""
    files = {path.name: {"bytes": path.stat().st_size, "sha256": sha256_of(path)} for path in sorted(folder.iterdir())}
    whole = {"format": FORMAT, "format_version": FORMAT_VERSION, **card.to_dict(), "files": files}
    (folder / CARD).write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")


def require_file(folder: Path, name: str, size: int, sha256: str) -> Path:
    """The path of a bundle's file, which must lie in the folder and be what the card says, byte for byte."""
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


def steps_of(timesteps: Sequence[float], sigmas: Sequence[float], known: Sequence[float]) -> tuple[Step, ...]:
    """The steps of a block, their timesteps as indices into `known`."""
    return tuple(Step(known.index(t), sigma) for t, sigma in zip(timesteps, sigmas, strict=True))
