"""`cfpp export verify`: a bundle against the student that it was exported from; exit code 2 where they differ."""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cfpp_rt.export.source import add_source

    parser.add_argument("bundle", help="folder that cfpp export onnx made")
    add_source(parser)
    parser.add_argument("--tolerance", type=float, default=1e-4, help="of float32 (default: %(default)s)")
    parser.add_argument("--report", metavar="JSON", help="write every tensor's error to this file")
    parser.add_argument("--quiet", action="store_true", help="print nothing where all is well")


def run(arguments: argparse.Namespace) -> None:
    from cfpp_rt.errors import InputError
    from cfpp_rt.export.bundle import open_bundle
    from cfpp_rt.export.parity import require_passed, verify
    from cfpp_rt.export.source import load_source
    from cfpp_rt.io.atomic import write_atomically

    if not 0 < arguments.tolerance < 1:
        raise InputError(f"--tolerance must be in 0..1, got {arguments.tolerance}")
    bundle = open_bundle(arguments.bundle)
    arguments.dtype = bundle.card.sizes.dtype
    source = load_source(arguments)
    say = (lambda line: None) if arguments.quiet else print
    report = verify(bundle, source.model, codec=source.codec, tolerance=arguments.tolerance, say=say)
    if arguments.report is not None:
        with write_atomically(arguments.report) as path:
            Path(path).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    require_passed(report)
    if not arguments.quiet:
        done = "agrees with PyTorch" if report["tensors"] else "has the structure that was meant"
        print(f"{arguments.bundle}: {done}")
