"""Bundles of a small graph, from file to engine; what runs them is tried against a pretended GPU, and on a real one."""

import ast
import dataclasses
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.export.trt import engine as engines
from cfpp_rt.export.trt import memory
from cfpp_rt.export.trt.bundle import open_bundle
from cfpp_rt.export.trt.engine import TensorRTBackend
from cfpp_rt.export.trt.library import Library
from cfpp_rt.export.trt.make import make_bundle
from cfpp_rt.export.trt.memory import Buffer, Device
from tests.export.graphs import B, C, D, H, L, S, cached_attention, contract
from tests.export.needs import needs_tensorrt

NAME = "cached_attention"
CARD = {"steps": [1000, 500]}


def make(tmp_path, **options):
    options = {"targets": ("sm89", "sm120"), "library": "tensorrt-rtx", **options}
    return make_bundle(tmp_path, tmp_path / "bundle", {NAME: contract()}, CARD, **options)


@needs_tensorrt
def test_graphs_become_a_bundle(tmp_path):
    cached_attention(tmp_path / f"{NAME}.onnx", external=True)
    said = []
    card = make(tmp_path, say=said.append)
    opened = open_bundle(
        tmp_path / "bundle", architecture="sm120", library="tensorrt-rtx", version=card["library_version"]
    )
    assert opened.engines[NAME].read_bytes()[:4] == b"vtrt" and opened.card["steps"] == [1000, 500]
    facts = opened.card["engines"]["sm89"][NAME]
    assert facts["self_attentions"] == L and facts["build_s"] > 0 and "valid length set on 2" in facts["notes"][0]
    assert [line.split(":")[0] for line in said] == [f"sm89 {NAME}", f"sm120 {NAME}"]
    assert opened.card["contract"][NAME] == json.loads(json.dumps(dataclasses.asdict(contract())))


@needs_tensorrt
@pytest.mark.parametrize(
    "options,message",
    [
        ({"targets": ("sm89", "sm90")}, "no target for data centre GPUs"),
        ({"targets": ()}, "different architectures, got none"),
        ({"targets": ("sm89", "sm89")}, "different architectures, got sm89, sm89"),
        ({"time_limit_s": 0.0}, "stopped after 0 s"),
    ],
)
def test_a_bundle_that_cannot_be_made_leaves_nothing(tmp_path, options, message):
    cached_attention(tmp_path / f"{NAME}.onnx")
    with pytest.raises(InputError, match=message):
        make(tmp_path, **options)
    assert [path.name for path in tmp_path.iterdir()] == [f"{NAME}.onnx"]


@needs_tensorrt
def test_a_missing_graph_or_a_full_disk_is_one_line(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=f"{NAME}.onnx: no such file"):
        make(tmp_path)
    cached_attention(tmp_path / f"{NAME}.onnx")
    full = SimpleNamespace(free=2**20)
    monkeypatch.setattr("cfpp_rt.export.trt.bundle.shutil.disk_usage", lambda path: full)
    with pytest.raises(InputError, match="the disk has 1 MiB free"):
        make(tmp_path)
    assert not (tmp_path / "bundle").exists()


class PretendedDevice:
    """Memory that is numpy arrays, and a CUDA runtime that counts what is asked of it."""

    architecture, stream = "sm89", 7

    def __init__(self, index=0):
        self.memory, self.calls = {}, []
        self.runtime = SimpleNamespace(
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
            **{
                name: lambda *arguments, name=name: self.calls.append(name) or name
                for name in (
                    "cudaStreamBeginCapture",
                    "cudaStreamEndCapture",
                    "cudaGraphInstantiate",
                    "cudaGraphLaunch",
                )
            },
        )

    def check(self, result):
        return result

    def allocate(self, size):
        buffer = Buffer(4096 * (len(self.memory) + 1), size)
        self.memory[buffer.pointer] = bytearray(size)
        return buffer

    def write(self, buffer, values):
        self.memory[buffer.pointer][: values.nbytes] = values.tobytes()

    def read(self, buffer, values):
        values[...] = np.frombuffer(self.memory[buffer.pointer][: values.nbytes], values.dtype).reshape(values.shape)

    def close(self):
        self.memory.clear()


class PretendedEngine:
    """Both engine and execution context: remembers addresses, runs nothing."""

    aliases = contract().aliases

    def __init__(self):
        self.addresses, self.passes = {}, 0

    def get_aliased_input_tensor(self, name):
        return self.aliases.get(name)

    def create_execution_context(self):
        return self

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, stream):
        self.passes += 1
        return True


@pytest.fixture
def pretended(tmp_path, monkeypatch):
    """A bundle whose engine is four bytes, and the engine that a pretended TensorRT makes of it."""
    made = PretendedEngine()
    runtime = SimpleNamespace(deserialize_cuda_engine=lambda data: made if data == b"vtrt" else None)
    library = Library("tensorrt-rtx", "1.7", SimpleNamespace(Runtime=lambda logger: runtime), None, [])
    monkeypatch.setattr(engines, "load_library", lambda name: library)
    monkeypatch.setattr(engines, "Device", PretendedDevice)
    from cfpp_rt.export.trt.bundle import new_folder, write_card

    with new_folder(tmp_path / "bundle") as folder:
        (folder / "sm89").mkdir()
        (folder / "sm89" / f"{NAME}.engine").write_bytes(b"vtrt")
        card = {"library": "tensorrt-rtx", "library_version": "1.7", "weights": "embedded"}
        write_card(folder, {**card, "contract": {NAME: dataclasses.asdict(contract())}}, {"sm89": {NAME: {}}})
    return tmp_path / "bundle", made


def test_a_cache_has_one_memory_under_both_names(pretended):
    folder, engine = pretended
    TensorRTBackend(folder)
    for layer in range(L):
        for name in ("keys", "values"):
            assert engine.addresses[f"{name}_{layer}"] == engine.addresses[f"{name}_{layer}_out"]
    assert len(set(engine.addresses.values())) == len(engine.addresses) - 2 * L, "and shares it with nothing else"


def test_a_pass_is_recorded_once_and_replayed(pretended):
    folder, engine = pretended
    backend = TensorRTBackend(folder)
    x = np.full((B, S, H * D), 2, np.float16)
    for _ in range(4):
        results = backend.run(NAME, {"x": x, "length": np.array([S])})
    assert list(results) == ["y"] and results["y"].shape == x.shape
    assert engine.passes == 2, "one that runs, one that is recorded"
    assert backend.device.calls.count("cudaGraphLaunch") == 3
    assert backend.device.calls.count("cudaGraphInstantiate") == 1


def test_inputs_of_other_shape_or_dtype_are_refused(pretended):
    backend = TensorRTBackend(pretended[0])
    with pytest.raises(InputError, match=r"x of cached_attention must be float16 \[1, 8, 32\], got float32"):
        backend.run(NAME, {"x": np.zeros((B, S, H * D), np.float32)})
    with pytest.raises(InputError, match=r"length of cached_attention must be int64 \[1\], got int64 \[2\]"):
        backend.run(NAME, {"length": np.array([S, S])})


def test_an_engine_that_does_not_share_memory_is_refused(pretended):
    folder, engine = pretended
    engine.aliases = {**engine.aliases, "keys_1_out": None}
    with pytest.raises(InputError, match="keys_1_out must share the memory of keys_1, the engine says None"):
        TensorRTBackend(folder)


def test_stripped_weights_need_their_graphs(pretended):
    folder, _ = pretended
    card = json.loads((folder / "card.json").read_text())
    (folder / "card.json").write_text(json.dumps({**card, "weights": "stripped"}))
    with pytest.raises(InputError, match="onnx must name the folder of the graphs"):
        TensorRTBackend(folder)


def test_every_cuda_call_exists():
    """The names are right, though nothing here can call them without a GPU."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install 'cfpp-rt[tensorrt]'")
    for module in (memory, engines):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("cuda"):
                if isinstance(node.value, ast.Attribute) and node.value.attr.startswith("cuda"):
                    assert hasattr(getattr(runtime, node.value.attr), node.attr), node.attr
                else:
                    assert hasattr(runtime, node.attr), node.attr


def test_no_gpu_is_one_line():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install 'cfpp-rt[tensorrt]'")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="device 0 must be a CUDA GPU with its driver: CUDA error 35"):
        Device()


@pytest.mark.gpu
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_an_engine_agrees_with_onnx_runtime(tmp_path, library):
    """Three passes over a ring of slots, the cache held on the GPU, against ONNX Runtime handing it round."""
    pytest.importorskip(library.replace("-", "_"), reason=f"pip install {library}")
    onnxruntime = pytest.importorskip("onnxruntime")
    graph = cached_attention(tmp_path / f"{NAME}.onnx")
    make(tmp_path, library=library, targets=("current",))
    backend = TensorRTBackend(tmp_path / "bundle", library=library)
    session = onnxruntime.InferenceSession(str(graph), providers=["CPUExecutionProvider"])
    spec, generator = contract(), np.random.default_rng(0)
    caches = {name: np.zeros((B, H, C, D), np.float16) for name in spec.aliases.values()}
    angle = generator.uniform(0, 3, (B, S, D // 2))
    turn = {"cos": np.cos(angle).astype(np.float16), "sin": np.sin(angle).astype(np.float16)}
    for step in range(6):  # capacity for four: the ring wraps
        x = generator.standard_normal((B, S, H * D)).astype(np.float16)
        slot, length = step * S % C, min(C, (step + 1) * S)
        inputs = {"x": x, **turn, "slot": np.array([slot]), "length": np.array([length])}
        expected = dict(zip([t.name for t in spec.outputs], session.run(None, {**inputs, **caches}), strict=True))
        caches = {cache: expected[output] for output, cache in spec.aliases.items()}
        np.testing.assert_allclose(backend.run(NAME, inputs)["y"], expected["y"], atol=1e-2)
    backend.close()
