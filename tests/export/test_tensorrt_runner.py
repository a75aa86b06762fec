"""TensorRTRunner: on a simulated GPU whose engines are ONNX Runtime's, and on a real GPU where there is one."""

import ast
import inspect
import json
from types import SimpleNamespace

import numpy as np
import pytest

from cfpp_rt.bench.export import tensorrt as bench_tensorrt
from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.onnx_runner import OnnxRunner
from cfpp_rt.export.trt import cuda
from cfpp_rt.export.trt import tensorrt_runner as engines
from cfpp_rt.export.trt.build import build_engine_bundle
from cfpp_rt.export.trt.bundle import write_engine_card
from cfpp_rt.export.trt.cuda import Device, Memory
from cfpp_rt.export.trt.library import Library
from cfpp_rt.export.trt.tensorrt_runner import TensorRTRunner
from cfpp_rt.io.atomic import new_folder
from tests.export.students import TINY, WORLD, bytes_moved, exported

onnxruntime = pytest.importorskip("onnxruntime")


class SimulatedDevice:
    """GPU memory that is bytes of the host, and a CUDA runtime that records and replays passes."""

    architecture, stream = "sm89", 7

    def __init__(self, index=0):
        self.memory, self.calls, self.recording, self.copied = {}, [], None, 0
        self.runtime = SimpleNamespace(
            cudaStreamCaptureMode=SimpleNamespace(cudaStreamCaptureModeThreadLocal=1),
            cudaStreamBeginCapture=self.begin,
            cudaStreamEndCapture=self.end,
            cudaGraphInstantiate=lambda recorded, flags: recorded,
            cudaGraphLaunch=self.launch,
        )

    def begin(self, stream, mode):
        self.recording = []

    def end(self, stream):
        recorded, self.recording = self.recording, None
        return recorded

    def launch(self, recorded, stream):
        self.calls.append("launch")
        for run in recorded:
            run()

    def check(self, result):
        return result

    def allocate(self, size):
        made = Memory(4096 * (len(self.memory) + 1), size)
        self.memory[made.pointer] = np.zeros(size, np.uint8)
        return made

    def view(self, pointer, tensor):
        dtype = np.dtype(tensor.dtype)
        size = int(np.prod(tensor.shape)) * dtype.itemsize
        return self.memory[pointer][:size].view(dtype).reshape(tensor.shape)

    def write(self, memory, values):
        self.calls.append(memory.pointer)
        self.copied += values.nbytes
        self.memory[memory.pointer][: values.nbytes] = np.frombuffer(values.tobytes(), np.uint8)

    def read(self, memory, values):
        self.copied += values.nbytes
        values[...] = self.memory[memory.pointer][: values.nbytes].view(values.dtype).reshape(values.shape)

    def close(self):
        self.memory.clear()


class SimulatedEngine:
    """An engine and its execution context in one: runs the ONNX graph on whatever memory is bound."""

    made: list = []

    def __init__(self, device, spec, path):
        self.device, self.spec, self.addresses = device, spec, {}
        quiet = onnxruntime.SessionOptions()
        quiet.log_severity_level, quiet.intra_op_num_threads = 3, 1
        self.session = onnxruntime.InferenceSession(path, quiet, providers=["CPUExecutionProvider"])
        SimulatedEngine.made.append(self)

    def get_aliased_input_tensor(self, name):
        return self.spec.aliases.get(name)

    def create_execution_context(self):
        return self

    def set_tensor_address(self, name, pointer):
        self.addresses[name] = pointer
        return True

    def is_stream_capturable(self, stream):
        return True

    def execute_async_v3(self, stream):
        if self.device.recording is not None:
            self.device.recording.append(self.run)
        else:
            self.run()
        return True

    def run(self):
        inputs = {t.name: self.device.view(self.addresses[t.name], t).copy() for t in self.spec.inputs}
        for tensor, values in zip(self.spec.outputs, self.session.run(None, inputs), strict=True):
            self.device.view(self.addresses[tensor.name], tensor)[...] = values


@pytest.fixture(scope="module", params=[TINY, WORLD], ids=["text", "actions"])
def source(request, tmp_path_factory):
    return exported(tmp_path_factory.mktemp("student") / "graphs", request.param)


@pytest.fixture
def simulated(tmp_path, monkeypatch, source):
    """An engine bundle whose files name ONNX graphs, and a simulated TensorRT that loads such."""
    device = SimulatedDevice()

    def load(data):
        name = data.decode()
        return SimulatedEngine(device, source.card.graphs[name], str(source.path(name)))

    api = SimpleNamespace(Runtime=lambda logger: SimpleNamespace(deserialize_cuda_engine=load))
    library = Library("tensorrt-rtx", "1.7", api, None, [])
    monkeypatch.setattr(engines, "load_library", lambda name: library)
    monkeypatch.setattr(engines, "Device", lambda index: device)
    monkeypatch.setattr(SimulatedEngine, "made", [])
    with new_folder(tmp_path / "bundle", 0) as folder:
        (folder / "sm89").mkdir()
        for name in source.card.graphs:
            (folder / "sm89" / f"{name}.engine").write_text(name)
        values = {"library": "tensorrt-rtx", "library_version": "1.7", "weights": "embedded"}
        values["student"] = source.card.to_dict()
        write_engine_card(folder, values, {"sm89": {name: {} for name in source.card.graphs}})
    return tmp_path / "bundle"


def prompt(source, seed=0):
    model = source.card.sizes.model
    if not model.text_len:
        return None
    return np.random.default_rng(seed).standard_normal((1, model.text_len, model.text_dim), np.float32)


def roll(source, runner, frames=9, **options):
    """Latents of a rollout in which the ring wraps twice, and prompt or action change on the way."""
    rollout = BundleRollout(runner, prompt(source), latent_frames=frames, seed=3, **options)
    made = []
    for block in rollout:
        made.append(block.values)
        if block.start == 4:
            rollout.set_prompt(prompt(source, 1)) if source.card.sizes.model.text_len else rollout.set_actions(2)
    return np.concatenate(made, axis=1)


@pytest.mark.parametrize("refresh", ["fused", "separate"])
def test_a_rollout_is_that_of_onnx_runtime(simulated, source, refresh):
    """Everything but the engines themselves: what is copied when, and one memory for a cache under both names."""
    expected = roll(source, OnnxRunner(source, threads=1), refresh=refresh)
    runner = TensorRTRunner(simulated)
    np.testing.assert_array_equal(roll(source, runner, refresh=refresh), expected)
    np.testing.assert_array_equal(roll(source, runner, refresh=refresh), expected, "a second one on the same runner")


def test_a_cache_has_one_memory_under_both_names(simulated, source):
    TensorRTRunner(simulated)
    assert len(SimulatedEngine.made) == len(source.card.graphs)
    passes = [made for made in SimulatedEngine.made if made.spec.aliases]
    for engine in passes:
        for output, cache in engine.spec.aliases.items():
            assert engine.addresses[output] == engine.addresses[cache] == passes[0].addresses[cache]
        own = [engine.addresses[name] for name in engine.addresses if name not in engine.spec.aliases]
        assert len(set(own)) == len(own), "and shares it with nothing else"


def test_between_passes_only_small_things_are_copied(simulated, source):
    runner = TensorRTRunner(simulated)
    rollout = BundleRollout(runner, prompt(source), latent_frames=9, seed=0)
    for _ in range(4):
        next(rollout)
    runner.device.calls.clear()
    runner.device.copied = 0
    next(rollout)
    assert runner.device.copied == bytes_moved(source.card, "fused", *["step"] * (len(source.card.steps) - 1))
    names = {pointer: name for made in SimulatedEngine.made for name, pointer in made.addresses.items()}
    copied = {names[call] for call in runner.device.calls if call != "launch"}
    assert {"latents"} < copied <= {"latents", "modulation", "rope_time", "write_index", "valid", "visible"}
    assert runner.device.calls.count("launch") >= 1, "the passes are replayed"


def test_two_rollouts_at_once_are_refused(simulated, source):
    runner = TensorRTRunner(simulated)
    first, second = (BundleRollout(runner, prompt(source), latent_frames=9, seed=seed) for seed in (0, 1))
    next(first), next(second)
    with pytest.raises(InputError, match="another rollout has used this engine meanwhile"):
        next(first)


def test_an_engine_that_does_not_share_memory_is_refused(simulated, monkeypatch):
    monkeypatch.setattr(SimulatedEngine, "get_aliased_input_tensor", lambda self, name: None)
    with pytest.raises(InputError, match="output keys.0.updated must share the memory of keys.0, the engine says None"):
        TensorRTRunner(simulated)


def test_stripped_weights_need_their_graphs(simulated):
    values = json.loads((simulated / "card.json").read_text())
    (simulated / "card.json").write_text(json.dumps({**values, "weights": "stripped"}))
    with pytest.raises(InputError, match="onnx must name the folder of the graphs"):
        TensorRTRunner(simulated)


def test_an_engine_that_was_left_out_is_named(simulated):
    values = json.loads((simulated / "card.json").read_text())
    del values["engines"]["sm89"]["fused"]
    (simulated / "card.json").write_text(json.dumps(values))
    with pytest.raises(InputError, match="graph must be one of the bundle's, embed_time.*, got 'fused'"):
        TensorRTRunner(simulated).session("fused")


def test_the_bench_times_every_block(simulated, source, tmp_path, capsys):
    bench_tensorrt.main([str(simulated), "--json", str(tmp_path / "rows.jsonl")])
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [row["visible_frames"] for row in rows[:6]] == [1, 2, 3, 4, 4, 4] and len(rows) == 4 + bench_tensorrt.STEADY
    assert rows[0]["steps"] == len(source.card.first_steps) and all(row["block_ms"] > 0 for row in rows)
    assert "4 frames visible" in capsys.readouterr().out


def test_every_cuda_call_exists():
    """The names are right, though nothing here can call them without a GPU."""
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install 'cfpp-rt[tensorrt]'")
    named = set()
    for module in (cuda, engines):
        for node in ast.walk(ast.parse(inspect.getsource(module))):
            if isinstance(node, ast.Attribute) and node.attr.startswith("cuda"):
                inner = isinstance(node.value, ast.Attribute) and node.value.attr.startswith("cuda")
                assert hasattr(getattr(runtime, node.value.attr) if inner else runtime, node.attr), node.attr
                named.add(node.attr)
    assert {"cudaMalloc", "cudaMemcpyAsync", "cudaGraphLaunch"} <= named


def test_no_gpu_is_one_line():
    runtime = pytest.importorskip("cuda.bindings.runtime", reason="pip install 'cfpp-rt[tensorrt]'")
    if runtime.cudaGetDeviceCount()[0] == runtime.cudaError_t.cudaSuccess:
        pytest.skip("this machine has a GPU")
    with pytest.raises(InputError, match="device 0 must be a CUDA GPU with its driver: CUDA error 35"):
        Device()


@pytest.mark.gpu
@pytest.mark.parametrize("refresh", ["fused", "separate"])
@pytest.mark.parametrize("library", ["tensorrt", "tensorrt-rtx"])
def test_engines_agree_with_onnx_runtime(tmp_path, source, library, refresh):
    pytest.importorskip(library.replace("-", "_"), reason=f"pip install {library}")
    build_engine_bundle(source, tmp_path / "bundle", {}, library=library, targets=("current",))
    runner = TensorRTRunner(tmp_path / "bundle", library=library)
    np.testing.assert_allclose(
        roll(source, runner, refresh=refresh),
        roll(source, OnnxRunner(source, threads=1), refresh=refresh),
        rtol=0,
        atol=2e-2,
    )
    runner.close()
