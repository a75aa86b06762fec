"""One graph in onnxruntime with its buffers bound: numpy in, numpy out, and nothing large is copied between passes."""

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cfpp_rt.device.threads import largest_product, thread_count
from cfpp_rt.errors import InputError, MissingExtraError
from cfpp_rt.export.bundle import Bundle
from cfpp_rt.export.contract import GraphSpec, TensorSpec

Array = NDArray[Any]
LOG_SEVERITY = 4  # of onnxruntime: what goes wrong is raised as well; 2 tells of every cache that it copies


def require_onnxruntime() -> Any:
    """The onnxruntime package. Raises MissingExtraError where it is absent."""
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        raise MissingExtraError("onnxruntime", "onnx", "running an ONNX bundle") from error


class Buffer:
    """Memory that graphs are bound to: a numpy array, and onnxruntime's view of it."""

    def __init__(self, array: Array):
        self.array = np.ascontiguousarray(array)

    @functools.cached_property
    def value(self) -> Any:
        value = require_onnxruntime().OrtValue.ortvalue_from_numpy(self.array)
        if value.data_ptr() != self.array.ctypes.data:
            raise RuntimeError("onnxruntime copied an array instead of using its memory")
        return value

    @classmethod
    def zeros(cls, spec: TensorSpec) -> "Buffer":
        return cls(np.zeros(spec.shape, spec.dtype))


class GraphSession:
    """A graph ready to run. Inputs are checked against the contract before every pass."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None = None):
        """threads: of onnxruntime; None = by the rule of `cfpp_rt.device.threads`, else onnxruntime's own choice.

        Raises InputError for a graph that is not the contract's.
        """
        ort = require_onnxruntime()
        self.spec: GraphSpec = bundle.card.graphs[name]
        if bundle.card.sizes.dtype == "bfloat16":
            raise InputError(
                f"{bundle.folder}: onnxruntime has no bfloat16 on the CPU: export with --dtype float32 or float16"
            )
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads or _thread_count(bundle) or 0
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # threads sleep while they wait
        options.log_severity_level = LOG_SEVERITY
        try:
            self._session = ort.InferenceSession(str(bundle.path(name)), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime raises classes of its own for a file that it cannot load
            raise InputError(f"{bundle.path(name)}: cannot be loaded ({' '.join(str(error).split())[:200]})") from error
        self._require_contract(bundle.path(name))
        self._binding = self._session.io_binding()
        self._bound: dict[str, Any] = {}

    def bind(self, buffers: Mapping[str, Buffer]) -> None:
        """Bind inputs, and outputs that update them to the same memory, until others are bound."""
        updates = {source: output for output, source in self.spec.aliases.items()}
        for tensor in self.spec.inputs:
            buffer = buffers.get(tensor.name)
            if buffer is None or self._bound.get(tensor.name) is buffer:
                continue
            require_tensor(self.spec, tensor, buffer.array)
            self._binding.bind_ortvalue_input(tensor.name, buffer.value)
            self._bound[tensor.name] = buffer
            if tensor.name in updates:
                self._binding.bind_ortvalue_output(updates[tensor.name], buffer.value)

    def bind_output(self, name: str, buffer: Buffer) -> None:
        if self._bound.get(name) is not buffer:
            self._binding.bind_ortvalue_output(name, buffer.value)
            self._bound[name] = buffer

    def run(self) -> None:
        """Run on what is bound.

        Raises InputError, before anything is written, for an integer out of its range, and where onnxruntime fails.
        """
        for tensor in self.spec.inputs:
            if tensor.low is not None:
                require_tensor(self.spec, tensor, self._bound[tensor.name].array)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # classes of its own
            raise InputError(f"{self.spec.name}: onnxruntime failed: {' '.join(str(error).split())[-300:]}") from error

    def __call__(self, **inputs: Array) -> dict[str, Array]:
        """Run once on these inputs, which stay as they are; returns every output, in memory of its own."""
        updated = set(self.spec.aliases.values())
        buffers = {
            tensor.name: Buffer(inputs[tensor.name].copy() if tensor.name in updated else inputs[tensor.name])
            for tensor in self.spec.inputs
        }
        made = {tensor.name: Buffer.zeros(tensor) for tensor in self.spec.outputs if tensor.updates is None}
        self.bind(buffers)
        for name, buffer in made.items():
            self.bind_output(name, buffer)
        self.run()
        made.update({output: buffers[source] for output, source in self.spec.aliases.items()})
        return {name: buffer.array for name, buffer in made.items()}

    def run_once(self, **inputs: Array) -> dict[str, Array]:
        """Run on these inputs, in memory that onnxruntime allocates: for graphs that update nothing in place."""
        for tensor in self.spec.inputs:
            require_tensor(self.spec, tensor, inputs[tensor.name])
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _require_contract(self, path: Any) -> None:
        for side, wanted, found in (
            ("inputs", self.spec.inputs, self._session.get_inputs()),
            ("outputs", self.spec.outputs, self._session.get_outputs()),
        ):
            expected = [(tensor.name, list(tensor.shape), _ort_type(tensor.dtype)) for tensor in wanted]
            actual = [(node.name, list(node.shape), node.type) for node in found]
            if expected != actual:
                differing = _first_difference(expected, actual)
                raise InputError(f"{path}: {side} must be those of the contract: {differing}")


def _thread_count(bundle: Bundle) -> int | None:
    sizes = bundle.card.sizes
    frames = 2 * sizes.block * sizes.batch  # the fused pass has two blocks
    return thread_count(largest_product(sizes.model, frames * sizes.tokens))


def require_tensor(spec: GraphSpec, tensor: TensorSpec, array: Array) -> None:
    """Raise InputError unless `array` is what the contract says of an input: shape, dtype, range."""
    if array.shape != tensor.shape or array.dtype.name != tensor.dtype:
        raise InputError(
            f"{spec.name}: {tensor.name} must be {tensor.dtype} {list(tensor.shape)},"
            f" got {array.dtype.name} {list(array.shape)}"
        )
    if tensor.low is None or tensor.high is None:
        return
    if array.min() < tensor.low or array.max() > tensor.high:
        raise InputError(f"{spec.name}: {tensor.name} must be in {tensor.low}..{tensor.high}, got {array.tolist()}")


def _ort_type(dtype: str) -> str:
    return f"tensor({'float' if dtype == 'float32' else dtype})"


def _first_difference(expected: Iterable[Any], actual: Iterable[Any]) -> str:
    expected, actual = list(expected), list(actual)
    for wanted, found in zip(expected, actual, strict=False):
        if wanted != found:
            return f"wanted {wanted}, got {found}"
    return f"wanted {len(expected)} of them, got {len(actual)}"
