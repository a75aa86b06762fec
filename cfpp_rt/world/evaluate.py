"""Evaluation of a student of the world: its frames against the simulator, for many episodes at once."""

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

UNSEEN = 2**40  # training never uses seeds from here on
_FOLLOW_TOLERANCE = 1.2  # pixels per axis
ERROR_FRAMES = (16, 64, 128, 300)  # frames whose position error is reported, counted from 1
_MAX_CLEAN_SCORE = 30.0  # artifact score of a clean frame, of 255


@dataclasses.dataclass(frozen=True)
class Episodes:
    """Episodes that a student and the simulator have played with the same actions.

    frames: uint8 [B, F, 48, 48, 3], RGB, made by the student; without the given first frame.
    truth: F states of the simulator, one after each action.
    actions: int64 [B, F].
    first_state: state that the given frame shows.
    seconds: time the student took for all frames.
    """

    frames: NDArray[np.uint8]
    truth: list[State]
    actions: NDArray[np.int64]
    first_state: State
    seconds: float


def run_episodes(
    pipeline: Pipeline, config: RolloutConfig, *, episodes: int, num_frames: int, seed: int = 0, noise_seed: int = 0
) -> Episodes:
    """Let a wanderer choose actions, and run the simulator and the student with them.

    num_frames: frames per episode, a multiple of frames_per_block.
    seed: 0..2**20, seed of arenas and actions.
    noise_seed: seed of the student's noise.
    """
    seeds = [UNSEEN + seed * 4096 + episode for episode in range(episodes)]
    simulator, wanderer = Simulator(seeds), Wanderer(UNSEEN + seed, episodes)
    first_state = simulator.state.copy()
    truth, chosen = [], []
    for _ in range(num_frames):
        chosen.append(wanderer(simulator.state))
        truth.append(simulator.step(chosen[-1]).copy())
    actions = np.stack(chosen, axis=1)

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
    blocks, began = [], time.perf_counter()
    for begin in range(0, num_frames, n):
        stream.set_actions(torch.from_numpy(actions[:, begin : begin + n]))
        blocks.append(next(stream).pixels)
    return Episodes(torch.cat(blocks, dim=1).numpy(), truth, actions, first_state, time.perf_counter() - began)


def pace(pipeline: Pipeline, config: RolloutConfig, *, num_frames: int, seed: int = 0) -> dict[str, float]:
    """Measure the speed of one stream.

    Return first_ms, the time from the request to the first frame that the student made, and fps, the frames per second
    after it without any pauses.
    """
    began = time.perf_counter()
    stream = start(pipeline, UNSEEN + seed, config=config)
    next(stream)
    next(stream)
    first = time.perf_counter()
    made = sum(next(stream).pixels.shape[1] for _ in range(0, num_frames, config.frames_per_block))
    return {"first_ms": 1000 * (first - began), "fps": made / (time.perf_counter() - first)}


def score(episodes: Episodes) -> dict[str, float]:
    """Return the scores of episodes by name.

    follow: share of frames whose agent is within 1.2 pixels of its position after one step of the simulator from the
        state that the frame before shows.
    follow_moving: the same share of those frames in which the agent moves.
    error_px: mean distance in pixels, the larger of both axes, between the agent and that of the simulator's own run.
    error_N_px: the same at frame N of 16, 64, 128 and 300, counted from 1.
    clean: share of frames that show their state without artifacts (nothing doubled, faded or missing).
    colour: largest change of a colour channel's mean from the first 30 frames to the last 30, as a share of the former.
    """
    num_frames = episodes.frames.shape[1]
    followed, moving, errors, clean = [], [], [], []
    shown = episodes.first_state
    for f in range(num_frames):
        frames = episodes.frames[:, f]
        simulator = Simulator([0] * len(frames))
        simulator.state = shown.copy()
        wanted = simulator.step(episodes.actions[:, f]).agent
        position = perception.find(frames, "agent")
        followed.append(abs(position - STEP * wanted).max(axis=1) <= _FOLLOW_TOLERANCE)
        moving.append((wanted != shown.agent).any(axis=1))
        errors.append(abs(position - STEP * episodes.truth[f].agent).max(axis=1))
        shown = perception.read(frames, episodes.truth[f])
        clean.append(perception.artifact_score(frames, shown) < _MAX_CLEAN_SCORE)
    follow, moves, error = np.stack(followed), np.stack(moving), np.stack(errors)
    part = min(30, num_frames)
    begin, end = (episodes.frames[:, frame].mean(axis=(1, 2, 3)) for frame in (slice(0, part), slice(-part, None)))
    return {
        "follow": float(follow.mean()),
        "follow_moving": float(follow[moves].mean()) if moves.any() else float("nan"),
        "error_px": float(error.mean()),
        **{f"error_{n}_px": float(error[n - 1].mean()) for n in ERROR_FRAMES if n <= num_frames},
        "clean": float(np.mean(clean)),
        "colour": float((abs(end - begin) / begin).max()),
    }
