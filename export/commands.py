"""`cfpp export`: its sub-commands onnx, tensorrt and verify."""

import argparse
import json
import math
import tempfile
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import open_bundle
from cfpp_rt.export.export_bundle import export_onnx
from cfpp_rt.export.parity import TOLERANCE, require_parity, require_passed, verify
from cfpp_rt.export.source import add_output, add_source, latent_size, load_source
from cfpp_rt.export.trt.build import DEFAULT_TARGETS, DEFAULT_TIME_LIMIT_S, build_engine_bundle, require_buildable
from cfpp_rt.export.trt.build_worker import WEIGHT_MODES
from cfpp_rt.export.trt.library import LIBRARIES
from cfpp_rt.io.atomic import require_new_folder, require_writable, write_atomically

PARITY_SIZE = (8, 12)  # latents of 64x96 frames


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=type(parser), required=True)
    for name, summary, add, run_action in (
        ("onnx", "a student to a bundle of ONNX graphs", _add_onnx, _run_onnx),
        ("tensorrt", "a student to a bundle of TensorRT engines, for several GPUs", _add_tensorrt, _run_tensorrt),
        ("verify", "a bundle of ONNX graphs against PyTorch: exit code 2 where they differ", _add_verify, _run_verify),
    ):
        description = f"{summary[0].upper()}{summary[1:]}."
        action = actions.add_parser(name, help=summary, description=description, allow_abbrev=False)
        add(action)
        action.set_defaults(run_action=run_action)


def run(arguments: argparse.Namespace) -> None:
    arguments.run_action(arguments)


def _add_onnx(parser: argparse.ArgumentParser) -> None:
    add_source(parser)
    add_output(parser)


def _run_onnx(arguments: argparse.Namespace) -> None:
    require_new_folder(arguments.output, "--output")
    source = load_source(arguments)
    card = export_onnx(
        source.model,
        source.config,
        arguments.output,
        latent_size=source.latent_size,
        latent_frames=source.latent_frames,
        batch=arguments.batch,
        linear_dtype=arguments.linear_dtype,
        codec=source.codec,
        about={"student": source.name},
    )
    size = sum(path.stat().st_size for path in Path(arguments.output).iterdir())
    dtype = card.sizes.dtype if card.linear_dtype is None else f"{card.sizes.dtype}, linears {card.linear_dtype}"
    slots = f"{card.sizes.slots} frame slots of {card.sizes.tokens_per_frame} tokens"
    print(f"{arguments.output}: {len(card.graphs)} graphs in {dtype}, {slots}, {size / 2**20:.1f} MiB")


def _add_tensorrt(parser: argparse.ArgumentParser) -> None:
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
        "--weights", choices=WEIGHT_MODES, default="embedded", help="in the engines or not (default: %(default)s)"
    )
    build.add_argument("--timing-cache", metavar="FILE", help="file of measured tactics; it is read and updated")
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
        help="frame size for the comparison with PyTorch before the build (default: --size, at most 64x96)",
    )
    build.add_argument("--keep-onnx", metavar="DIR", help="keep the ONNX bundle in this folder")


def _run_tensorrt(arguments: argparse.Namespace) -> None:
    _require_tensorrt_options(arguments)
    beside = Path(arguments.output).resolve().parent  # on the disk that the engines go to
    with tempfile.TemporaryDirectory(prefix=".cfpp-onnx-", dir=beside) as temporary:
        graphs = arguments.keep_onnx or str(Path(temporary, "graphs"))
        parity = _compare_and_export(arguments, graphs)  # frees the model on return: the builder needs its memory
        build_engine_bundle(
            open_bundle(graphs),
            arguments.output,
            parity,
            targets=arguments.targets,
            graphs=arguments.graphs,
            library=arguments.library,
            weights=arguments.weights,
            timing_cache=arguments.timing_cache,
            time_limit_s=arguments.time_limit,
            log=print,
        )
    size = sum(path.stat().st_size for path in Path(arguments.output).rglob("*.engine"))
    print(f"{arguments.output}: engines for {', '.join(arguments.targets)}, {size / 2**20:.1f} MiB")


def _require_tensorrt_options(arguments: argparse.Namespace) -> None:
    """Raise InputError, before the long work begins, for requests that can only fail."""
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


def _compare_and_export(arguments: argparse.Namespace, graphs: str) -> dict[str, Any]:
    """Compare with PyTorch, then write the ONNX bundle; return the result of the comparison."""
    small = None if arguments.parity_size is None else latent_size(arguments.parity_size, "--parity-size")
    source = load_source(arguments)
    small = small or min(source.latent_size, PARITY_SIZE, key=math.prod)
    options = {
        "latent_frames": source.latent_frames,
        "batch": arguments.batch,
        "linear_dtype": arguments.linear_dtype,
    }
    parity = require_parity(source.model, source.config, latent_size=small, log=print, **options)
    about = {"student": source.name}
    export_onnx(source.model, source.config, graphs, latent_size=source.latent_size, about=about, **options)
    return parity


def _add_verify(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("bundle", help="folder that cfpp export onnx made")
    add_source(parser)
    parser.add_argument(
        "--tolerance", type=float, default=TOLERANCE, help="largest error of a float32 bundle (default: %(default)s)"
    )
    parser.add_argument("--report", metavar="JSON", help="write every tensor's error to this file")
    parser.add_argument("--quiet", action="store_true", help="print nothing if the bundle agrees")


def _run_verify(arguments: argparse.Namespace) -> None:
    if not 0 < arguments.tolerance < 1:
        raise InputError(f"--tolerance must be in 0..1, got {arguments.tolerance}")
    if arguments.report is not None:
        require_writable(arguments.report, "--report")
    bundle = open_bundle(arguments.bundle)
    arguments.dtype = bundle.card.sizes.dtype
    source = load_source(arguments)
    log = (lambda line: None) if arguments.quiet else print
    report = verify(bundle, source.model, codec=source.codec, tolerance=arguments.tolerance, log=log)
    if arguments.report is not None:
        with write_atomically(arguments.report) as path:
            Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    require_passed(report)
    if not arguments.quiet:
        outcome = "agrees with PyTorch" if report["tensors"] else "has the structure that was meant"
        print(f"{arguments.bundle}: {outcome}")
