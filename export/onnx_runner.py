"""Runs the graphs of a bundle in onnxruntime on the CPU: numpy in, numpy out, and no cache is copied between passes."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from cfpp_rt.device.threads import largest_product, thread_count
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle import Bundle, open_bundle
from cfpp_rt.export.contract import GraphSpec
from cfpp_rt.export.runner import Array, Buffer, Runner, require_input, require_onnxruntime

LOG_SEVERITY = 4  # fatal errors only: onnxruntime raises the others too; at 2 it warns of every cache that it copies


class OnnxRunner(Runner):
    """Executes a bundle in onnxruntime. Each graph is loaded when it is first used."""

    def __init__(self, bundle: Bundle | str | Path, threads: int | None = None):
        """threads: number of onnxruntime's threads; None = chosen by `GraphSession`. Errors: see `open_bundle`."""
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle)
        super().__init__(self.bundle.card, self.bundle.folder)
        self._threads = threads
        self._sessions: dict[str, GraphSession] = {}

    def session(self, name: str) -> "GraphSession":
        with self.lock:  # several threads get the same session
            if name not in self._sessions:
                self._sessions[name] = GraphSession(self.bundle, name, self._threads)
            return self._sessions[name]


class GraphSession:
    """A graph ready to run. Inputs are checked against the contract before every pass."""

    def __init__(self, bundle: Bundle, name: str, threads: int | None = None):
        """threads: number of onnxruntime's threads; None = chosen by `cfpp_rt.device.threads`, else by onnxruntime.

        Raises InputError for a graph whose inputs and outputs are not the contract's.
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
        self._bound: dict[str, Buffer] = {}

    def bind(self, buffers: Mapping[str, Buffer]) -> None:
        """Bind inputs, and outputs that update them to the same memory, until others are bound."""
        updates = {source: output for output, source in self.spec.aliases.items()}
        for tensor in self.spec.inputs:
            buffer = buffers.get(tensor.name)
            if buffer is None or self._bound.get(tensor.name) is buffer:
                continue
            require_input(self.spec, tensor, buffer.array)
            self._binding.bind_ortvalue_input(tensor.name, buffer.value)
            self._bound[tensor.name] = buffer
            if tensor.name in updates:
                self._binding.bind_ortvalue_output(updates[tensor.name], buffer.value)

    def bind_output(self, name: str, buffer: Buffer) -> None:
        """Bind an output that updates no input: every run writes it to `buffer`."""
        if self._bound.get(name) is not buffer:
            self._binding.bind_ortvalue_output(name, buffer.value)
            self._bound[name] = buffer

    def run(self) -> None:
        """Run on the bound buffers.

        Raises InputError, before anything is written, for an integer out of its range, and where onnxruntime fails.
        """
        for tensor in self.spec.inputs:
            if tensor.low is not None:
                require_input(self.spec, tensor, self._bound[tensor.name].array)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:  # onnxruntime raises classes of its own
            raise InputError(f"{self.spec.name}: onnxruntime failed: {' '.join(str(error).split())[-300:]}") from error

    def run_on_copies(self, **inputs: Array) -> dict[str, Array]:
        """Run on these inputs, with copies of the caches among them; return every output in separate memory."""
        cached = set(self.spec.aliases.values())
        buffers = {
            tensor.name: Buffer(inputs[tensor.name].copy() if tensor.name in cached else inputs[tensor.name])
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
        """Run on these inputs, in memory that onnxruntime allocates. For graphs that update nothing in place."""
        for tensor in self.spec.inputs:
            require_input(self.spec, tensor, inputs[tensor.name])
        names = [tensor.name for tensor in self.spec.outputs]
        return dict(zip(names, self._session.run(names, inputs), strict=True))

    def _require_contract(self, path: Path) -> None:
        for side, wanted, found in (
            ("inputs", self.spec.inputs, self._session.get_inputs()),
            ("outputs", self.spec.outputs, self._session.get_outputs()),
        ):
            expected = [(tensor.name, list(tensor.shape), _ort_type(tensor.dtype)) for tensor in wanted]
            actual = [(node.name, list(node.shape), node.type) for node in found]
            if expected != actual:
                difference = _first_difference(expected, actual)
                raise InputError(f"{path}: {side} must be those of the contract: {difference}")


def _thread_count(bundle: Bundle) -> int | None:
    sizes = bundle.card.sizes
    frames = 2 * sizes.frames_per_block * sizes.batch  # the fused pass has two blocks
    return thread_count(largest_product(sizes.model, frames * sizes.tokens_per_frame))


def _ort_type(dtype: str) -> str:
    return f"tensor({'float' if dtype == 'float32' else dtype})"


def _first_difference(expected: Iterable[Any], actual: Iterable[Any]) -> str:
    expected, actual = list(expected), list(actual)
    for wanted, found in zip(expected, actual, strict=False):
        if wanted != found:
            return f"wanted {wanted}, got {found}"
    return f"wanted {len(expected)} of them, got {len(actual)}"
