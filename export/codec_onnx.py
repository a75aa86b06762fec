"""A codec's streaming decoder as ONNX graphs: one for the first latent frame of a video, one for each later one.

    decode_first   latents -> pixels, state
    decode_next    latents, state -> pixels, state
    encode         pixels of the first frame -> latents; for the world's codec only

torch's exporter traces the Wan VAE and the tiny autoencoder. The world's codec is a matrix product, which is written
node by node. The graphs share one weight file.
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
from cfpp_rt.codec.wan import LibraryDecoder, WanVAE
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.export.contract import DECODERS, ENCODER, GraphSpec, Sizes, TensorSpec, updated
from cfpp_rt.export.graph_builder import OPSET, GraphBuilder, WeightFile, require_onnx
from cfpp_rt.world.codec import PatchCodec

CODEC_WEIGHTS = "codec.bin"
_PAST_FRAMES = 2  # past frames that a causal convolution of the Wan VAE reads
_SMALL = 1024  # bytes; smaller constants stay in the graph


class _Decode(nn.Module):
    """Decodes one latent frame, with the decoder's state as inputs and outputs.

    first: whether it is the first of the video, which has no state before it.
    shapes: shapes of the state's tensors.
    """

    def __init__(self, codec: Codec, first: bool, shapes: Sequence[Sequence[int]]):
        super().__init__()
        self.codec, self.first, self.shapes = codec, first, shapes
        self.weights = codec.vae if isinstance(codec, WanVAE) else codec if isinstance(codec, TAEHV) else None

    def forward(self, latents: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        decoder = _decoder(self.codec)
        if not self.first:
            restore(decoder, state)
        pixels = decoder.decode(latents)
        return (pixels, *state_of(decoder, self.shapes, pixels))


def _decoder(codec: Codec) -> Any:
    """Return the decoder to trace: for the Wan VAE the one of diffusers, whose state is a list of tensors."""
    return codec.library_decoder() if isinstance(codec, WanVAE) else codec.decoder()


def restore(decoder: Any, state: Sequence[Tensor]) -> None:
    """Restore the state of a decoder that `state_of` returned."""
    decoder.first = False
    if isinstance(decoder, LibraryDecoder):
        decoder.state = [*state, *[None] * (len(decoder.state) - len(state))]  # unused slots come last
    elif isinstance(decoder, TAEHVDecoder):
        decoder.state.update(zip(decoder.stateful_layers, state, strict=True))


def state_of(decoder: Any, shapes: Sequence[Sequence[int]], like: Tensor) -> list[Tensor]:
    """Return a decoder's state as tensors of these shapes on the device of `like`; a missing part is zeros."""
    if isinstance(decoder, TAEHVDecoder):
        return list(decoder.state.values())
    if not isinstance(decoder, LibraryDecoder):
        return []
    made = []
    for entry, shape in zip(decoder.state, shapes, strict=False):
        if not torch.is_tensor(entry):  # a temporal upsampler has no state after the first latent frame
            made.append(torch.zeros(tuple(shape), dtype=decoder.state[0].dtype, device=like.device))
        else:
            made.append(F.pad(entry, (0, 0, 0, 0, shape[2] - entry.shape[2], 0)))
    return made


def export_decoder(codec: Codec, sizes: Sizes, folder: Path) -> dict[str, GraphSpec]:
    """Write the codec's graphs and their weights to `folder`; return their specs by name.

    Raises InputError for a codec with another number of latent channels, MissingExtraError without onnxscript.
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
            inputs = [TensorSpec("latents", tuple(latents.shape), "float32")]
            inputs += [] if first else [TensorSpec(f"state.{i}", tuple(s), dtype) for i, s in enumerate(shapes)]
            frames = 1 if first else codec.temporal_factor
            size = (codec.spatial_factor * side for side in sizes.latent_size)
            outputs = [TensorSpec("pixels", (sizes.batch, frames, 3, *size), "float32")]
            outputs += [TensorSpec(updated(f"state.{i}"), tuple(shape), dtype) for i, shape in enumerate(shapes)]
            specs[name] = GraphSpec(name, tuple(inputs), tuple(outputs))
            if isinstance(codec, PatchCodec):
                model = _patch_graph(codec, specs[name], weights)
            else:
                model = _trace(_Decode(codec, first, shapes).eval(), (latents, *([] if first else state)), specs[name])
                _move_weights(model, weights)
            (folder / f"{name}.onnx").write_bytes(model.SerializeToString(deterministic=True))
        if isinstance(codec, PatchCodec):  # so that a bundle of the world can begin with a given frame
            decoder = specs[DECODERS[0]]
            specs[ENCODER] = GraphSpec(ENCODER, decoder.outputs, decoder.inputs)
            model = _patch_graph(codec, specs[ENCODER], weights)
            (folder / f"{ENCODER}.onnx").write_bytes(model.SerializeToString(deterministic=True))
    return specs


def _patch_graph(codec: PatchCodec, spec: GraphSpec, weights: WeightFile) -> Any:
    """Return the world's codec, node by node: one matrix product maps a patch of 8 x 8 RGB pixels to a latent."""
    graph, tile = GraphBuilder(spec, weights), codec.spatial_factor
    latents = spec.outputs[0] if spec.name == ENCODER else spec.inputs[0]
    batch, frames, _, height, width = latents.shape
    mean = graph.weight("mean", codec.mean)
    if spec.name == ENCODER:
        x = graph.reshape("pixels", batch * frames, 3, height, tile, width, tile)
        x = graph.op("Transpose", x, perm=[0, 2, 4, 3, 5, 1])
        x = graph.op("Sub", graph.reshape(x, batch, frames, height, width, 3 * tile * tile), mean)
        x = graph.op("MatMul", x, graph.weight("basis.inverse", codec.basis / codec.scale))
        graph.op("Transpose", x, perm=[0, 1, 4, 2, 3], name="latents")
        return graph.model()
    x = graph.op("Transpose", "latents", perm=[0, 1, 3, 4, 2])
    x = graph.op("MatMul", x, graph.weight("basis", codec.scale[:, None] * codec.basis.T))
    x = graph.op("Add", x, mean)
    limited = graph.op("Clip", x, *(graph.weight(f"limit.{limit}", torch.tensor(limit)) for limit in (-1.0, 1.0)))
    # As in `clamp_pixels`: infinity becomes NaN, which the runtime finds.
    x = graph.op("Add", limited, graph.op("Mul", x, graph.weight("zero", torch.tensor(0.0))))
    x = graph.reshape(x, batch * frames, height, width, tile, tile, 3)
    x = graph.op("Transpose", x, perm=[0, 5, 1, 3, 2, 4])
    graph.reshape(x, batch, frames, 3, tile * height, tile * width, name="pixels")
    return graph.model()


def _state_shapes(codec: Codec, latents: Tensor) -> tuple[list[list[int]], str]:
    """Return shapes and dtype of the decoder's state, which is complete after the second latent frame."""
    decoder = _decoder(codec)
    for _ in range(2):
        decoder.decode(latents)
    entries = getattr(decoder, "state", [])
    tensors = [t for t in (entries.values() if isinstance(entries, dict) else entries) if torch.is_tensor(t)]
    if isinstance(decoder, LibraryDecoder):
        shapes = [[*t.shape[:2], _PAST_FRAMES, *t.shape[3:]] for t in tensors]
    else:
        shapes = [list(t.shape) for t in tensors]
    return shapes, str(tensors[0].dtype).removeprefix("torch.") if tensors else "float32"


def _trace(module: nn.Module, inputs: tuple[Tensor, ...], spec: GraphSpec) -> Any:
    """Return the ModelProto that torch's exporter makes of a module, without the paths of this machine."""
    try:
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("onnxscript", "onnx", "exporting a codec") from error
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it warns of unrelated packages that are not installed
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():  # it prints its progress
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
        part.ClearField("metadata_props")  # stack traces with paths
        part.ClearField("doc_string")
    return model


def _move_weights(model: Any, weights: WeightFile) -> None:
    """Move the large constants of a graph to the weight file, equal ones once."""
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
