"""Imports TensorRT, which no other module does: `tensorrt` (10.15 or newer) or `tensorrt_rtx`, and collects its log.

The two libraries have one Python interface under two names. TensorRT builds only for the GPU that it finds;
TensorRT-RTX builds ahead of time for a list of compute capabilities, also on a machine without a GPU.
"""

import dataclasses
import functools
import importlib
import re
from typing import Any

from cfpp_rt.errors import InputError, MissingExtraError

LIBRARIES = {"tensorrt-rtx": "tensorrt_rtx", "tensorrt": "tensorrt"}  # name of the package -> name of the module
CURRENT = "current"

# Log lines that mean that an engine would compute something else than the graph, whatever the builder returns.
_FATAL_LINES = re.compile(r"Unused Input:|is unused or used only at compile-time")


@dataclasses.dataclass(frozen=True)
class Library:
    """An imported TensorRT.

    name: a key of LIBRARIES.
    version: as the module reports it.
    api: the module.
    logger: its only logger. The library keeps the first one that it gets for the lifetime of the process.
    log: all lines of the log, (severity, text), in order.
    """

    name: str
    version: str
    api: Any
    logger: Any
    log: list[tuple[str, str]]

    @property
    def targets(self) -> tuple[str, ...]:
        """Architectures that an engine can be built for: "sm80", ...; "current" is the GPU of this machine."""
        if self.name == "tensorrt":
            return (CURRENT,)
        known = (name.lower() for name in self.api.ComputeCapability.__members__ if name.startswith("SM"))
        return (*known, CURRENT)

    def require_target(self, target: str) -> None:
        """Raise InputError, with an alternative, for an architecture that this library cannot build for."""
        if target in self.targets:
            return
        if self.name == "tensorrt":
            raise InputError(
                f"target must be 'current' with TensorRT, got {target!r}: it builds for the GPU of its machine;"
                " build there, or ahead of time with --library tensorrt-rtx"
            )
        hint = ""
        if target in ("sm90", "sm100", "sm103"):  # Hopper and the data centre Blackwells
            hint = (
                ": TensorRT-RTX has no target for data centre GPUs after sm80; on that machine"
                " pip install tensorrt and use --library tensorrt --targets current"
            )
        raise InputError(f"target must be one of {', '.join(self.targets)}, got {target!r}{hint}")

    def messages(self, *severities: str) -> list[str]:
        """Return the log lines at these severities: INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE."""
        return [text for severity, text in self.log if severity in severities]

    def fatal_messages(self) -> list[str]:
        """Return the log lines which mean that the engine ignores a part of the graph."""
        return [text for _, text in self.log if _FATAL_LINES.search(text)]


@functools.cache
def load_library(name: str = "auto") -> Library:
    """Import TensorRT once per process.

    name: "tensorrt", "tensorrt-rtx", or "auto": the first of `LIBRARIES` that is installed.

    Raises MissingExtraError naming the pip command where none is installed, InputError for one that is too old.
    """
    if name != "auto" and name not in LIBRARIES:
        raise InputError(f"library must be auto, {' or '.join(LIBRARIES)}, got {name!r}")
    for candidate in LIBRARIES if name == "auto" else (name,):
        try:
            api = importlib.import_module(LIBRARIES[candidate])
        except ImportError:
            continue
        _require_features(candidate, api)
        log: list[tuple[str, str]] = []
        return Library(candidate, api.__version__, api, _logger(api, log), log)
    if name == "tensorrt":
        raise MissingExtraError("tensorrt", "tensorrt-gpu", "building engines for the GPU of this machine")
    raise MissingExtraError("tensorrt-rtx", "tensorrt", "building engines")


def _require_features(name: str, api: Any) -> None:
    needed = ("IKVCacheUpdateLayer", "IRotaryEmbeddingLayer", "IAttention")
    missing = [feature for feature in needed if not hasattr(api, feature)]
    if not missing and not hasattr(api.IAttention, "key_value_lengths"):
        missing = ["IAttention.key_value_lengths"]
    if missing:
        raise InputError(
            f"{name} {api.__version__} has no {', '.join(missing)}, which a cache of valid length needs:"
            f" pip install --upgrade {name}"
        )


def _logger(api: Any, log: list[tuple[str, str]]) -> Any:
    class Collect(api.ILogger):
        def __init__(self) -> None:
            api.ILogger.__init__(self)

        def log(self, severity: Any, text: str) -> None:
            log.append((severity.name, text))

    return Collect()
