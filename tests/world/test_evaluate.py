"""The measures themselves: the simulator's own frames score full marks, wrong ones lose where they are wrong."""

import numpy as np
import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.world import perception
from cfpp_rt.world.actions import parse_actions
from cfpp_rt.world.evaluate import Episodes, score
from cfpp_rt.world.policy import Wanderer
from cfpp_rt.world.simulator import INTERACT, RIGHT, UP, Simulator
from cfpp_rt.world.sprites import SPRITES, render


@pytest.fixture
def truth() -> Episodes:
    simulator, wanderer = Simulator(list(range(24))), Wanderer(0, 24)
    first, states, keys = simulator.state.copy(), [], []
    for _ in range(40):
        keys.append(wanderer(simulator.state))
        states.append(simulator.step(keys[-1]).copy())
    frames = np.stack([render(state) for state in states], axis=1)
    return Episodes(frames, states, np.stack(keys, axis=1), first, 1.0)


def test_states_are_read_from_frames(truth):
    for f, state in enumerate(truth.truth):
        seen = perception.read(truth.frames[:, f], state)
        for name in ("agent", "crate", "coin", "gate_open"):
            assert np.array_equal(getattr(seen, name), getattr(state, name)), (f, name)
        assert perception.artifact_score(truth.frames[:, f], seen).max() == 0


def test_the_simulators_own_frames_score_full_marks(truth):
    scores = score(truth)
    assert scores["follow"] == scores["follow_moving"] == scores["clean"] == 1
    assert scores["error_px"] == scores["error_16_px"] == 0 and scores["colour"] < 0.05


def test_a_frozen_frame_does_not_follow(truth):
    truth.frames[:] = render(truth.first_state)[:, None]
    scores = score(truth)
    assert scores["follow_moving"] == 0 and scores["error_px"] > 4 and scores["clean"] == 1


def test_a_doubled_agent_is_not_clean_and_a_faded_frame_changes_colour(truth):
    colours, covers = SPRITES["agent"]
    truth.frames[:12, 5:, 40:48, 40:48][:, :, covers] = colours[covers]
    assert score(truth)["clean"] < 0.8
    truth.frames[:, -30:] = (0.5 * truth.frames[:, -30:]).astype(np.uint8)
    assert score(truth)["colour"] > 0.2


def test_actions_as_text():
    assert parse_actions("right*3, up,interact*2") == [RIGHT] * 3 + [UP] + [INTERACT] * 2


@pytest.mark.parametrize("text", ["", "jump", "right*0", "right*-1", "right*", "right**2", "right up", "up*9999999"])
def test_bad_action_texts_name_the_part(text):
    with pytest.raises(InputError, match="actions must be names with counts"):
        parse_actions(text)
