"""`cfpp export onnx`: a student to a bundle of ONNX graphs."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cfpp_rt.export.source import add_source

    add_source(parser)
    parser.add_argument("--batch", type=int, default=1, help="rows made together (default: %(default)s)")
    parser.add_argument("-o", "--output", required=True, metavar="DIR", help="folder to be made")


def run(arguments: argparse.Namespace) -> None:
    from cfpp_rt.export.source import load_source
    from cfpp_rt.export.to_onnx import export_onnx

    source = load_source(arguments)
    card = export_onnx(
        source.model,
        source.rollout,
        arguments.output,
        latent_size=source.latent_size,
        frames=source.frames,
        batch=arguments.batch,
        codec=source.codec,
        about={"student": source.name},
    )
    size = sum(path.stat().st_size for path in Path(arguments.output).iterdir())
    slots = f"{card.sizes.slots} frame slots of {card.sizes.tokens} tokens"
    print(f"{arguments.output}: {len(card.graphs)} graphs in {card.sizes.dtype}, {slots}, {size / 2**20:.1f} MiB")
