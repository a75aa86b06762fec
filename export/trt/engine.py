"""Runs the engines of a bundle on the GPU, without torch. Not yet run: see docs/gpu.md."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import GraphSpec, TensorSpec
from cfpp_rt.export.trt.bundle import open_bundle
from cfpp_rt.export.trt.faults import explain
from cfpp_rt.export.trt.library import Library, load_library
from cfpp_rt.export.trt.memory import Buffer, Device


class Engine:
    """One graph on the GPU. Its buffers are given once; `run` may then be called any number of times.

    The buffer of an input that an output continues is bound to both names: the caches are updated where they lie.
    """

    def __init__(self, library: Library, device: Device, path: Path, spec: GraphSpec, onnx: Path | None = None):
        """onnx: the graph that a stripped engine takes its weights from."""
        self.library, self.device, self.spec = library, device, spec
        runtime = library.api.Runtime(library.logger)
        self._engine = runtime.deserialize_cuda_engine(path.read_bytes())
        if self._engine is None:
            errors = "; ".join(library.messages("INTERNAL_ERROR", "ERROR"))
            raise InputError(f"{path}: does not load: {explain(errors)}")
        for output, cache in spec.aliases.items():
            found = self._engine.get_aliased_input_tensor(output)
            if found != cache:
                raise InputError(f"{path}: output {output} must share the memory of {cache}, the engine says {found}")
        if onnx is not None:
            self._refit(onnx)
        self._context = self._engine.create_execution_context()
        self._graph: Any = None

    def _refit(self, onnx: Path) -> None:
        api, logger = self.library.api, self.library.logger
        refitter = api.Refitter(self._engine, logger)
        if not api.OnnxParserRefitter(refitter, logger).refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
            raise InputError(f"{onnx}: its weights do not fit the engine of {self.spec.name}")

    def bind(self, buffers: Mapping[str, Buffer]) -> None:
        """Give every input and every output that continues none its memory."""
        for tensor in (*self.spec.inputs, *self.spec.outputs):
            buffer = buffers[tensor.updates or tensor.name]
            if not self._context.set_tensor_address(tensor.name, buffer.pointer):
                raise InputError(f"graph {self.spec.name} has no tensor {tensor.name}")
        self._graph = None

    def run(self) -> None:
        """Enqueue one pass on the device's stream: the first as it is, later ones as the CUDA graph recorded of it."""
        if self._graph is not None:
            self.device.check(self.device.runtime.cudaGraphLaunch(self._graph, self.device.stream))
            return
        self._enqueue()
        if self._context.is_stream_capturable(int(self.device.stream)):
            self._graph = self._record()

    def _record(self) -> Any:
        """Record a pass without running it."""
        runtime, stream = self.device.runtime, self.device.stream
        mode = runtime.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        self.device.check(runtime.cudaStreamBeginCapture(stream, mode))
        self._enqueue()
        recorded = self.device.check(runtime.cudaStreamEndCapture(stream))
        return self.device.check(runtime.cudaGraphInstantiate(recorded, 0))

    def _enqueue(self) -> None:
        if not self._context.execute_async_v3(int(self.device.stream)):
            raise RuntimeError(f"graph {self.spec.name} failed: {'; '.join(self.library.messages('ERROR')[-3:])}")


class TensorRTBackend:
    """All engines of a bundle on one GPU. A name of the contract has one buffer, whichever graphs use it.

    So the caches and the text's keys and values, which one graph writes and the next reads, never leave the GPU; what a
    pass takes from the host and gives to it is small.
    """

    def __init__(self, folder: str | Path, *, library: str = "auto", device: int = 0, onnx: str | Path | None = None):
        """onnx: folder of the ONNX graphs, for a bundle whose weights are stripped.

        Raises InputError for a bundle that is damaged, of another architecture or of another TensorRT.
        """
        loaded = load_library(library)
        self.device = Device(device)
        bundle = open_bundle(folder, architecture=self.device.architecture, library=loaded.name, version=loaded.version)
        if bundle.card["weights"] == "stripped" and onnx is None:
            raise InputError(f"onnx must name the folder of the graphs: the engines of {folder} hold no weights")
        self.card = bundle.card
        self.specs = {name: GraphSpec.from_dict(spec) for name, spec in bundle.card["contract"].items()}
        sizes: dict[str, int] = {}
        for spec in self.specs.values():
            for tensor in (*spec.inputs, *spec.outputs):
                name = tensor.updates or tensor.name
                sizes[name] = max(sizes.get(name, 0), tensor_bytes(tensor))
        self._buffers = {name: self.device.allocate(size) for name, size in sizes.items()}
        self._engines = {
            name: Engine(
                loaded, self.device, path, self.specs[name], None if onnx is None else Path(onnx, f"{name}.onnx")
            )
            for name, path in bundle.engines.items()
        }
        for engine in self._engines.values():
            engine.bind(self._buffers)

    def run(self, graph: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run one graph. inputs: those that change; every other keeps what was last written or computed under its name.

        Returns the outputs that the host wants: not the caches and not the text's keys and values.
        """
        spec = self.specs[graph]
        for name, values in inputs.items():
            tensor = spec.input(name)
            if values.shape != tensor.shape or values.dtype != numpy_dtype(tensor.dtype):
                raise InputError(
                    f"{name} of {graph} must be {tensor.dtype} {list(tensor.shape)},"
                    f" got {values.dtype} {list(values.shape)}"
                )
            self.device.write(self._buffers[name], np.ascontiguousarray(values))
        self._engines[graph].run()
        results = {}
        for tensor in spec.outputs:
            if tensor.updates is None and not tensor.name.startswith("text_"):
                results[tensor.name] = np.empty(tensor.shape, numpy_dtype(tensor.dtype))
                self.device.read(self._buffers[tensor.name], results[tensor.name])
        return results

    def close(self) -> None:
        """Free the GPU memory."""
        self._engines.clear()
        self.device.close()


def tensor_bytes(tensor: TensorSpec) -> int:
    return int(np.prod(tensor.shape)) * numpy_dtype(tensor.dtype).itemsize


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The numpy dtype of a contract's dtype. bfloat16 comes from ml_dtypes."""
    if name == "bfloat16":
        import ml_dtypes

        return np.dtype(ml_dtypes.bfloat16)
    return np.dtype(name)
