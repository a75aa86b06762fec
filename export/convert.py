"""`cfpp convert`: any accepted checkpoint to one safetensors file, with its config in a .json file beside it."""

import argparse
import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from cfpp_rt.config import ModelConfig
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import require_writable, write_atomically
from cfpp_rt.model.weights import read_weights
from cfpp_rt.values import DTYPES


def convert(
    source: str | Path,
    target: str | Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    config: ModelConfig | None = None,
    key: str | None = None,
) -> tuple[int, ModelConfig]:
    """Write `target` (.safetensors) and its .json config; return the number of parameters and the config.

    dtype: of the written weights.
    source, config, key: see `read_weights`, also for errors. Neither file appears unless both are complete.

    Raises InputError if a finite weight would become infinity in `dtype`.
    """
    target = Path(target)
    if target.suffix != ".safetensors":
        raise InputError(f"target must end in .safetensors, got {target.name}")
    for path in (target, target.with_suffix(".json")):
        require_writable(path, "target", pipe=False)
    state, config = read_weights(source, config=config, key=key)
    with write_atomically(target) as weights_path, write_atomically(target.with_suffix(".json")) as config_path:
        save_file({name: _cast(tensor, dtype, name) for name, tensor in state.items()}, weights_path)
        Path(config_path).write_text(json.dumps(config.to_dict(), indent=2) + "\n", encoding="utf-8")
    return sum(tensor.numel() for tensor in state.values()), config


def _cast(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Convert a weight. Raises InputError if a finite value becomes infinity."""
    made = tensor.to(dtype).contiguous()
    if tensor.dtype != dtype and tensor.is_floating_point():
        overflown = made.isinf() & tensor.isfinite()
        if bool(overflown.any()):
            dtype_name, value = str(dtype).removeprefix("torch."), float(tensor[overflown].abs().max())
            raise InputError(
                f"dtype must have room for all weights, got {dtype_name}, which ends at {torch.finfo(dtype).max:g}, for"
                f" {value:g} in {name}"
            )
    return made


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", help="a .pt or .safetensors file, or a Wan2.1 or diffusers directory")
    parser.add_argument("target", help="the .safetensors file to write, with its .json config beside it")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="dtype of the written weights")
    parser.add_argument("--config", metavar="JSON", help="model sizes, if the checkpoint does not contain them")
    parser.add_argument("--key", help="entry of a .pt container (default: generator_ema, else generator)")


def run(arguments: argparse.Namespace) -> None:
    config = ModelConfig.from_json(arguments.config) if arguments.config is not None else None
    parameters, config = convert(
        arguments.checkpoint, arguments.target, dtype=DTYPES[arguments.dtype], config=config, key=arguments.key
    )
    print(f"{arguments.target}: {parameters:,} parameters, {config.num_layers} layers of width {config.dim}")
