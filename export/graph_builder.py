"""Builds ONNX graphs of standard operators node by node, with weights in a file that several graphs share."""

import importlib
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.errors import MissingExtraError
from cfpp_rt.export.contract import GraphSpec, TensorSpec
from cfpp_rt.values import DTYPES, KV_DTYPES

OPSET, IR_VERSION = 24, 12  # the first opset with TensorScatter
_PAGE = 4096  # weights of a page or more begin on a page boundary, so that they can be mapped instead of read


def require_onnx() -> Any:
    """Return the onnx package. Raises MissingExtraError where it is absent."""
    try:
        return importlib.import_module("onnx")
    except ImportError as error:
        raise MissingExtraError("onnx", "onnx", "ONNX export") from error


def onnx_type(dtype: str) -> int:
    """Return the ONNX element type of a contract's dtype."""
    name = {"float32": "FLOAT", "float8_e4m3": "FLOAT8E4M3FN"}.get(dtype, dtype.upper())
    return int(require_onnx().TensorProto.DataType.Value(name))


class WeightFile:
    """A file of raw little-endian tensors, one after the other. Each has a name, and a name is written once.

    dtype: that of tensors which are added without one.
    """

    def __init__(self, path: Path, dtype: str):
        self.dtype, self.path = dtype, path
        self.placed: dict[str, tuple[int, int, list[int], str]] = {}  # name -> offset, bytes, shape, dtype
        self._file = path.open("wb")

    def __enter__(self) -> "WeightFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def add(self, name: str, tensor: Tensor, dtype: str | None = None) -> None:
        """Write `tensor` in `dtype` (default: that of the file), unless the name has been written already."""
        if name in self.placed:
            return
        dtype = dtype or self.dtype
        numbers = tensor.detach().to("cpu", {**DTYPES, **KV_DTYPES}[dtype]).contiguous().reshape(-1)
        data = numbers.view(torch.uint8).numpy()
        self.placed[name] = (self._append(data), len(data), list(tensor.shape), dtype)

    def add_bytes(self, name: str, data: bytes) -> int:
        """Write bytes, unless the name has been written already; return their offset."""
        if name not in self.placed:
            self.placed[name] = (self._append(data), len(data), [], "")
        return self.placed[name][0]

    def _append(self, data: Any) -> int:
        self._write(b"\0" * (-self._file.tell() % (_PAGE if len(data) >= _PAGE else 64)))
        offset = self._file.tell()
        self._write(data)
        return offset

    def _write(self, data: Any) -> None:
        self._file.write(data)


class GraphBuilder:
    """Collects the nodes of one graph. A value is identified by its name; generated names begin with `scope`."""

    def __init__(self, spec: GraphSpec, weights: WeightFile):
        self.onnx = require_onnx()
        self.spec, self.weights, self.scope = spec, weights, spec.name
        self._nodes: list[Any] = []
        self._initializers: dict[str, Any] = {}

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Append a node with one output; return the output's name. An empty input name leaves that input out."""
        return self.ops(kind, *inputs, names=[name or f"{self.scope}.{kind}_{len(self._nodes)}"], **attributes)[0]

    def ops(self, kind: str, *inputs: str, names: Sequence[str], **attributes: Any) -> list[str]:
        """Append a node with an output for each of `names`; return the names."""
        self._nodes.append(self.onnx.helper.make_node(kind, inputs, names, name=names[0], **attributes))
        return list(names)

    def split(self, value: str, parts: int, axis: int) -> list[str]:
        """Append a node that splits a value into equal parts; return their names."""
        names = [f"{self.scope}.Split_{len(self._nodes)}.{part}" for part in range(parts)]
        return self.ops("Split", value, names=names, axis=axis, num_outputs=parts)

    def cast(self, value: str, dtype: str, name: str | None = None) -> str:
        """Convert between float32 and the dtype of the weights; no node where they are the same."""
        if dtype == self.weights.dtype == "float32":
            return self.op("Identity", value, name=name) if name else value
        return self.op("Cast", value, name=name, to=onnx_type(dtype))

    def reshape(self, value: str, *shape: int, name: str | None = None) -> str:
        return self.op("Reshape", value, self.integers(shape), name=name)

    def expand(self, value: str, *shape: int) -> str:
        return self.op("Expand", value, self.integers(shape))

    def integers(self, values: Sequence[int]) -> str:
        """Return a constant int64 vector, shared by all nodes that need these values."""
        name = "int64." + "_".join(map(str, values))
        if name not in self._initializers:
            tensor = self.onnx.helper.make_tensor(name, onnx_type("int64"), [len(values)], list(values))
            self._initializers[name] = tensor
        return name

    def weight(self, name: str, tensor: Tensor, dtype: str | None = None) -> str:
        """Write a constant to the weight file, unless it is there already, and return its name."""
        self.weights.add(name, tensor, dtype)
        return self.stored(name)

    def stored(self, name: str) -> str:
        """Declare a constant of the weight file in this graph and return its name."""
        if name not in self._initializers:
            offset, length, shape, dtype = self.weights.placed[name]
            made = self.onnx.TensorProto(name=name, data_type=onnx_type(dtype), dims=shape)
            made.data_location = self.onnx.TensorProto.EXTERNAL
            for key, value in (("location", self.weights.path.name), ("offset", offset), ("length", length)):
                made.external_data.add(key=key, value=str(value))
            self._initializers[name] = made
        return name

    def model(self) -> Any:
        """Return the finished ModelProto, with inputs and outputs as the contract declares them."""
        helper = self.onnx.helper

        def infos(tensors: Sequence[TensorSpec]) -> list[Any]:
            return [helper.make_tensor_value_info(t.name, onnx_type(t.dtype), t.shape) for t in tensors]

        graph = helper.make_graph(
            self._nodes,
            self.spec.name,
            infos(self.spec.inputs),
            infos(self.spec.outputs),
            list(self._initializers.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="cfpp-rt",
        )
