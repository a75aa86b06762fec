"""Runs the engines of a bundle on the GPU, without torch. It has not run on a GPU yet.

Each name of the contract has one block of GPU memory, whichever graphs use it. So the caches, which one pass writes and
the next reads, never leave the GPU; inputs are copied there when they change, and a pass copies back its velocity.
"""

import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from cfpp_rt.errors import InputError
from cfpp_rt.export.contract import GraphSpec, TensorSpec
from cfpp_rt.export.runner import Array, Buffer, Runner, require_input
from cfpp_rt.export.trt.bundle import open_engine_bundle
from cfpp_rt.export.trt.cuda import Device, Memory
from cfpp_rt.export.trt.library import Library, load_library
from cfpp_rt.export.trt.messages import explain


class TensorRTRunner(Runner):
    """Executes an engine bundle on one GPU: `BundleRollout(TensorRTRunner(folder), prompt_embeds, latent_frames=81)`.

    library: see `load_library`.
    device: index of the GPU.
    onnx: folder of the ONNX bundle that stripped engines take their weights from.

    Raises InputError for a bundle that is damaged, of another architecture or of another TensorRT.
    """

    def __init__(self, folder: str | Path, *, library: str = "auto", device: int = 0, onnx: str | Path | None = None):
        loaded = load_library(library)
        self.device = Device(device)
        bundle = open_engine_bundle(
            folder, architecture=self.device.architecture, library=loaded.name, version=loaded.version
        )
        if bundle.values["weights"] == "stripped" and onnx is None:
            raise InputError(f"onnx must name the folder of the graphs: the engines of {folder} hold no weights")
        super().__init__(bundle.card, bundle.folder)
        if self.card.sizes.dtype == "bfloat16":
            import ml_dtypes  # noqa: F401  registers the name with numpy
        specs = {name: self.card.graphs[name] for name in bundle.engines}
        memory = SharedMemory(self.device, [t for spec in specs.values() for t in (*spec.inputs, *spec.outputs)])
        self._sessions: dict[str, TensorRTSession] = {}
        for name, path in bundle.engines.items():
            graph = EngineGraph(loaded, self.device, path, specs[name], memory.blocks)
            if onnx is not None:
                graph.refit(Path(onnx, f"{name}.onnx"))
            self._sessions[name] = TensorRTSession(graph, memory)

    def session(self, name: str) -> "TensorRTSession":
        if name not in self._sessions:
            raise InputError(f"graph must be one of the bundle's, {', '.join(self._sessions)}, got {name!r}")
        return self._sessions[name]

    def close(self) -> None:
        """Free the GPU memory."""
        self._sessions.clear()
        self.device.close()


class TensorRTSession:
    """An engine ready to run: the counterpart of `GraphSession`."""

    def __init__(self, graph: "EngineGraph", memory: "SharedMemory"):
        self.spec, self._graph, self._memory = graph.spec, graph, memory
        self._results: dict[str, Buffer] = {}

    def bind(self, buffers: Mapping[str, Buffer]) -> None:
        """Copy to the GPU the buffers that are not there yet. The host's copy of a cache is read only once."""
        for tensor in self.spec.inputs:
            if tensor.name in buffers:
                require_input(self.spec, tensor, buffers[tensor.name].array)
                self._memory.upload(tensor.name, buffers[tensor.name])

    def bind_output(self, name: str, buffer: Buffer) -> None:
        """Copy this output to `buffer` after every run."""
        self._results[name] = buffer

    def run(self) -> None:
        """Run on the bound buffers."""
        self._graph.run()
        for name, buffer in self._results.items():
            self._memory.download(name, buffer.array)

    def run_once(self, **inputs: Array) -> dict[str, Array]:
        """Run on these inputs; return every output that updates no input."""
        self.bind({name: Buffer(array) for name, array in inputs.items()})
        self._graph.run()
        made = {tensor.name: np.empty(tensor.shape, tensor.dtype) for tensor in self.spec.outputs if not tensor.updates}
        for name, array in made.items():
            self._memory.download(name, array)
        return made


class EngineGraph:
    """One deserialized engine. Its tensors are bound once; an output that updates an input shares the input's memory.

    memory: GPU memory by the name of the input or output.
    """

    def __init__(self, library: Library, device: Device, path: Path, spec: GraphSpec, memory: Mapping[str, Memory]):
        self.library, self.device, self.spec = library, device, spec
        self.engine = library.api.Runtime(library.logger).deserialize_cuda_engine(path.read_bytes())
        if self.engine is None:
            errors = "; ".join(library.messages("INTERNAL_ERROR", "ERROR"))
            raise InputError(f"{path}: does not load: {explain(errors)}")
        for output, cache in spec.aliases.items():
            found = self.engine.get_aliased_input_tensor(output)
            if found != cache:
                raise InputError(f"{path}: output {output} must share the memory of {cache}, the engine says {found}")
        self._context = self.engine.create_execution_context()
        for tensor in (*spec.inputs, *spec.outputs):
            if not self._context.set_tensor_address(tensor.name, memory[tensor.updates or tensor.name].pointer):
                raise InputError(f"{path}: the engine has no tensor {tensor.name}")
        self._cuda_graph: Any = None

    def refit(self, onnx: Path) -> None:
        """Give a stripped engine the weights of its ONNX graph."""
        api, logger = self.library.api, self.library.logger
        refitter = api.Refitter(self.engine, logger)
        if not api.OnnxParserRefitter(refitter, logger).refit_from_file(str(onnx)) or not refitter.refit_cuda_engine():
            raise InputError(f"{onnx}: its weights do not fit the engine of {self.spec.name}")

    def run(self) -> None:
        """Enqueue one pass on the device's stream: the first directly, later ones as a CUDA graph of it."""
        if self._cuda_graph is not None:
            self.device.check(self.device.runtime.cudaGraphLaunch(self._cuda_graph, self.device.stream))
            return
        self._enqueue()
        if self._context.is_stream_capturable(int(self.device.stream)):
            self._cuda_graph = self._capture()

    def _capture(self) -> Any:
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


class SharedMemory:
    """The GPU memory of all names, with the host buffer whose contents each block has."""

    def __init__(self, device: Device, tensors: list[TensorSpec]):
        sizes: dict[str, int] = {}
        for tensor in tensors:
            name = tensor.updates or tensor.name
            sizes[name] = max(sizes.get(name, 0), int(np.prod(tensor.shape)) * np.dtype(tensor.dtype).itemsize)
        self.device, self.blocks = device, {name: device.allocate(size) for name, size in sizes.items()}
        self._caches = {tensor.updates for tensor in tensors if tensor.updates}
        self._owner: dict[str, Buffer] = {}
        self._displaced: weakref.WeakSet[Buffer] = weakref.WeakSet()

    def upload(self, name: str, buffer: Buffer) -> None:
        """Copy `buffer` to the memory of `name`, unless its contents are there already."""
        owner = self._owner.get(name)
        if owner is buffer:
            return
        if buffer in self._displaced:
            raise InputError(f"{name}: another rollout has used this engine meanwhile: run one after the other")
        if owner is not None and name in self._caches:
            self._displaced.add(owner)
        self.device.write(self.blocks[name], buffer.array)
        self._owner[name] = buffer

    def download(self, name: str, array: Array) -> None:
        """Copy the output that a graph has just written under `name` to `array`."""
        self._owner.pop(name, None)
        self.device.read(self.blocks[name], array)
