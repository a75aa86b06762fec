"""The rollout against the published implementation's latents, against full recomputation, and against itself."""

import pytest
import torch

from cfpp_rt.cache import CacheShape, KVCache
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.core.schedule import FlowMatchSchedule
from cfpp_rt.errors import InputError, NonFiniteError, OutOfMemoryError
from cfpp_rt.model.attention import AttentionMetadata
from cfpp_rt.model.weights import build_model
from cfpp_rt.runtime.rollout import Rollout
from tests import plain_model

ROLLOUTS = [
    "framewise_2step",
    "framewise_1step",
    "framewise_4step",
    "chunkwise_4step",
    "framewise_2step_window",
    "framewise_2step_window_nosink",
    "i2v_2step",
    "context_noise_2step",
]


def settings_of(entry: dict, shift: float, refresh: str = "separate") -> RolloutConfig:
    first = entry["first_chunk_steps"]
    return RolloutConfig(
        steps=tuple(entry["steps"]),
        first_steps=tuple(first) if first else None,
        frames_per_block=entry["frames_per_block"],
        window=None if entry["local_attn_size"] == -1 else entry["local_attn_size"],
        sinks=entry["sink_size"],
        shift=shift,
        context_noise=entry["context_noise"],
        refresh=refresh,
    )


def run(model, config, vectors, name, dtype=torch.float32):
    noise = vectors[f"{name}.noise"]
    initial = vectors.get(f"{name}.initial")
    rollout = Rollout(
        model,
        vectors["prompt_embeds"],
        config,
        latent_size=tuple(noise.shape[-2:]),
        latent_frames=noise.shape[1] + (0 if initial is None else initial.shape[1]),
        initial_latents=initial,
        noise=noise,
        renoise=list(vectors[f"{name}.renoise"]),
    )
    made = [block.values for block in rollout]
    return torch.cat(made if initial is None else [initial, *made], dim=1)


@pytest.mark.parametrize("refresh", ["fused", "separate"])
@pytest.mark.parametrize("name", ROLLOUTS)
def test_latents_equal_the_published_implementation(model, vectors, meta, name, refresh):
    latents = run(model, settings_of(meta[name], meta["shift"], refresh), vectors, name)
    torch.testing.assert_close(latents, vectors[f"{name}.latents"], rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", ROLLOUTS)
def test_fused_refresh_equals_separate(model, vectors, meta, name):
    fused, separate = (
        run(model, settings_of(meta[name], meta["shift"], r), vectors, name) for r in ("fused", "separate")
    )
    torch.testing.assert_close(fused, separate, rtol=0, atol=2e-5)


def test_skipping_the_refresh_is_another_result(model, vectors, meta):
    name = "framewise_2step"
    skipped = run(model, settings_of(meta[name], meta["shift"], "skip"), vectors, name)
    assert (skipped[:, 0] - vectors[f"{name}.latents"][:, 0]).abs().max() < 2e-4, "the first block needs no refresh"
    assert (skipped - vectors[f"{name}.latents"]).abs().max() > 1e-3


def test_single_passes_and_caches_equal_the_published_implementation(model, vectors, meta):
    """Frame 0 at t = 1000, frame 1 at t = 0, cache contents after both."""
    height, width = meta["latent_hw"]
    tokens = meta["frame_tokens"]
    ring = FrameRing(0, 3, 1)
    cache = KVCache(CacheShape.of(model.config, 1, 3, tokens), ring, torch.float32, "cpu")
    cache.data.fill_(float("nan"))
    tables = model.rotary_tables(height, width)
    text = model.embed_text(vectors["prompt_embeds"])
    schedule = FlowMatchSchedule(meta["shift"])
    for frame, name in enumerate(("pass0", "pass1")):
        slot = ring.write(frame)
        place = AttentionMetadata(
            write_index=torch.tensor([[slot * tokens]], dtype=torch.int32),
            ranges=cache.token_ranges([ring.visible(frame + 1, None)]),
            rope_time=tables.time([frame])[None],
            rope_rows=tables.rows,
            rope_columns=tables.columns,
        )
        t = vectors[f"{name}.timestep"][0]
        flow = model(vectors[f"{name}.latent"], model.embed_time(t), text, cache, place)
        torch.testing.assert_close(flow, vectors[f"{name}.flow"], rtol=0, atol=2e-5)
        x0 = vectors[f"{name}.latent"] - schedule.sigma(t).item() * flow
        torch.testing.assert_close(x0, vectors[f"{name}.x0"], rtol=0, atol=2e-5)
    used = 2 * tokens
    for ours, theirs in ((0, "pass.k_cache"), (1, "pass.v_cache")):
        expected = vectors[theirs].transpose(2, 3)[..., :used, :]
        torch.testing.assert_close(cache.data[:, ours, :, :, :used], expected, rtol=0, atol=2e-5)
    assert cache.data[..., used:, :].isnan().all(), "nothing is written beyond the frame's slot"


@pytest.mark.parametrize("name", ["framewise_2step_window", "chunkwise_4step", "context_noise_2step"])
def test_cached_rollout_equals_full_recompute_and_bfloat16_errs_no_more_than_plain(
    weights, config, vectors, meta, name
):
    """float64 recomputation is the oracle; bfloat16 may err at most twice as much as plain PyTorch in bfloat16."""
    entry = meta[name]
    settings = settings_of(entry, meta["shift"], "fused")
    schedule = FlowMatchSchedule(meta["shift"])

    def plain(dtype):
        return plain_model.rollout(
            weights,
            config,
            settings,
            vectors[f"{name}.noise"],
            vectors[f"{name}.renoise"],
            vectors["prompt_embeds"],
            schedule.warp(settings.steps).tolist(),
            schedule.warp(settings.first_steps or settings.steps).tolist(),
            lambda t: schedule.sigma(t).item(),
            dtype,
        ).double()

    oracle = plain(torch.float64)
    exact = build_model(weights, config, dtype=torch.float32, device="cpu")
    assert (run(exact, settings, vectors, name).double() - oracle).abs().max() < 2e-4
    half = build_model(weights, config, dtype=torch.bfloat16, device="cpu")
    ours = (run(half, settings, vectors, name).double() - oracle).abs()
    theirs = (plain(torch.bfloat16) - oracle).abs()
    assert ours.max() <= 2 * theirs.max() and ours.mean() <= 2 * theirs.mean()


def roll(model, meta, config, frames, *, batch=1, seed=0, embeds=None, **options):
    c = model.config
    if embeds is None:
        embeds = torch.randn(batch, c.text_len, c.text_dim, generator=torch.Generator().manual_seed(9))
    return Rollout(
        model, embeds, config, latent_size=tuple(meta["latent_hw"]), latent_frames=frames, seed=seed, **options
    )


def latents_of(rollout):
    return torch.cat([block.values for block in rollout], dim=1)


def test_float16_runs(weights, config, vectors, meta):
    half = build_model(weights, config, dtype=torch.float16, device="cpu")
    name = "framewise_2step"
    latents = run(half, settings_of(meta[name], meta["shift"]), vectors, name)
    assert (latents - vectors[f"{name}.latents"]).abs().mean() < 0.02


def test_seeds_reproduce_and_rows_do_not_depend_on_the_batch(model, meta):
    config = RolloutConfig(window=3, sinks=1)
    embeds = torch.randn(1, model.config.text_len, model.config.text_dim).expand(3, -1, -1)
    together = latents_of(roll(model, meta, config, 5, embeds=embeds, seed=[4, 7, 4]))
    assert torch.equal(together, latents_of(roll(model, meta, config, 5, embeds=embeds, seed=[4, 7, 4])))
    alone = latents_of(roll(model, meta, config, 5, embeds=embeds[:1], seed=7))
    torch.testing.assert_close(together[1:2], alone, rtol=0, atol=2e-5)
    torch.testing.assert_close(together[0], together[2], rtol=0, atol=2e-5)
    assert (together[0] - together[1]).abs().max() > 0.1


def test_two_thousand_frames(model, meta):
    """No end in sight: positions past the published table's 1024 frames, finite values, memory that does not grow."""
    psutil = pytest.importorskip("psutil")
    rollout = roll(model, meta, RolloutConfig(window=6, sinks=1), None)
    assert rollout.cache.data.shape[-2] == (6 + 1) * meta["frame_tokens"], "the window and one spare slot"
    allocation, held = rollout.cache.data.data_ptr(), {}
    for frame in range(2000):
        block = next(rollout)
        assert block.start == frame and block.values.isfinite().all()
        if frame in (200, 1999):
            held[frame] = psutil.Process().memory_info().rss
    assert (
        rollout.cache.data.data_ptr() == allocation
        and len(rollout._finished_blocks) <= 7
        and len(rollout._builder.time_embeddings) <= 4
    )
    assert held[1999] - held[200] < 8 << 20


@pytest.mark.parametrize("refresh", ["fused", "separate", "skip"])
@pytest.mark.parametrize("recache", [False, True])
def test_prompt_switch(model, meta, refresh, recache):
    config = RolloutConfig(window=4, sinks=1, refresh=refresh)
    first, second = (
        torch.randn(1, model.config.text_len, model.config.text_dim, generator=torch.Generator().manual_seed(s))
        for s in (1, 2)
    )
    steady = latents_of(roll(model, meta, config, 8, embeds=first))
    rollout = roll(model, meta, config, 8, embeds=first)
    before = torch.cat([next(rollout).values for _ in range(5)], dim=1)
    rollout.set_prompt(second, recache=recache)
    after = latents_of(rollout)
    assert torch.equal(before, steady[:, :5]) and after.shape[1] == 3
    assert (after - steady[:, 5:]).abs().max() > 1e-3


@pytest.mark.parametrize("recache", [False, True])
def test_prompt_switch_does_not_depend_on_the_refresh_mode(model, meta, recache):
    made = []
    for refresh in ("fused", "separate"):
        rollout = roll(model, meta, RolloutConfig(window=4, sinks=1, refresh=refresh), 8)
        blocks = [next(rollout).values for _ in range(5)]
        embeds = torch.ones(1, model.config.text_len, model.config.text_dim)
        rollout.set_prompt(embeds, recache=recache)
        made.append(torch.cat([*blocks, latents_of(rollout)], dim=1))
    torch.testing.assert_close(*made, rtol=0, atol=2e-5)


def test_recached_window_is_that_of_a_rollout_under_the_new_prompt(model, meta):
    """With everything visible, re-caching gives the keys of clean passes over the same frames under the new prompt."""
    embeds = torch.ones(1, model.config.text_len, model.config.text_dim)
    rollout = roll(model, meta, RolloutConfig(), 6)
    frames = torch.cat([next(rollout).values for _ in range(4)], dim=1)
    rollout.set_prompt(embeds, recache=True)
    prefilled = roll(model, meta, RolloutConfig(), 6, embeds=embeds, initial_latents=frames)
    used = 4 * meta["frame_tokens"]
    torch.testing.assert_close(
        rollout.cache.data[..., :used, :], prefilled.cache.data[..., :used, :], rtol=0, atol=2e-5
    )


def test_refresh_may_run_early(model, meta):
    """Idle time between frames can be spent on the clean pass; the video is the same."""
    config = RolloutConfig(window=3, refresh="fused")
    plain = latents_of(roll(model, meta, config, 6))
    rollout = roll(model, meta, config, 6)
    made = []
    for block in rollout:
        made.append(block.values)
        rollout.refresh()
    torch.testing.assert_close(torch.cat(made, dim=1), plain, rtol=0, atol=2e-5)


def test_the_last_refresh_is_not_run(model, meta):
    calls = []
    handle = model.patch_embedding.register_forward_hook(lambda *_: calls.append(1))
    try:
        for refresh, passes in (("separate", 4 + 1 + 2 + 1 + 2), ("fused", 4 + 2 + 2), ("skip", 4 + 2 + 2)):
            calls.clear()
            config = RolloutConfig(first_steps=(1000, 750, 500, 250), refresh=refresh)
            latents_of(roll(model, meta, config, 3))
            assert len(calls) == passes
    finally:
        handle.remove()


def test_unused_cache_rows_are_never_read(model, meta):
    """A poisoned cache changes nothing: every key that is read was written before."""
    config = RolloutConfig(window=4, sinks=1)
    clean = latents_of(roll(model, meta, config, 8))
    rollout = roll(model, meta, config, 8)
    rollout.cache.data.fill_(float("nan"))
    assert torch.equal(latents_of(rollout), clean)


def test_non_finite_values_are_located(weights, config, meta):
    broken = build_model({k: v.clone() for k, v in weights.items()}, config, dtype=torch.float32, device="cpu")
    rollout = roll(broken, meta, RolloutConfig(), 4)
    next(rollout)
    broken.blocks[1].ffn[2].bias[3] = float("nan")
    with pytest.raises(NonFiniteError, match="latent frame 1, step 1, layer 1"):
        next(rollout)


def test_a_cache_that_does_not_fit_says_what_would(model, meta, monkeypatch):
    per_frame = CacheShape.of(model.config, 1, 1, meta["frame_tokens"]).bytes(torch.float32)
    monkeypatch.setattr("cfpp_rt.cache.available_bytes", lambda device: (256 << 20) + 10 * per_frame)
    with pytest.raises(OutOfMemoryError, match="KV cache of 50 latent frames.*a window of 9 latent frames fits"):
        roll(model, meta, RolloutConfig(), 50)
    assert latents_of(roll(model, meta, RolloutConfig(window=9), 50)).shape[1] == 50


@pytest.mark.parametrize(
    "options,message",
    [
        ({"frames": 0}, "latent_frames must be a multiple >= 1"),
        ({"frames": 4, "config": RolloutConfig(frames_per_block=3)}, "multiple >= 3 of frames_per_block=3, got 4"),
        ({"frames": None}, "window must be given"),
        ({"frames": 2, "initial_latents": torch.zeros(1, 2, 16, 8, 12)}, "fewer than latent_frames=2, got 2"),
        ({"frames": 3, "initial_latents": torch.zeros(1, 1, 16, 8, 8)}, "initial_latents must be"),
        ({"frames": 3, "seed": [1, 2]}, "seed must be one integer or 1 of them, got 2"),
        ({"frames": 3, "seed": -1}, "seed must be in 0"),
        ({"frames": 3, "seed": 1.5}, "seed must be an integer"),
        ({"frames": 3, "noise": torch.zeros(1, 2, 16, 8, 12)}, "noise must cover the 3 generated frames, got 2"),
        (
            {"frames": 3, "initial_latents": torch.full((1, 1, 16, 8, 12), float("nan"))},
            "initial_latents must be finite",
        ),
        ({"frames": 3, "initial_latents": torch.zeros(16, 8, 12)}, "initial_latents must be"),
        ({"frames": 3, "noise": torch.zeros(1, 3, 16, 4, 4)}, "noise must be"),
        ({"frames": 3, "embeds": torch.zeros(1, 3, 5)}, r"prompt_embeds must be \[B, 16, 32\], got \[1, 3, 5\]"),
    ],
)
def test_bad_arguments_are_named(model, meta, options, message):
    options = {"config": RolloutConfig(), **options}
    with pytest.raises(InputError, match=message):
        roll(model, meta, options.pop("config"), options.pop("frames"), **options)


def test_too_little_explicit_noise_is_an_error(model, meta):
    rollout = roll(model, meta, RolloutConfig(), 2, noise=torch.randn(1, 2, 16, 8, 12), renoise=[])
    with pytest.raises(InputError, match="renoise"):
        next(rollout)
    with pytest.raises(InputError, match="broke off at latent frame 0: start another"):
        next(rollout)
    endless = RolloutConfig(steps=(1000,), window=3)
    rollout = roll(model, meta, endless, None, noise=torch.randn(1, 2, 16, 8, 12))
    next(rollout), next(rollout)
    with pytest.raises(InputError, match="noise must cover 3"):
        next(rollout)


def test_a_refused_prompt_switch_changes_nothing(model, meta):
    config = RolloutConfig(window=4, sinks=1)
    plain = latents_of(roll(model, meta, config, 5))
    rollout = roll(model, meta, config, 5)
    made = [next(rollout).values, next(rollout).values]
    with pytest.raises(InputError, match="prompt_embeds must be"):
        rollout.set_prompt(torch.randn(1, 3, 16), recache=True)
    assert torch.equal(torch.cat([*made, latents_of(rollout)], dim=1), plain)


def test_what_is_yielded_is_the_callers_to_change(model, meta):
    config = RolloutConfig(window=4, sinks=1)
    plain = latents_of(roll(model, meta, config, 5))
    made = []
    with torch.inference_mode():
        for block in roll(model, meta, config, 5):
            made.append(block.values.clone())
            block.values.zero_()
    assert torch.equal(torch.cat(made, dim=1), plain)


@pytest.mark.parametrize("window,block", [(None, 1), (4, 3)])
def test_recaching_under_the_same_prompt_changes_nothing(model, meta, window, block):
    """Given frames keep their own timestep, and a block that the window cuts still sees itself."""
    config = RolloutConfig(frames_per_block=block, window=window, context_noise=300)
    embeds = torch.ones(1, model.config.text_len, model.config.text_dim)
    initial = torch.randn(1, block, 16, 8, 12, generator=torch.Generator().manual_seed(1))
    made = []
    for recache in (False, True):
        rollout = roll(model, meta, config, 3 * block, embeds=embeds, initial_latents=initial)
        if recache:
            rollout.set_prompt(embeds, recache=True)
        made.append(latents_of(rollout))
    torch.testing.assert_close(*made, rtol=0, atol=2e-5)


def test_seeds_use_all_their_bits(model, meta):
    made = [latents_of(roll(model, meta, RolloutConfig(steps=(1000,)), 1, seed=s)) for s in (0, 2**31, 2**40)]
    assert not torch.equal(made[0], made[1]) and not torch.equal(made[0], made[2])


def test_latent_size_must_fit_the_patch(model, meta):
    with pytest.raises(InputError, match="multiple of the patch 2x2, got 7x12"):
        roll(model, {**meta, "latent_hw": (7, 12)}, RolloutConfig(), 3)
