"""A codec's streaming decoder as two ONNX graphs: the first latent frame of a clip, and every next one.

    decode_first   latents -> pixels, state
    decode_next    latents, state -> pixels, state

These networks are others' (diffusers' VAE) or plain convolutions, so they are traced by torch's exporter. Their weights
go to one file of their own, shared by both graphs.
"""

import contextlib
import hashlib
import io
import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cfpp_rt.codec.base import Codec
from cfpp_rt.codec.taehv import TAEHV, TAEHVDecoder
from cfpp_rt.codec.wan import WanDecoder, WanVAE
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.export.contract import DECODERS, GraphSpec, Sizes, TensorSpec, updated
from cfpp_rt.export.onnx_graph import OPSET, WeightFile, require_onnx

CODEC_WEIGHTS = "codec.bin"
_HELD = 2  # frames that a causal convolution of the Wan VAE looks back
_SMALL = 1024  # bytes of a constant that stays in the graph


class _Decode(nn.Module):
    """One latent frame through the decoder. shapes: of the state; before the clip it is zero."""

    def __init__(self, codec: Codec, first: bool, shapes: Sequence[Sequence[int]]):
        super().__init__()
        self.codec, self.first, self.shapes = codec, first, shapes
        self.weights = codec.vae if isinstance(codec, WanVAE) else codec if isinstance(codec, TAEHV) else None

    def forward(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        decoder = self.codec.decoder()
        if not self.first:
            resume(decoder, state)
        pixels = decoder.decode(latents)
        return (pixels, *held(decoder, self.shapes, pixels))


def resume(decoder: Any, state: Sequence[Tensor]) -> None:
    """Put a decoder where the state was taken."""
    decoder.first = False
    if isinstance(decoder, WanDecoder):
        decoder.state = [*state, *[None] * (len(decoder.state) - len(state))]  # unused slots come last
    elif isinstance(decoder, TAEHVDecoder):
        decoder.state.update(zip(decoder.stateful_layers, state, strict=True))


def held(decoder: Any, shapes: Sequence[Sequence[int]], like: Tensor) -> list[Tensor]:
    """The state of a decoder as tensors of these shapes, what is not there yet as zeros."""
    if isinstance(decoder, TAEHVDecoder):
        return list(decoder.state.values())
    if not isinstance(decoder, WanDecoder):
        return []
    made = []
    for entry, shape in zip(decoder.state, shapes, strict=False):
        if not torch.is_tensor(entry):  # an upsampler over time that has seen the first latent only
            made.append(torch.zeros(tuple(shape), dtype=decoder.state[0].dtype, device=like.device))
        else:
            made.append(F.pad(entry, (0, 0, 0, 0, shape[2] - entry.shape[2], 0)))
    return made


def export_decoder(codec: Codec, sizes: Sizes, folder: Path) -> dict[str, GraphSpec]:
    """Write decode_first.onnx, decode_next.onnx and their weights; returns their declarations, in the card's form.

    Raises InputError for a codec of other latents, MissingExtraError without onnxscript.
    """
    if codec.latent_channels != sizes.model.out_dim:
        raise InputError(f"codec must have {sizes.model.out_dim} latent channels, got {codec.latent_channels}")
    latents = torch.zeros(sizes.frame_shape(1))
    shapes, dtype = _state_shapes(codec, latents)
    state = [torch.zeros(shape, dtype=getattr(torch, dtype)) for shape in shapes]
    specs = {}
    with WeightFile(folder / CODEC_WEIGHTS, dtype) as weights:
        for name in DECODERS:
            first = name == DECODERS[0]
            module = _Decode(codec, first, shapes).eval()
            inputs = [TensorSpec("latents", tuple(latents.shape), "float32")]
            inputs += [] if first else [TensorSpec(f"state.{i}", tuple(s), dtype) for i, s in enumerate(shapes)]
            with torch.no_grad():
                pixels = module(latents, *([] if first else state))[0]
            outputs = [TensorSpec("pixels", tuple(pixels.shape), "float32")]
            outputs += [TensorSpec(updated(f"state.{i}"), tuple(shape), dtype) for i, shape in enumerate(shapes)]
            specs[name] = GraphSpec(name, tuple(inputs), tuple(outputs))
            model = _trace(module, (latents, *([] if first else state)), specs[name])
            _move_weights(model, weights)
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return specs


def _state_shapes(codec: Codec, latents: Tensor) -> tuple[list[list[int]], str]:
    """Of a decoder that is under way: by the second latent everything is in place."""
    decoder = codec.decoder()
    for _ in range(2):
        decoder.decode(latents)
    entries = getattr(decoder, "state", [])
    tensors = [t for t in (entries.values() if isinstance(entries, dict) else entries) if torch.is_tensor(t)]
    if isinstance(decoder, WanDecoder):
        shapes = [[*t.shape[:2], _HELD, *t.shape[3:]] for t in tensors]
    else:
        shapes = [list(t.shape) for t in tensors]
    return shapes, str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"


def _trace(module: nn.Module, inputs: tuple[Tensor, ...], spec: GraphSpec) -> Any:
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnxscript", "onnx", "exporting a codec") from error
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # of absent packages that have nothing to do with it
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # the exporter tells of its progress
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            inputs,
            dynamo=True,
            opset_version=OPSET,
            input_names=[tensor.name for tensor in spec.inputs],
            output_names=[tensor.name for tensor in spec.outputs],
            verbose=False,
        )
    log.setLevel(level)
    assert program is not None
    model = program.model_proto
    model.ClearField("metadata_props")
    model.producer_name, model.producer_version = "cfpp-rt", ""
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        part.ClearField("metadata_props")  # stack traces, with the paths of this machine
        part.ClearField("doc_string")
    return model


def _move_weights(model: Any, weights: WeightFile) -> None:
    """Take the large constants out of a graph into the weight file, equal ones once."""
    onnx = require_onnx()
    for tensor in model.graph.initializer:
        tensor.ClearField("metadata_props")
        data = tensor.raw_data
        if len(data) < _SMALL:
            continue
        offset = weights.add_bytes(hashlib.sha256(data).hexdigest(), data)
        tensor.ClearField("raw_data")
        tensor.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", weights.path.name), ("offset", offset), ("length", len(data))):
            tensor.external_data.add(key=key, value=str(value))
