"""The process that builds one engine: `python -m cfpp_rt.export.trt.build_worker JOB.json`.

`build.build_engine` starts and watches it. It writes the engine and RESULT.json to the paths in the job, or one line to
stderr and ends with exit code 2.
"""

import dataclasses
import json
import re
import sys
import time
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.export.contract import GraphSpec
from cfpp_rt.export.trt.check_network import check_network
from cfpp_rt.export.trt.library import Library, load_library
from cfpp_rt.export.trt.messages import explain
from cfpp_rt.export.trt.parser import Network, parse

WEIGHT_MODES = ("embedded", "refittable", "stripped")


@dataclasses.dataclass(frozen=True)
class Job:
    """One engine to build. Every shape of a contract is static, so no optimisation profile is needed.

    onnx, engine: paths of the graph and of the engine to write.
    library: "tensorrt-rtx" or "tensorrt".
    target: "sm89" etc., or "current".
    spec: the contract of the graph.
    weights: "embedded" in the engine; "refittable", embedded but replaceable; or "stripped": left out, and taken from
        the ONNX file when the engine is loaded.
    timing_cache: file of measured tactics, read if it exists and updated. TensorRT-RTX has none.
    result: path of RESULT.json, chosen by `build_engine`.
    """

    onnx: str
    engine: str
    library: str
    target: str
    spec: GraphSpec
    weights: str = "embedded"
    timing_cache: str | None = None
    result: str = ""

    def __post_init__(self) -> None:
        if self.weights not in WEIGHT_MODES:
            raise InputError(f"weights must be {', '.join(WEIGHT_MODES)}, got {self.weights!r}")

    @classmethod
    def read(cls, path: str | Path) -> "Job":
        """Read the job that `build_engine` wrote."""
        values = json.loads(Path(path).read_text(encoding="utf-8"))
        return cls(**{**values, "spec": GraphSpec.from_dict(values["spec"])})


def compile_engine(job: Job) -> dict[str, Any]:
    """Build and write the engine; return the values of RESULT.json. Raises InputError for every refusal."""
    library = load_library(job.library)
    library.require_target(job.target)
    begin = time.perf_counter()
    network = parse(library, job.onnx)
    report = check_network(library, network, job.spec)
    parsed = time.perf_counter()
    engine = _build(library, network, job)
    _refuse_fatal(library)
    Path(job.engine).write_bytes(engine)
    return {
        "library": library.name,
        "version": library.version,
        "parse_s": parsed - begin,
        "build_s": time.perf_counter() - parsed,
        "activation_mib": _activation_mib(library),
        "network": dataclasses.asdict(report),
        "warnings": sorted(set(library.messages("WARNING"))),
    }


def _build(library: Library, network: Network, job: Job) -> memoryview:
    config = network.builder.create_builder_config()
    flags = {"embedded": (), "refittable": ("REFIT",), "stripped": ("STRIP_PLAN",)}[job.weights]
    for flag in flags:
        config.set_flag(getattr(library.api.BuilderFlag, flag))
    if library.name == "tensorrt-rtx":  # TensorRT has only one target, the GPU that it finds
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(library.api.ComputeCapability, job.target.upper()), 0)
    cache = _read_timing_cache(config, job.timing_cache) if job.timing_cache is not None else None
    engine = network.builder.build_serialized_network(network.definition, config)
    if engine is None:
        errors = library.messages("INTERNAL_ERROR", "ERROR") or ["the builder returned nothing and logged nothing"]
        raise InputError(f"not built: {explain('; '.join(dict.fromkeys(errors)))}")
    if cache is not None and job.timing_cache is not None:
        Path(job.timing_cache).write_bytes(memoryview(config.get_timing_cache().serialize()))
    return memoryview(engine)


def _read_timing_cache(config: Any, path: str) -> Any:
    known = Path(path)
    cache = config.create_timing_cache(known.read_bytes() if known.exists() else b"")
    if not config.set_timing_cache(cache, False):
        raise InputError(f"{path}: a timing cache of another TensorRT or GPU: delete it or give another --timing-cache")
    return cache


def _activation_mib(library: Library) -> float | None:
    """Return the activation memory of a pass as the builder's log reports it; None where it does not."""
    found = [re.search(r"Total Activation Memory: (\d+) bytes", text) for text in library.messages("INFO")]
    sizes = [int(match[1]) for match in found if match]
    return sizes[-1] / 2**20 if sizes else None


def _refuse_fatal(library: Library) -> None:
    fatal = library.fatal_messages()
    if fatal:
        raise InputError(f"refused: the engine would ignore a part of the graph: {fatal[0]}")


def main() -> int:
    job = Job.read(sys.argv[1])
    try:
        result = compile_engine(job)
        Path(job.result).write_text(json.dumps(result), encoding="utf-8")
    except (InputError, MissingExtraError) as error:
        message = str(error)
    except OSError as error:
        message = f"{error.filename or job.engine}: {error.strerror or error}"
    except MemoryError:
        message = "the build needs more memory than this machine has"
    else:
        return 0
    print(f"refused: {' '.join(message.split())}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main())
