"""`cfpp export onnx`: a student to a bundle of ONNX graphs."""

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    from cfpp_rt.export.source import add_output, add_source

    add_source(parser)
    add_output(parser)


def run(arguments: argparse.Namespace) -> None:
    from cfpp_rt.export.export_bundle import export_onnx
    from cfpp_rt.export.source import load_source

    source = load_source(arguments)
    card = export_onnx(
        source.model,
        source.rollout,
        arguments.output,
        latent_size=source.latent_size,
        latent_frames=source.frames,
        batch=arguments.batch,
        linear_dtype=arguments.linear_dtype,
        codec=source.codec,
        about={"student": source.name},
    )
    size = sum(path.stat().st_size for path in Path(arguments.output).iterdir())
    dtype = card.sizes.dtype if card.linear_dtype is None else f"{card.sizes.dtype}, linears {card.linear_dtype}"
    slots = f"{card.sizes.slots} frame slots of {card.sizes.tokens} tokens"
    print(f"{arguments.output}: {len(card.graphs)} graphs in {dtype}, {slots}, {size / 2**20:.1f} MiB")
