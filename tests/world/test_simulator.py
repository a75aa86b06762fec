"""The world's rules: what must hold in every episode, and what each action does."""

import numpy as np
import pytest

from cfpp_rt.errors import InputError
from cfpp_rt.world.policy import Wanderer
from cfpp_rt.world.simulator import DOWN, INTERACT, LEFT, NONE, RIGHT, UP, Simulator, State
from cfpp_rt.world.sprites import SIZE, SPRITES, STEP, TILE, render


def arena(agent, crate=(8, 8), gate=(0, 5), coin=(5, 0), walls=(), gate_open=False) -> Simulator:
    """One episode put together by hand; positions as in `State`."""
    simulator = Simulator([0])
    tiles = np.zeros((1, 6, 6), dtype=bool)
    for tile in walls:
        tiles[0][tile] = True
    parts = (np.array([part]) for part in (gate, gate_open, coin, agent, crate))
    simulator.state = State(tiles, *parts)
    return simulator


def play(simulator, *actions):
    for action in actions:
        simulator.step(np.array([action]))
    return simulator.state


def overlap(one, other):
    return (abs(one - other) < 2).all(axis=1)


def test_episodes_are_made_by_their_seeds_alone():
    together = Simulator([5, 6, 7])
    alone = Simulator([6])
    moves = np.random.default_rng(0).integers(0, 6, (200, 3))
    for actions in moves:
        together.step(actions)
        alone.step(actions[1:2])
        assert np.array_equal(render(together.state)[1:2], render(alone.state))
    assert not np.array_equal(render(together.state)[0], render(together.state)[2])


def test_what_must_hold_holds():
    simulator, wanderer = Simulator(list(range(64))), Wanderer(0, 64)
    rows, taken, pushed = np.arange(64), 0, 0
    for _ in range(300):
        before = simulator.state.copy()
        state = simulator.step(wanderer(simulator.state))
        blocked = state.walls.copy()
        blocked[rows, state.gate[:, 0], state.gate[:, 1]] |= ~state.gate_open
        cells = blocked.repeat(2, 1).repeat(2, 2)
        for thing in (state.agent, state.crate):
            assert thing.min() >= 0 and thing.max() <= 10
            for y, x in ((0, 0), (0, 1), (1, 0), (1, 1)):
                assert not cells[rows, thing[:, 0] + y, thing[:, 1] + x].any()
        assert not overlap(state.agent, state.crate).any()
        assert not overlap(2 * state.coin, state.agent).any() and not overlap(2 * state.coin, state.crate).any()
        assert not state.walls[rows, state.coin[:, 0], state.coin[:, 1]].any()
        assert (abs(state.agent - before.agent).sum(axis=1) <= 1).all()
        taken += (state.coin != before.coin).any(axis=1).sum()
        pushed += (state.crate != before.crate).any(axis=1).sum()
    assert taken > 50 and pushed > 100, "the wanderer must meet coins and crates"


def test_arrows_move_half_a_tile_and_the_edge_stops():
    assert play(arena((0, 0)), UP, LEFT).agent.tolist() == [[0, 0]]
    assert play(arena((0, 0)), DOWN, RIGHT, RIGHT, NONE).agent.tolist() == [[1, 2]]


def test_walls_stop_even_half_a_tile():
    walls = [(1, 2)]
    assert play(arena((1, 2), walls=walls), RIGHT).agent.tolist() == [[1, 2]]
    assert play(arena((0, 2), walls=walls), RIGHT, RIGHT).agent.tolist() == [[0, 4]]


def test_the_crate_is_pushed_until_something_stops_it():
    simulator = arena((4, 2), crate=(4, 4), walls=[(2, 4)])
    assert play(simulator, RIGHT, RIGHT).crate.tolist() == [[4, 6]]
    assert simulator.state.agent.tolist() == [[4, 4]]
    assert play(simulator, RIGHT).agent.tolist() == [[4, 4]]


def test_the_gate_opens_stops_and_is_kept_open_by_what_stands_in_it():
    simulator = arena((0, 8), gate=(0, 5))
    assert play(simulator, RIGHT).agent.tolist() == [[0, 8]]
    assert play(simulator, INTERACT, RIGHT, RIGHT).agent.tolist() == [[0, 10]]
    assert play(simulator, INTERACT).gate_open.tolist() == [True]
    assert play(simulator, LEFT, LEFT, INTERACT).gate_open.tolist() == [False]


def test_a_taken_coin_comes_back_somewhere_else_and_not_always_at_the_same_place():
    places = set()
    for seed in range(20):
        simulator = Simulator([seed])
        simulator.state = arena((6, 0), coin=(4, 0)).state
        coin = play(simulator, DOWN).coin[0].tolist()
        assert coin != [4, 0]
        places.add(tuple(coin))
    assert len(places) > 5


@pytest.mark.parametrize("actions", [[6], [-1], [0, 1], [0.5], 1])
def test_bad_actions_are_refused(actions):
    with pytest.raises(InputError, match=r"actions must be \[1\] integers in 0..5"):
        Simulator([0]).step(np.array(actions))


def test_frames_show_every_thing_at_its_place():
    simulator = arena((3, 5), crate=(8, 7), coin=(5, 0), gate=(0, 5), walls=[(0, 0)])
    frame = render(simulator.state)[0]
    assert frame.shape == (SIZE, SIZE, 3) and frame.dtype == np.uint8
    corners = {
        "agent": (3 * STEP, 5 * STEP),
        "crate": (8 * STEP, 7 * STEP),
        "coin": (5 * TILE, 0),
        "closed": (0, 5 * TILE),
        "wall": (0, 0),
    }
    for name, (y, x) in corners.items():
        colours, covers = SPRITES[name]
        assert np.array_equal(frame[y : y + TILE, x : x + TILE][covers], colours[covers]), name
