"""One stream in several threads: controls are taken once per block, and a second call that computes is refused."""

import threading
import time

import pytest
import torch

from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.camera import Cameras, parse_trajectory
from cfpp_rt.core.exclusive import Exclusive
from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import random_model
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.runtime.rollout_batch import RolloutBatch
from cfpp_rt.values import empty_prompt_embeds
from tests.test_actions import ACTING
from tests.test_stream import start as start_stream

RING = RolloutConfig(window=3)
BLOCKS = 5


def embeds_of(config, seed):
    return torch.randn(1, config.text_len, config.text_dim, generator=torch.Generator().manual_seed(seed))


def make(model, config=RING, **options):
    return Rollout(model, embeds_of(model.config, 1), config, latent_size=(8, 12), latent_frames=BLOCKS, **options)


def in_thread(call):
    """Run a call in another thread, as long as it takes; return its result or its exception."""
    made = []

    def run():
        try:
            made.append(call())
        except BaseException as error:
            made.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(timeout=60)
    return made[0]


def during_pass(model, number, call):
    """Run `call` in another thread inside pass `number` of the model; return its results, and the hook."""
    passes, results = [], []

    def inside(*_):
        passes.append(1)
        if len(passes) == number:
            results.append(in_thread(call))

    return results, model.register_forward_pre_hook(inside)


def latents_of(rollout):
    return torch.cat([block.values for block in rollout], dim=1)


def test_a_second_entry_is_refused_and_changes_nothing():
    guard = Exclusive("a thing")
    with guard:
        for call in (lambda: in_thread(guard.__enter__), guard.__enter__):
            with pytest.raises(InputError, match="a thing must be used by one call at a time"):
                if isinstance(result := call(), BaseException):
                    raise result
    with guard:
        pass


@pytest.mark.parametrize("refresh", ["fused", "separate"])
@pytest.mark.parametrize("number", [3, 4, 5])
def test_a_prompt_set_inside_a_block_is_that_of_the_next_block(model, refresh, number):
    config = RING.replace(refresh=refresh)
    clean = []
    for switch in range(BLOCKS):
        rollout = make(model, config)
        made = [next(rollout).values for _ in range(switch)]
        rollout.set_prompt(embeds_of(model.config, 2))
        clean.append(torch.cat([*made, latents_of(rollout)], dim=1))
    rollout = make(model, config)
    results, hook = during_pass(model, number, lambda: rollout.set_prompt(embeds_of(model.config, 2)))
    with hook:
        made = latents_of(rollout)
    assert results == [None]
    assert sum(torch.equal(made, wanted) for wanted in clean) == 1


@pytest.mark.parametrize("number", [3, 4])
def test_actions_set_inside_a_block_are_those_of_the_next_block(number):
    model = random_model(ACTING, seed=0, dtype=torch.float32)

    def run(script):
        rollout = Rollout(
            model, empty_prompt_embeds(1, ACTING.text_dim), RING, latent_size=(4, 4), latent_frames=BLOCKS, seed=0
        )
        made = []
        for action in script:
            if action is not None:
                rollout.set_actions(action)
            made.append(next(rollout).values)
        return rollout, made

    wanted = torch.cat(run([0, 0, 2, 2, 2])[1], dim=1)
    rollout, made = run([0])
    results, hook = during_pass(model, number - 2, lambda: rollout.set_actions(2))
    with hook:
        made += [block.values for block in rollout]
    assert results == [None] and torch.equal(torch.cat(made, dim=1), wanted)


def test_cameras_set_inside_a_block_begin_with_the_next_block(config):
    import dataclasses

    camera_model = random_model(dataclasses.replace(config, camera=True), seed=0, dtype=torch.float32)
    first, second = (Cameras.of(parse_trajectory(text)) for text in ("w*4", "j*3"))
    clean = make(camera_model, cameras=first)
    made = [next(clean).values, next(clean).values]
    clean.set_cameras(second)
    wanted = torch.cat([*made, latents_of(clean)], dim=1)
    rollout = make(camera_model, cameras=first)
    results, hook = during_pass(camera_model, 3, lambda: rollout.set_cameras(second))
    with hook:
        assert torch.equal(latents_of(rollout), wanted) and results == [None]


CALLS = {
    "next": lambda rollout, embeds: next(rollout),
    "refresh": lambda rollout, embeds: rollout.refresh(),
    "require_finite": lambda rollout, embeds: rollout.require_finite(),
    "recache": lambda rollout, embeds: rollout.set_prompt(embeds, recache=True),
    "close": lambda rollout, embeds: rollout.close(),
}


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("refresh", ["fused", "separate"])
def test_a_call_that_computes_is_refused_inside_a_block(model, name, refresh):
    plain = latents_of(make(model, RING.replace(refresh=refresh)))
    rollout = make(model, RING.replace(refresh=refresh))
    results, hook = during_pass(model, 4, lambda: CALLS[name](rollout, embeds_of(model.config, 2)))
    with hook:
        made = latents_of(rollout)
    assert isinstance(results[0], InputError) and "one call at a time" in str(results[0])
    assert torch.equal(made, plain)


STREAM_CALLS = {
    "next": lambda stream, embeds: next(stream),
    "refresh": lambda stream, embeds: stream.refresh(),
    "recache": lambda stream, embeds: stream.set_prompt(prompt_embeds=embeds, recache=True),
}


@pytest.mark.parametrize("name", STREAM_CALLS)
def test_a_second_call_of_a_stream_is_refused_also_while_it_decodes(model, name):
    plain = torch.cat([frames.pixels for frames in start_stream(model, 4)], dim=1)
    stream, results = start_stream(model, 4), []
    decode = stream._decoder.decode

    def slow(latents):
        results.append(in_thread(lambda: STREAM_CALLS[name](stream, embeds_of(model.config, 2))))
        return decode(latents)

    stream._decoder.decode = slow
    made = torch.cat([frames.pixels for frames in stream], dim=1)
    assert len(results) == 4 and all("one call at a time" in str(result) for result in results)
    assert torch.equal(made, plain)


def test_a_batch_refuses_a_second_step_and_its_rollouts_calls_of_their_own(model):
    def run(call=None):
        batch = RolloutBatch(model, RING, latent_size=(8, 12), latent_frames=BLOCKS, rows=3)
        members = [batch.add(embeds_of(model.config, seed), seed=seed) for seed in (1, 2)]
        results, hook = during_pass(model, 4, lambda: call(batch, members[1])) if call else ([], None)
        made = {member: [] for member in members}
        while batch.rollouts:
            for member, block in batch.step().items():
                made[member].append(block.values)
        if hook is not None:
            hook.remove()
        return results, torch.cat([torch.cat(blocks, dim=1) for blocks in made.values()])

    _, plain = run()
    for call in (
        lambda batch, member: batch.step(),
        lambda batch, member: batch.add(embeds_of(model.config, 3)),
        lambda batch, member: batch.remove(member),
        lambda batch, member: next(member),
        lambda batch, member: member.refresh(),
    ):
        results, made = run(call)
        assert "one call at a time" in str(results[0]) and torch.equal(made, plain)


def test_a_step_that_is_refused_leaves_the_batch_alive(model):
    batch = RolloutBatch(model, RING, latent_size=(8, 12), latent_frames=BLOCKS, rows=2)
    members = [batch.add(embeds_of(model.config, seed), seed=seed) for seed in (1, 2)]
    with members[1].in_use, pytest.raises(InputError, match="one call at a time"):
        batch.step()
    assert set(batch.step()) == set(members)


def test_a_storm_of_prompts_gives_one_prompt_per_block(model):
    """Another thread sets prompts as fast as it can: every block is one that a clean switch before it would give."""
    texts, running = [embeds_of(model.config, seed) for seed in (1, 2)], threading.Event()
    rollout = Rollout(model, texts[0], RolloutConfig(window=1), latent_size=(8, 12), latent_frames=12, seed=0)
    running.set()

    def storm():
        while running.is_set():
            for text in texts:
                rollout.set_prompt(text)
                time.sleep(0.0005)

    thread = threading.Thread(target=storm)
    thread.start()
    try:
        made = [block.values for block in rollout]
    finally:
        running.clear()
        thread.join()
    for index, text in enumerate(texts):  # with a window of one block no block depends on another
        clean = Rollout(model, text, RolloutConfig(window=1), latent_size=(8, 12), latent_frames=12, seed=0)
        wanted = [block.values for block in clean]
        texts[index] = wanted
    for number, values in enumerate(made):
        assert any(torch.allclose(values, wanted[number], rtol=0, atol=2e-5) for wanted in texts), number


def test_threads_share_a_pipeline_and_its_codec(model):
    """Rows `Pipeline`, codecs and `CausalWanTransformer` of the table in docs/api.md."""
    from cfpp_rt.pipeline import Pipeline

    pipeline = Pipeline(model, shared_codec(), config=RING)

    def run(seed):
        return pipeline.generate(
            prompt_embeds=embeds_of(model.config, seed), num_frames=4, height=32, width=48, seed=seed
        ).pixels

    wanted = [run(seed) for seed in range(3)]
    made = {}
    threads = [threading.Thread(target=lambda s=seed: made.update({s: run(s)})) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(made[seed], wanted[seed]) for seed in range(3))


def shared_codec():
    from cfpp_rt.world.codec import CHANNELS, PatchCodec

    generator = torch.Generator().manual_seed(5)
    basis = torch.linalg.qr(torch.randn(192, CHANNELS, generator=generator))[0]
    return PatchCodec(torch.zeros(192), basis, torch.ones(CHANNELS))


def test_threads_share_a_text_encoder_and_its_moves():
    """Row `TextEncoder`: the encoder never moves to the host while another thread encodes with it."""
    from types import SimpleNamespace

    from cfpp_rt.pipeline import Pipeline
    from cfpp_rt.text import TextEncoder

    inside, most = [], []

    class Slow(TextEncoder):
        def __init__(self):
            self.where = "cpu"

        def to(self, device):
            assert not inside, "moved while another thread encodes"
            self.where = str(device)

        def __call__(self, prompts):
            inside.append(1)
            most.append(len(inside))
            time.sleep(0.01)
            inside.pop()
            return torch.zeros(len(prompts), 1, 1)

    fake = SimpleNamespace(device=torch.device("cpu"), dtype=torch.float32, config=None)
    pipeline = Pipeline(fake, None, Slow(), RING, offload_text=True)
    made = []
    threads = [threading.Thread(target=lambda: made.append(pipeline.encode_prompt(["a"]))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 4 and max(most) == 1
