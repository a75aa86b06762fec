"""One runner of a bundle in several threads, each with a rollout of its own; and one rollout in several threads."""

import threading

import numpy as np
import pytest

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from cfpp_rt.errors import InputError
from cfpp_rt.export.bundle_rollout import BundleRollout
from cfpp_rt.export.bundle_stream import BundleDecoder
from cfpp_rt.export.onnx_runner import OnnxRunner
from tests.export.students import TINY, WORLD, exported
from tests.test_one_stream_many_threads import in_thread

THREADS, ROUNDS, FRAMES = 3, 6, 8


@pytest.fixture(scope="module", params=["text", "actions"])
def bundle(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("shared") / "bundle"
    return exported(folder, TINY if request.param == "text" else WORLD, dtype="float32")


def prompt(runner, seed):
    model = runner.card.sizes.model
    if not model.text_len:
        return None
    return np.random.default_rng(seed).standard_normal((1, model.text_len, model.text_dim), np.float32)


def roll(runner, seed):
    rollout, made = BundleRollout(runner, prompt(runner, seed), latent_frames=FRAMES, seed=seed), []
    for block in rollout:
        made.append(block.values)
        if block.start == 3:
            rollout.set_actions(seed) if runner.card.sizes.model.num_actions else rollout.set_prompt(prompt(runner, 9))
    return np.concatenate(made, axis=1)


def test_threads_with_rollouts_of_their_own_share_a_runner(bundle):
    wanted = [roll(OnnxRunner(bundle, threads=1), seed) for seed in range(THREADS)]
    for _ in range(ROUNDS):
        runner, made, barrier = OnnxRunner(bundle, threads=1), {}, threading.Barrier(THREADS)

        def run(seed, runner=runner, made=made, barrier=barrier):
            barrier.wait()
            made[seed] = roll(runner, seed)

        threads = [threading.Thread(target=run, args=(seed,)) for seed in range(THREADS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for seed in range(THREADS):
            np.testing.assert_array_equal(made[seed], wanted[seed])


@pytest.mark.parametrize("name", ["next", "refresh"])
def test_a_second_call_of_a_rollout_is_refused_and_changes_nothing(bundle, name, monkeypatch):
    runner, results = OnnxRunner(bundle, threads=1), []
    wanted = roll(runner, 1)
    plain = BundleRollout._run

    def inside(self, graph, *arguments, **inputs):
        if len(results) < 5:
            results.append(in_thread(lambda: next(self) if name == "next" else self.refresh()))
        return plain(self, graph, *arguments, **inputs)

    monkeypatch.setattr(BundleRollout, "_run", inside)
    np.testing.assert_array_equal(roll(runner, 1), wanted)
    assert len(results) == 5 and all(isinstance(result, InputError) for result in results)


def test_controls_set_inside_a_block_are_those_of_the_next_block(bundle, monkeypatch):
    runner, plain = OnnxRunner(bundle, threads=1), BundleRollout._run

    def steer(rollout):
        if runner.card.sizes.model.num_actions:
            return rollout.set_actions(3)
        return rollout.set_prompt(prompt(runner, 9))

    def run(inside_of):
        passes, results = [], []

        def running(self, graph, *arguments, **inputs):
            passes.append(graph)
            if len(passes) == inside_of:
                results.append(in_thread(lambda: steer(self)))
            return plain(self, graph, *arguments, **inputs)

        monkeypatch.setattr(BundleRollout, "_run", running)
        rollout, made = BundleRollout(runner, prompt(runner, 1), latent_frames=FRAMES, seed=1), []
        for block in rollout:
            made.append(block.values)
            if inside_of is None and block.start == 2:
                steer(rollout)
        assert results == ([] if inside_of is None else [None])
        return np.concatenate(made, axis=1)

    wanted = run(None)
    for number in (5, 6):  # two passes per block
        np.testing.assert_array_equal(run(number), wanted)


def test_a_decoder_is_for_one_thread():
    class Card:
        codec = {"decode": None}

    class OneRunner:
        card, folder, lock = Card(), "bundle", threading.RLock()

        def session(self, name):
            raise AssertionError

    decoder = BundleDecoder(OneRunner())
    with decoder._in_use, pytest.raises(InputError, match="a decoder must be used by one call at a time"):
        decoder.decode(np.zeros((1, 1, 16, 4, 6), np.float32))
