"""A bundle written before the names of the code changed still opens, and rolls out to the latents that it gave then."""

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("onnxruntime")

from cfpp_rt.core.camera import Cameras, walk
from cfpp_rt.export.bundle import Card, open_bundle
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.bundle_stream import BundleStream
from cfpp_rt.export.onnx_runner import OnnxRunner

DATA = Path(__file__).parents[1] / "data"
# Written by commit a00ac08: a model of random weights with text, actions and cameras, and a codec of patches.
FOLDER, LATENTS = DATA / "bundle_format_2", DATA / "bundle_format_2_latents.npy"
VIEWS = np.concatenate([np.eye(4)[None], walk([*"wlwaljwk"], np.eye(4))])
PROMPT_EMBEDS = np.random.default_rng(0).standard_normal((1, 4, 8), dtype=np.float32)


def test_its_card_is_read_and_written_as_it_was():
    bundle = open_bundle(FOLDER)
    assert bundle.card.config.first_steps == (1000, 750, 500) and bundle.card.latent_frames is None
    assert bundle.card.sizes.frames_per_block == 1 and bundle.card.sizes.slots == 4
    values = bundle.card.to_dict()
    assert Card.from_dict(values) == bundle.card
    assert list(values)[:3] == ["sizes", "rollout", "frames"] and "block" in values["sizes"]


@pytest.mark.parametrize("refresh", ["fused", "separate"])
def test_it_rolls_out_to_the_same_latents(refresh):
    rollout = BundleRollout(
        OnnxRunner(FOLDER, threads=1),
        PROMPT_EMBEDS,
        latent_frames=9,
        seed=7,
        cameras=Cameras.of(VIEWS, (0.6, 0.9)),
        refresh=refresh,
    )
    made = []
    for block in rollout:
        made.append(block.values)
        if block.start == 4:
            rollout.set_actions(2)
            rollout.set_cameras(Cameras.of(walk(["a", "i"], VIEWS[-1]), (0.5, 0.5)))
    np.testing.assert_allclose(np.concatenate(made, axis=1), np.load(LATENTS), rtol=0, atol=1e-4)


def test_it_decodes():
    stream = BundleStream(OnnxRunner(FOLDER, 1), PROMPT_EMBEDS, latent_frames=2, cameras=Cameras.of(VIEWS[:2]))
    assert [frames.pixels.shape for frames in stream] == [(1, 1, 16, 24, 3)] * 2
