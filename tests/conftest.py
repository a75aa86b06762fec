import json
import os
from pathlib import Path

# OpenMP reads these when torch loads it. The networks of the tests are tiny: more threads would wait for each other.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from safetensors.torch import load_file

from cfpp_rt.config import ModelConfig
from cfpp_rt.model.weights import build_model

DATA = Path(__file__).parent / "data"

# Without a GPU Triton's interpreter runs the kernels, on CPU tensors. It must be chosen before anything imports Triton,
# whose own functions are kernels, too; torch.compile is one that does.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA GPU"))


@pytest.fixture(scope="session")
def meta() -> dict:
    return json.loads((DATA / "meta.json").read_text())


@pytest.fixture(scope="session")
def config(meta) -> ModelConfig:
    return ModelConfig.from_dict(meta["config"])


@pytest.fixture(scope="session")
def weights() -> dict[str, torch.Tensor]:
    """The reference network's weights, float32."""
    return {name: t.float() for name, t in load_file(DATA / "weights.safetensors").items()}


@pytest.fixture(scope="session")
def vectors() -> dict[str, torch.Tensor]:
    return load_file(DATA / "vectors.safetensors")


@pytest.fixture(scope="session")
def model(weights, config):
    """The reference network in float32 on the CPU."""
    return build_model(weights, config, dtype=torch.float32, device="cpu")
