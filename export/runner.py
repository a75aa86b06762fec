"""The base of the runners, which execute a bundle's graphs: `OnnxRunner` on the CPU, `TensorRTRunner` on a GPU."""

import functools
import importlib
import threading
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.core.controls import Actions
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.export.bundle import Card
from cfpp_rt.export.contract import GraphSpec, TensorSpec, text_names

Array = NDArray[Any]
Floats = NDArray[np.float32]
_MAX_MODULATIONS = 512  # modulation rows kept, one entry per combination of timesteps and actions


def require_onnxruntime() -> Any:
    """Return the onnxruntime package. Raises MissingExtraError where it is absent."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "running an ONNX bundle") from error


class Buffer:
    """Host memory that graphs are bound to: a numpy array, and onnxruntime's view of it."""

    def __init__(self, array: Array):
        self.array = np.ascontiguousarray(array)

    @functools.cached_property
    def value(self) -> Any:
        """The array's memory as an OrtValue."""
        value = require_onnxruntime().OrtValue.ortvalue_from_numpy(self.array)
        if value.data_ptr() != self.array.ctypes.data:
            raise RuntimeError("onnxruntime copied an array instead of using its memory")
        return value

    @classmethod
    def zeros(cls, spec: TensorSpec) -> "Buffer":
        return cls(np.zeros(spec.shape, spec.dtype))


class Session(Protocol):
    """One graph of a runner, ready to run."""

    spec: GraphSpec

    def bind(self, buffers: Mapping[str, Buffer]) -> None:
        """Bind inputs, and outputs that update them to the same memory, until others are bound."""

    def bind_output(self, name: str, buffer: Buffer) -> None:
        """Bind an output that updates no input: every run writes it to `buffer`."""

    def run(self) -> None:
        """Run on the bound buffers."""

    def run_once(self, **inputs: Array) -> dict[str, Array]:
        """Run on these inputs; return every output. For graphs that update nothing in place."""


class Runner(ABC):
    """Executes the graphs of one bundle. Rollouts, in one thread or in several, may share an `OnnxRunner`.

    card: the bundle's card.
    folder: the bundle's folder, for messages.
    lock: held while a session is bound and run, since what is bound belongs to the session. So the passes of rollouts
        that share a runner follow each other; rollouts with a runner each compute at the same time.
    """

    def __init__(self, card: Card, folder: Path):
        self.card, self.folder = card, folder
        self.lock = threading.RLock()
        self._modulations: dict[tuple[tuple[int, Actions], ...], Buffer] = {}

    @abstractmethod
    def session(self, name: str) -> Session:
        """Return the session of a graph."""

    def modulation(self, *blocks: tuple[int, Actions]) -> Buffer:
        """Return the modulation rows of a pass over these blocks, each given as (timestep index, actions).

        A rollout uses few different ones, so each is computed once and kept.
        """
        with self.lock:
            if blocks not in self._modulations:
                if len(self._modulations) >= _MAX_MODULATIONS:
                    self._modulations.clear()
                rows = [self._embed_time(*block) for block in blocks]
                self._modulations[blocks] = Buffer(np.concatenate(rows, axis=1))
            return self._modulations[blocks]

    def embed_text(self, prompt_embeds: Floats | None) -> dict[str, Buffer]:
        """Return each layer's text keys and values by name; {} for a model without text.

        prompt_embeds: float32 [B, text_len, text_dim], zero past the end of the prompt; None for a model without text.
        """
        model = self.card.sizes.model
        if not model.text_len:
            if prompt_embeds is not None and prompt_embeds.size:
                raise InputError(
                    f"prompt_embeds must not be given to a model without text, got {list(prompt_embeds.shape)}"
                )
            return {}
        if prompt_embeds is None:
            raise InputError("prompt_embeds must be given and finite for a model with text")
        given = np.asarray(prompt_embeds)
        if given.dtype.name not in ("float32", "float16", "bfloat16", "float64"):
            raise InputError(f"prompt_embeds must be an array of floating-point numbers, got {given.dtype}")
        with np.errstate(over="ignore"):
            given = given.astype(np.float32)
            computed = given.astype(np.float16) if self.card.sizes.dtype == "float16" else given
        if not np.isfinite(computed).all():
            raise InputError("prompt_embeds must be given and finite for a model with text, got NaN or infinity")
        with self.lock:
            made = self.session("embed_text").run_once(embeds=given)
        return {name: Buffer(made[name]) for name in text_names(model.num_layers)}

    def _embed_time(self, timestep: int, actions: Actions) -> Array:
        inputs = {"actions": np.array(actions, np.int64)} if actions else {}
        return self.session("embed_time").run_once(timestep=np.array([timestep], np.int64), **inputs)["modulation"]


def require_input(spec: GraphSpec, tensor: TensorSpec, array: Array) -> None:
    """Raise InputError unless `array` has the shape, dtype and range that the contract gives for an input."""
    if array.shape != tensor.shape or array.dtype.name != tensor.dtype:
        raise InputError(
            f"{spec.name}: {tensor.name} must be {tensor.dtype} {list(tensor.shape)},"
            f" got {array.dtype.name} {list(array.shape)}"
        )
    if tensor.low is None or tensor.high is None:
        return
    if array.min() < tensor.low or array.max() > tensor.high:
        raise InputError(f"{spec.name}: {tensor.name} must be in {tensor.low}..{tensor.high}, got {array.tolist()}")
