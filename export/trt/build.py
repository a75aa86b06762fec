"""An ONNX bundle to an engine bundle: one engine per graph and architecture."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import Bundle
from cfpp_rt.export.contract import PASSES, network_graphs
from cfpp_rt.export.trt.build_worker import Job
from cfpp_rt.export.trt.builder_process import DEFAULT_TIME_LIMIT_S, Built, build_engine
from cfpp_rt.export.trt.bundle import write_card
from cfpp_rt.export.trt.cuda import Device
from cfpp_rt.export.trt.library import CURRENT, Library, load_library
from cfpp_rt.export.trt.parser import weight_bytes
from cfpp_rt.io.atomic import new_folder

EMBEDDINGS = ("embed_time", "embed_text")
_WITHOUT_FLOAT8 = ("sm75", "sm80", "sm86")
DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")


def make_bundle(
    source: Bundle,
    folder: str | Path,
    parity: Mapping[str, Any],
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    graphs: Sequence[str] | None = None,
    library: str = "auto",
    weights: str = "embedded",
    timing_cache: str | None = None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Build the network's graphs of an opened ONNX bundle for every target into a new folder.

    parity: what the card is to say of the comparison with PyTorch. targets: "sm89" etc., or "current". graphs: names,
    None = all of the network; a codec's graphs stay with ONNX Runtime. say: is told of every engine.

    Nothing is left behind unless every engine is built. Raises InputError as `build_engine` does, and for a target that
    cannot be built here, a folder that exists or a disk too small.
    """
    loaded = require_buildable(library, targets, graphs, timing_cache, linear_dtype=source.card.linear_dtype)
    known = network_graphs(source.card.sizes)
    names = [name for name in known if graphs is None or name in graphs]
    architectures = [Device().architecture if target == CURRENT else target for target in targets]
    if not names or len(set(architectures)) != len(architectures):
        raise InputError(
            f"graphs and targets must be some of {', '.join(known)} for different architectures,"
            f" got {', '.join(names) or 'no graph'} for {', '.join(architectures)}"
        )
    sizes = {name: 0 if weights == "stripped" else weight_bytes(source.path(name)) for name in names}
    builds: dict[str, dict[str, Any]] = {}
    with new_folder(folder, len(targets) * sum(sizes.values())) as made:
        for target, architecture in zip(targets, architectures, strict=True):
            (made / architecture).mkdir()
            builds[architecture] = {}
            for name in sorted(names, key=lambda name: sizes[name]):  # what is quickly refused comes first
                engine = str(made / architecture / f"{name}.engine")
                job = Job(str(source.path(name)), engine, loaded.name, target, known[name], weights, timing_cache)
                built = build_engine(job, time_limit_s=time_limit_s)
                builds[architecture][name] = _facts(built)
                say(
                    f"{architecture} {name}: {built.bytes / 2**20:.1f} MiB in {built.parse_s + built.build_s:.1f} s,"
                    f" {built.peak_mib:.0f} MiB at most"
                )
        values = {
            "cfpp_rt": version("cfpp-rt"),
            "library": loaded.name,
            "library_version": loaded.version,
            "weights": weights,
            "parity": dict(parity),
            "student": source.card.to_dict(),
            "contract": {name: dataclasses.asdict(known[name]) for name in names},
        }
        write_card(made, values, builds)


def require_buildable(
    library: str,
    targets: Sequence[str],
    graphs: Sequence[str] | None,
    timing_cache: str | None,
    *,
    linear_dtype: str | None = None,
) -> Library:
    """Load the library; raise InputError for what it cannot build whatever the graphs are."""
    loaded = load_library(library)
    if not targets or len(set(targets)) != len(targets):
        raise InputError(f"targets must be different architectures, got {', '.join(targets) or 'none'}")
    for target in targets:
        loaded.require_target(target)
    wide = [target for target in targets if target in _WITHOUT_FLOAT8]
    if linear_dtype is not None and wide:
        raise InputError(f"targets must be sm89 or newer for linears in {linear_dtype}, got {', '.join(wide)}")
    if CURRENT in targets:
        Device().close()  # raises without a GPU and its driver
    unknown = [name for name in graphs or () if name not in (*EMBEDDINGS, *PASSES)]
    if unknown or graphs == []:
        raise InputError(
            f"graphs must be some of {', '.join((*EMBEDDINGS, *PASSES))}, got {', '.join(unknown) or 'none'}"
        )
    if timing_cache is not None and loaded.name == "tensorrt-rtx":
        raise InputError("timing_cache must be None with tensorrt-rtx: it measures nothing while it builds")
    return loaded


def _facts(built: Built) -> dict[str, Any]:
    return {
        "build_s": round(built.parse_s + built.build_s, 2),
        "peak_mib": round(built.peak_mib),
        "activation_mib": None if built.activation_mib is None else round(built.activation_mib, 1),
        "float8_linears": built.network["float8_linears"],
        "self_attentions": len(built.network["sites"]),
        "cross_attentions": built.network["cross_attentions"],
        "notes": list(built.network["notes"]),
        "warnings": built.warnings,
    }
