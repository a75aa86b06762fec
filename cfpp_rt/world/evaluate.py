"""How well a student keeps to the world's rules: its pictures against the simulator, over many episodes at once."""

import dataclasses
import time

import numpy as np
import torch
from numpy.typing import NDArray

from cfpp_rt.config import RolloutConfig
from cfpp_rt.pipeline import Pipeline
from cfpp_rt.values import empty_prompt_embeds
from cfpp_rt.world import perception
from cfpp_rt.world.policy import Wanderer
from cfpp_rt.world.simulator import Simulator, State
from cfpp_rt.world.sprites import SIZE, STEP
from cfpp_rt.world.student import first_frames, start

UNSEEN = 2**40  # seeds from here on are never drawn for training
_FOLLOWED = 1.2  # pixels per axis
ERROR_FRAMES = (16, 64, 128, 300)  # frames whose position error is told, counted from 1
_CLEAN = 30.0  # worst tile's root mean square difference, of 255


@dataclasses.dataclass(frozen=True)
class Episodes:
    """What was played. pictures: uint8 [B, F, 48, 48, 3]; truth: the simulator's state after each; actions [B, F].

    The given first picture is not among them. seconds: spent making all of it.
    """

    frames: NDArray[np.uint8]
    truth: list[State]
    actions: NDArray[np.int64]
    first: State
    seconds: float


def run_episodes(
    pipeline: Pipeline, config: RolloutConfig, *, episodes: int, num_frames: int, seed: int = 0, noise_seed: int = 0
) -> Episodes:
    """Let a wanderer play the student and the simulator with the same keys. num_frames: a multiple of the block.

    seed: which episodes and keys, 0..2**20; noise_seed: the student's noise.
    """
    seeds = [UNSEEN + seed * 4096 + episode for episode in range(episodes)]
    simulator, wanderer = Simulator(seeds), Wanderer(UNSEEN + seed, episodes)
    first = simulator.state.copy()
    truth, actions_ = [], []
    for _ in range(num_frames):
        actions_.append(wanderer(simulator.state))
        truth.append(simulator.step(actions_[-1]).copy())
    actions = np.stack(actions_, axis=1)

    n = config.frames_per_block
    stream = pipeline.stream(
        prompt_embeds=empty_prompt_embeds(episodes, pipeline.model.config.text_dim),
        num_frames=None,
        height=SIZE,
        width=SIZE,
        seed=[noise_seed * episodes + episode for episode in range(episodes)],
        initial_frames=first_frames(seeds, n),
        config=config,
    )
    next(stream)
    made, began = [], time.perf_counter()
    for begin in range(0, num_frames, n):
        stream.set_actions(torch.from_numpy(actions[:, begin : begin + n]))
        made.append(next(stream).pixels)
    return Episodes(torch.cat(made, dim=1).numpy(), truth, actions, first, time.perf_counter() - began)


def pace(pipeline: Pipeline, config: RolloutConfig, *, num_frames: int, seed: int = 0) -> dict[str, float]:
    """One player alone: first_ms from the request to the first picture that the student made, then fps, the pictures
    per second that it makes when nobody waits.
    """
    began = time.perf_counter()
    stream = start(pipeline, UNSEEN + seed, config=config)
    next(stream)
    next(stream)
    first = time.perf_counter()
    made = sum(next(stream).pixels.shape[1] for _ in range(0, num_frames, config.frames_per_block))
    return {"first_ms": 1000 * (first - began), "fps": made / (time.perf_counter() - first)}


def score(episodes_: Episodes) -> dict[str, float]:
    """Scores of a play.

    follow: share of frames whose agent is within 1.2 pixels of where the simulator puts it after the state seen in the
    frame before. follow_moving: of those in which it moves. error_px: mean distance of the agent from the simulator's
    own run, the larger of both axes; error_N_px: at frame N, of 16, 64, 128 and 300, counted from 1. clean: share of
    frames that are a clean drawing of the state they show (nothing doubled, faded or gone). colour: largest change of
    a colour channel's mean from the first 30 frames' to the last 30 frames', as a share of the first.
    """
    num_frames = episodes_.frames.shape[1]
    followed, moving, errors, clean = [], [], [], []
    shown = episodes_.first
    for f in range(num_frames):
        frames = episodes_.frames[:, f]
        simulator = Simulator([0] * len(frames))
        simulator.state = shown.copy()
        wanted = simulator.step(episodes_.actions[:, f]).agent
        position = perception.find(frames, "agent")
        followed.append(abs(position - STEP * wanted).max(axis=1) <= _FOLLOWED)
        moving.append((wanted != shown.agent).any(axis=1))
        errors.append(abs(position - STEP * episodes_.truth[f].agent).max(axis=1))
        shown = perception.read(frames, episodes_.truth[f])
        clean.append(perception.artifact_score(frames, shown) < _CLEAN)
    follow, moves, error = np.stack(followed), np.stack(moving), np.stack(errors)
    part = min(30, num_frames)
    begin, end = (episodes_.frames[:, frame].mean(axis=(1, 2, 3)) for frame in (slice(0, part), slice(-part, None)))
    return {
        "follow": float(follow.mean()),
        "follow_moving": float(follow[moves].mean()) if moves.any() else float("nan"),
        "error_px": float(error.mean()),
        **{f"error_{n}_px": float(error[n - 1].mean()) for n in ERROR_FRAMES if n <= num_frames},
        "clean": float(np.mean(clean)),
        "colour": float((abs(end - begin) / begin).max()),
    }
