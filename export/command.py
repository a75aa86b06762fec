"""`cfpp export`: dispatches to its sub-commands, as `cfpp` does to its commands."""

import argparse
import importlib

ACTIONS = {
    "onnx": ("cfpp_rt.export.onnx_command", "a student to a bundle of ONNX graphs"),
    "tensorrt": ("cfpp_rt.export.tensorrt_command", "a student to a bundle of TensorRT engines, for several GPUs"),
    "verify": (
        "cfpp_rt.export.verify_command",
        "a bundle of ONNX graphs against PyTorch: exit code 2 where they differ",
    ),
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    actions = parser.add_subparsers(dest="action", metavar="ACTION", parser_class=type(parser), required=True)
    for name, (module, summary) in ACTIONS.items():
        description = f"{summary[0].upper()}{summary[1:]}."
        sub = actions.add_parser(name, help=summary, description=description, allow_abbrev=False)
        importlib.import_module(module).add_arguments(sub)


def run(arguments: argparse.Namespace) -> None:
    importlib.import_module(ACTIONS[arguments.action][0]).run(arguments)
