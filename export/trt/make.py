"""A folder of proven ONNX graphs to an engine bundle: one engine per graph and architecture."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import GraphSpec
from cfpp_rt.export.trt.build import DEFAULT_TIME_LIMIT_S, build_engine
from cfpp_rt.export.trt.bundle import new_folder, require_space, write_card
from cfpp_rt.export.trt.compile import Job
from cfpp_rt.export.trt.library import CURRENT, load_library
from cfpp_rt.export.trt.memory import Device
from cfpp_rt.export.trt.network import weight_bytes

DEFAULT_TARGETS = ("sm80", "sm86", "sm89", "sm120")


def make_bundle(
    graphs: str | Path,
    folder: str | Path,
    specs: Mapping[str, GraphSpec],
    card: Mapping[str, Any],
    *,
    targets: Sequence[str] = DEFAULT_TARGETS,
    library: str = "auto",
    weights: str = "embedded",
    timing_cache: str | None = None,
    time_limit_s: float = DEFAULT_TIME_LIMIT_S,
    say: Callable[[str], None] = lambda line: None,
) -> dict[str, Any]:
    """Build `<graphs>/<name>.onnx` of every spec for every target into a new folder; returns its card.

    card: what the bundle is to say of the graphs (sizes, steps, parity). targets: "sm89" etc., or "current". say: is
    told of every engine. Nothing is left behind unless every engine is built. Raises InputError as `build_engine` does,
    and for a target that cannot be built here, a folder that exists or a disk too small.
    """
    loaded = load_library(library)
    if not targets or len(set(targets)) != len(targets):
        raise InputError(f"targets must be different architectures, got {', '.join(targets) or 'none'}")
    for target in targets:
        loaded.require_target(target)
    sources = {name: Path(graphs, f"{name}.onnx") for name in specs}
    for path in sources.values():
        if not path.is_file():
            raise InputError(f"{path}: no such file")
    sizes = {name: 0 if weights == "stripped" else weight_bytes(path) for name, path in sources.items()}
    architectures: dict[str, dict[str, Any]] = {}
    with new_folder(folder) as made:
        require_space(made, len(targets) * sum(sizes.values()))
        for target in targets:
            architecture = Device().architecture if target == CURRENT else target
            (made / architecture).mkdir()
            architectures[architecture] = {}
            for name in sorted(specs, key=lambda name: sizes[name]):  # what is quickly refused comes first
                engine = str(made / architecture / f"{name}.engine")
                job = Job(str(sources[name]), engine, "", loaded.name, target, specs[name], weights, timing_cache)
                built = build_engine(job, time_limit_s=time_limit_s)
                architectures[architecture][name] = {
                    "build_s": round(built.parse_s + built.build_s, 2),
                    "peak_mib": round(built.peak_mib),
                    "self_attentions": len(built.network["sites"]),
                    "cross_attentions": built.network["cross_attentions"],
                    "notes": list(built.network["notes"]),
                    "warnings": built.warnings,
                }
                say(
                    f"{architecture} {name}: {built.bytes / 2**20:.1f} MiB in {built.parse_s + built.build_s:.1f} s,"
                    f" {built.peak_mib:.0f} MiB at most"
                )
        whole = {
            "cfpp_rt": version("cfpp-rt"),
            "library": loaded.name,
            "library_version": loaded.version,
            "weights": weights,
            **card,
            "contract": {name: dataclasses.asdict(spec) for name, spec in specs.items()},
        }
        write_card(made, whole, architectures)
    return whole
