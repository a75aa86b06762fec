"""Conversion of the tensor names of `Wan2.1_VAE.pth` to those of diffusers, and the config inferred from the shapes."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from cfpp_rt.errors import CheckpointError

# Applied to every name, in order. `decoder.upsamples` is handled by `_decoder_positions`: there the position matters.
_RENAMES = (
    (r"^conv1\.", "quant_conv."),
    (r"^conv2\.", "post_quant_conv."),
    (r"^(encoder|decoder)\.conv1\.", r"\1.conv_in."),
    (r"^(encoder|decoder)\.head\.0\.", r"\1.norm_out."),
    (r"^(encoder|decoder)\.head\.2\.", r"\1.conv_out."),
    (r"\.middle\.0\.", ".mid_block.resnets.0."),
    (r"\.middle\.1\.", ".mid_block.attentions.0."),
    (r"\.middle\.2\.", ".mid_block.resnets.1."),
    (r"^encoder\.downsamples\.", "encoder.down_blocks."),
    (r"\.residual\.0\.", ".norm1."),
    (r"\.residual\.2\.", ".conv1."),
    (r"\.residual\.3\.", ".norm2."),
    (r"\.residual\.6\.", ".conv2."),
    (r"\.shortcut\.", ".conv_shortcut."),
)


def to_diffusers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename a state dict from original names to those of `AutoencoderKLWan`; unknown names stay as they are."""
    positions = _decoder_positions(state)
    renamed = {}
    for name, tensor in state.items():
        upsample = re.match(r"decoder\.upsamples\.(\d+)\.", name)
        if upsample:
            name = f"decoder.up_blocks.{positions[int(upsample[1])]}.{name[upsample.end() :]}"
        for pattern, replacement in _RENAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    return renamed


def infer_config(state: Mapping[str, Tensor], source: Path) -> dict[str, Any]:
    """Return the config of `AutoencoderKLWan` that fits a state dict in original names.

    source: the file that an error names. Raises CheckpointError if the names are not those of a Wan2.1 VAE.
    """
    try:
        base = state["encoder.conv1.weight"].shape[0]
        widths: list[int] = []  # channels of each level of the encoder, finest first
        blocks: list[int] = []  # number of residual blocks of each level
        temporal: list[bool] = []
        at_level_start = True
        for index in _indices(state, "encoder.downsamples."):
            if f"encoder.downsamples.{index}.resample.1.weight" in state:
                temporal.append(f"encoder.downsamples.{index}.time_conv.weight" in state)
                at_level_start = True
                continue
            width = state[f"encoder.downsamples.{index}.residual.6.weight"].shape[0]
            if at_level_start:
                widths.append(width)
                blocks.append(0)
                at_level_start = False
            blocks[-1] += 1
        config = {
            "base_dim": base,
            "z_dim": state["conv2.weight"].shape[0],
            "dim_mult": [width // base for width in widths],
            "num_res_blocks": blocks[0],
            "temperal_downsample": temporal,
        }
        decoder_base = state["decoder.head.2.weight"].shape[1]
    except KeyError as error:
        raise CheckpointError(f"{source}: not a Wan2.1 VAE: it has no {error.args[0]}") from error
    except (IndexError, AttributeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source}: not a Wan2.1 VAE") from error
    if decoder_base != base:
        config["decoder_base_dim"] = decoder_base
    return config


def _indices(state: Mapping[str, Tensor], prefix: str) -> list[int]:
    matches = {re.match(rf"{re.escape(prefix)}(\d+)\.", name) for name in state}
    return sorted({int(match[1]) for match in matches if match})


def _decoder_positions(state: Mapping[str, Tensor]) -> dict[int, str]:
    """Map the index in `decoder.upsamples` to the position in the blocks of diffusers, which end at each upsampler."""
    positions, level, resnet = {}, 0, 0
    for index in _indices(state, "decoder.upsamples."):
        if f"decoder.upsamples.{index}.resample.1.weight" in state:
            positions[index] = f"{level}.upsamplers.0"
            level, resnet = level + 1, 0
        else:
            positions[index] = f"{level}.resnets.{resnet}"
            resnet += 1
    return positions
