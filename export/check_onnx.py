"""Checks of an ONNX graph that need no run: every input matters, every cache is updated in place."""

from pathlib import Path
from typing import Any

from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import GraphSpec
from cfpp_rt.export.float8 import FLOAT8, is_float8
from cfpp_rt.export.graph_builder import OPSET, require_onnx


def check_graph(path: Path, spec: GraphSpec, linear_dtype: str | None = None) -> None:
    """Check a graph's file against its contract.

    The graph must pass the onnx checker with shape inference and use standard operators of `OPSET` only. Some output
    must depend on every input. A cache must be read by one node alone, the TensorScatter that writes the output which
    updates it. Exactly the linears of `cfpp_rt.export.float8` have both operands in 8 bits, if linear_dtype says so.

    Raises InputError naming the file and the fault.
    """
    onnx = require_onnx()
    try:
        onnx.checker.check_model(str(path), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise InputError(f"{path.name}: not a valid ONNX graph: {' '.join(str(error).split())[:300]}") from error
    model = onnx.load(str(path), load_external_data=False)
    opsets = {entry.domain: entry.version for entry in model.opset_import}
    foreign = sorted({node.op_type for node in model.graph.node if node.domain not in ("", "ai.onnx")})
    if opsets.get("") != OPSET or foreign:
        raise InputError(f"{path.name}: must be standard operators of opset {OPSET}, got {opsets} and {foreign}")
    _require_used(path, model, spec)
    _require_updates(path, model, spec)
    _require_float8(path, model, linear_dtype)


def _require_used(path: Path, model: Any, spec: GraphSpec) -> None:
    """Walk back from the outputs; raise InputError for an input that the walk does not reach."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    reached: set[str] = set()
    waiting = [tensor.name for tensor in spec.outputs]
    while waiting:
        name = waiting.pop()
        if name and name not in reached:
            reached.add(name)
            waiting.extend(made_by[name].input if name in made_by else ())
    dropped = [tensor.name for tensor in spec.inputs if tensor.name not in reached]
    if dropped:
        raise InputError(f"{path.name}: input {dropped[0]} is dropped: no output depends on it")


def _require_updates(path: Path, model: Any, spec: GraphSpec) -> None:
    """Raise InputError unless each cache is read by the TensorScatter that updates it, and by nothing else."""
    readers: dict[str, list[Any]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    for output, source in spec.aliases.items():
        found = [(node.op_type, node.input[0], node.output[0]) for node in readers.get(source, [])]
        if found != [("TensorScatter", source, output)]:
            raise InputError(f"{path.name}: {source} must be read by the TensorScatter that writes {output} alone")


def _require_float8(path: Path, model: Any, linear_dtype: str | None) -> None:
    """Raise InputError unless exactly the wanted linears multiply two operands in 8 bits."""
    weights = [tensor.name for tensor in model.graph.initializer if tensor.name.endswith(".weight")]
    wanted = {name for name in weights if linear_dtype == FLOAT8 and is_float8(name.removesuffix(".weight"))}
    source = {node.output[0]: node.input[0] for node in model.graph.node if node.op_type == "DequantizeLinear"}
    products = [node.input for node in model.graph.node if node.op_type == "MatMul"]
    found = {source[weight] for x, weight in products if x in source and weight in source}
    if wanted != found:
        name = min(wanted ^ found)
        dtype = FLOAT8 if name in wanted else "the dtype of the bundle"
        raise InputError(f"{path.name}: both operands of the product with {name} must be in {dtype}")
