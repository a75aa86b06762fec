"""Rollouts driven through the graphs in onnxruntime, without torch, against PyTorch and the published latents."""

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cfpp_rt.export.runner import Engine, EngineRollout
from cfpp_rt.export.to_onnx import export_onnx
from tests.test_rollout import ROLLOUTS, settings_of


@pytest.fixture(scope="module")
def engine_of(model, meta, tmp_path_factory):
    """The engine of a golden rollout's settings, exported once."""
    made = {}

    def get(name):
        if name not in made:
            entry, folder = meta[name], tmp_path_factory.mktemp("bundle") / name
            frames = entry["frames"] + (2 if name.startswith("i2v") else 0)
            settings = settings_of(entry, meta["shift"])
            export_onnx(model, settings, folder, latent_size=tuple(meta["latent_hw"]), frames=frames)
            made[name] = Engine(folder, threads=1)
        return made[name]

    return get


def roll(engine, vectors, name, refresh):
    noise, initial = vectors[f"{name}.noise"].numpy(), vectors.get(f"{name}.initial")
    given = [] if initial is None else [initial.numpy()]
    rollout = EngineRollout(
        engine,
        vectors["prompt_embeds"].numpy(),
        frames=noise.shape[1] + sum(part.shape[1] for part in given),
        initial=given[0] if given else None,
        noise=noise,
        renoise=[part.numpy() for part in vectors[f"{name}.renoise"]],
        refresh=refresh,
    )
    return np.concatenate([*given, *(block.values for block in rollout)], axis=1)


@pytest.mark.parametrize("refresh", ["fused", "separate"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_latents_equal_the_published_implementation(engine_of, vectors, name, refresh):
    latents = roll(engine_of(name), vectors, name, refresh)
    torch.testing.assert_close(torch.from_numpy(latents), vectors[f"{name}.latents"], rtol=0, atol=1e-4)
