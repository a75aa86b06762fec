"""`cfpp export tensorrt`: a student to a bundle of TensorRT engines, past the parity gate."""

import argparse
import math
from pathlib import Path
from typing import Any

PARITY_SIZE = (8, 12)  # latents of 64x96 pictures


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cfpp_rt.export.source import add_output, add_source
    from cfpp_rt.export.trt.build import DEFAULT_TARGETS
    from cfpp_rt.export.trt.build_worker import WEIGHTS
    from cfpp_rt.export.trt.builder_process import DEFAULT_TIME_LIMIT_S
    from cfpp_rt.export.trt.library import LIBRARIES

    add_source(parser)
    parser.set_defaults(dtype="bfloat16")
    add_output(parser)
    build = parser.add_argument_group("the engines")
    build.add_argument(
        "--targets",
        nargs="+",
        default=list(DEFAULT_TARGETS),
        metavar="SM",
        help=f"architectures, or 'current' for the GPU of this machine (default: {' '.join(DEFAULT_TARGETS)})",
    )
    build.add_argument("--graphs", nargs="+", metavar="NAME", help="build only these graphs (default: all)")
    build.add_argument(
        "--library", choices=["auto", *LIBRARIES], default="auto", help="default: the first that is installed"
    )
    build.add_argument(
        "--weights", choices=WEIGHTS, default="embedded", help="in the engines or not (default: %(default)s)"
    )
    build.add_argument("--timing-cache", metavar="FILE", help="tactics measured before; read and written back")
    build.add_argument(
        "--time-limit",
        type=float,
        default=DEFAULT_TIME_LIMIT_S,
        metavar="SECONDS",
        help="for one engine (default: %(default)g)",
    )
    build.add_argument(
        "--parity-size",
        metavar="HxW",
        help="pictures of the comparison with PyTorch before the build (default: --size, at most 64x96)",
    )
    build.add_argument("--keep-onnx", metavar="DIR", help="keep the ONNX bundle in this folder")


def run(arguments: argparse.Namespace) -> None:
    import tempfile

    from cfpp_rt.errors import InputError
    from cfpp_rt.export.bundle import open_bundle
    from cfpp_rt.export.trt.build import make_bundle, require_buildable

    # What can be refused at once is refused before the long work.
    if not 0 < arguments.time_limit < math.inf:
        raise InputError(f"--time-limit must be a number > 0, got {arguments.time_limit:g}")
    for option in ("base", "tiny_vae"):
        if getattr(arguments, option) is not None:
            raise InputError(f"--{option.replace('_', '-')} is of no use here: engines are of the network alone")
    for option in ("output", "keep_onnx"):
        folder = getattr(arguments, option)
        if folder is not None and (Path(folder).exists() or not Path(folder).absolute().parent.is_dir()):
            why = "which exists" if Path(folder).exists() else "in a folder that does not exist"
            raise InputError(f"--{option.replace('_', '-')} must be a new folder, got {folder}, {why}")
    require_buildable(
        arguments.library,
        arguments.targets,
        arguments.graphs,
        arguments.timing_cache,
        linear_dtype=arguments.linear_dtype,
    )
    beside = Path(arguments.output).resolve().parent  # on the disk that the engines go to
    with tempfile.TemporaryDirectory(prefix=".cfpp-onnx-", dir=beside) as temporary:
        graphs = arguments.keep_onnx or str(Path(temporary, "graphs"))
        parity = _export(arguments, graphs)  # the model is gone when this returns: the builder needs the memory
        make_bundle(
            open_bundle(graphs),
            arguments.output,
            parity,
            targets=arguments.targets,
            graphs=arguments.graphs,
            library=arguments.library,
            weights=arguments.weights,
            timing_cache=arguments.timing_cache,
            time_limit_s=arguments.time_limit,
            say=print,
        )
    size = sum(path.stat().st_size for path in Path(arguments.output).rglob("*.engine"))
    print(f"{arguments.output}: engines for {', '.join(arguments.targets)}, {size / 2**20:.1f} MiB")


def _export(arguments: argparse.Namespace, graphs: str) -> dict[str, Any]:
    """Compare, then write the ONNX bundle; returns what the comparison found."""
    from cfpp_rt.export.export_bundle import export_onnx
    from cfpp_rt.export.source import latent_size, load_source
    from cfpp_rt.export.trt.gate import require_parity

    small = None if arguments.parity_size is None else latent_size(arguments.parity_size, "--parity-size")
    source = load_source(arguments)
    small = small or min(source.latent_size, PARITY_SIZE, key=math.prod)
    student = source.model, source.rollout
    options = {"frames": source.frames, "batch": arguments.batch, "linear_dtype": arguments.linear_dtype}
    parity = require_parity(*student, latent_size=small, say=print, **options)
    export_onnx(*student, graphs, latent_size=source.latent_size, about={"student": source.name}, **options)
    return parity
