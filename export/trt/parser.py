"""Parses ONNX to a TensorRT network, and restores the one input that the parser drops.

The parser drops the last input of `Attention`, the number of valid keys, and reports success: such an engine would
attend to keys that were never written. This module sets the number on the layer; `check_network` checks the result.
"""

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.export.trt.library import Library
from cfpp_rt.export.trt.messages import explain

_LENGTH_INPUT = 6  # Q, K, V, attn_mask, past_key, past_value, nonpad_kv_seqlen


@dataclasses.dataclass(frozen=True)
class Network:
    """A parsed network.

    definition: TensorRT's network; valid only while builder and parser exist.
    source_attentions: number of `Attention` nodes of the ONNX graph.
    source_float8: number of its products of two operands in 8 bits.
    notes: changes made after parsing, one line each.
    """

    definition: Any
    builder: Any
    parser: Any
    source_attentions: int
    source_float8: int
    notes: tuple[str, ...]


def parse(library: Library, path: str | Path) -> Network:
    """Parse an ONNX file (weights may lie in a file beside it) as a strongly typed network and restore its lengths.

    Raises InputError with the parser's message for a graph that TensorRT does not accept.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path}: no such file")
    api = library.api
    builder = api.Builder(library.logger)
    strongly_typed = getattr(api.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    definition = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = api.OnnxParser(definition, library.logger)
    if not parser.parse_from_file(str(path)):
        errors = [parser.get_error(i) for i in range(parser.num_errors)]
        raise InputError(f"{path.name}: {explain('; '.join(_parse_error(error) for error in errors))}")
    graph = _onnx().load(path, load_external_data=False).graph
    lengths, attentions = _read_lengths(graph)
    notes = _restore_lengths(library, definition, lengths)
    notes += _decompose_float32(library, definition)
    return Network(definition, builder, parser, attentions, _float8_products(graph), tuple(notes))


def layers(library: Library, definition: Any, kind: str | None = None) -> Iterator[Any]:
    """Yield the layers of a network in order. kind: name of a LayerType, to yield only these, each in its own class."""
    classes = {
        "ATTENTION_INPUT": "IAttentionInputLayer",
        "ATTENTION_OUTPUT": "IAttentionOutputLayer",
        "KV_CACHE_UPDATE": "IKVCacheUpdateLayer",
    }
    for index in range(definition.num_layers):
        layer = definition.get_layer(index)
        if kind is None or layer.type.name == kind:
            if kind in classes:  # get_layer returns the base class, without the attributes of the layer
                layer.__class__ = getattr(library.api, classes[kind])
            yield layer


def inputs_of(layer: Any) -> list[Any]:
    """Return the tensors that a layer reads, an attention's mask and lengths included; None for an absent one."""
    return [layer.get_input(i) for i in range(layer.num_inputs)]


def weight_bytes(path: str | Path) -> int:
    """Return the bytes of all weights of an ONNX graph, about the size of its engine."""
    onnx = _onnx()
    return sum(
        math.prod(tensor.dims) * int(onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize)
        for tensor in onnx.load(path, load_external_data=False).graph.initializer
    )


def _onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise MissingExtraError("onnx", "tensorrt", "reading an ONNX graph") from error
    return onnx


def _float8_products(graph: Any) -> int:
    """Return the number of products whose operands are both dequantized from 8 bits."""
    made = {node.output[0] for node in graph.node if node.op_type == "DequantizeLinear"}
    return sum(node.op_type == "MatMul" and made.issuperset(node.input) for node in graph.node)


def _read_lengths(graph: Any) -> tuple[dict[str, str], int]:
    """Return output name -> name of the valid length for each `Attention` node that has one, and the number of all."""
    nodes = [node for node in graph.node if node.op_type == "Attention"]
    lengths = {
        node.output[0]: node.input[_LENGTH_INPUT]
        for node in nodes
        if len(node.input) > _LENGTH_INPUT and node.input[_LENGTH_INPUT]
    }
    return lengths, len(nodes)


def _restore_lengths(library: Library, definition: Any, lengths: dict[str, str]) -> list[str]:
    """Set the valid length on every attention that has one in `lengths`; return the notes."""
    if not lengths:
        return []
    tensors = {definition.get_input(i).name: definition.get_input(i) for i in range(definition.num_inputs)}
    for layer in layers(library, definition):
        tensors.update((layer.get_output(i).name, layer.get_output(i)) for i in range(layer.num_outputs))
    cast: dict[str, Any] = {}  # ONNX has int64, IAttention wants int32; layers with the same length share the cast
    restored = 0
    for layer in list(layers(library, definition, "ATTENTION_OUTPUT")):
        name = lengths.get(layer.get_output(0).name)
        if name is None:
            continue
        if name not in tensors:
            raise InputError(f"valid length {name!r} of attention {layer.name} is no tensor of the parsed network")
        if name not in cast:
            cast[name] = definition.add_cast(tensors[name], library.api.int32).get_output(0)
        layer.attention.key_value_lengths = cast[name]
        restored += 1
    if restored != len(lengths):
        raise InputError(f"{len(lengths)} attentions have a valid length, the parsed network knows {restored} of them")
    return [f"valid length set on {restored} attentions, from {', '.join(cast)}"]


def _decompose_float32(library: Library, definition: Any) -> list[str]:
    """Allow attention in float32 to decompose: it has no fused kernel, and the build would fail. Return the notes."""
    found = [
        layer.attention
        for layer in layers(library, definition, "ATTENTION_INPUT")
        if layer.get_input(0).dtype == library.api.float32
    ]
    for attention in found:
        attention.decomposable = True
    if not found:
        return []
    return [f"{len(found)} attentions in float32 run as separate kernels: there is no fused one for that dtype"]


def _parse_error(error: Any) -> str:
    return f"node {error.node()} ({error.node_name() or error.node_operator()}): {error.desc()}"
