"""Clients that share a device: arrivals, queueing and deadlines, with requests that really run."""

import time

import pytest
import torch

from cfpp_rt.bench.latency.load import METRICS, Client, arrivals, serve, summary
from cfpp_rt.values import Frames


def test_arrivals_are_poisson_by_seed_or_all_at_once():
    assert arrivals(3, None, 0) == [0.0, 0.0, 0.0]
    times = arrivals(2000, 4.0, 1)
    assert times == arrivals(2000, 4.0, 1) != arrivals(2000, 4.0, 2)
    gaps = torch.tensor(times).diff()
    assert bool((gaps > 0).all())
    assert float(gaps.mean()) == pytest.approx(1 / 4, rel=0.1) and float(gaps.std()) == pytest.approx(1 / 4, rel=0.1)


def test_deadlines():
    client = Client(arrival=1.0, begun=3.0, deliveries=[(4.0, 1), (4.25, 4), (5.2, 4)])
    assert client.queue_s == 2.0 and client.ttff_s == 3.0 and client.num_frames == 9
    # At 10 frames per second: 1 to 4 are due at 4.1 to 4.4, so two of them are late; 5 to 8 at 4.5 to 4.8.
    assert client.late(10.0) == pytest.approx([0.15, 0.05, 0.7, 0.6, 0.5, 0.4])
    assert client.late(1.0) == []
    found = summary([client], 10.0)
    assert found["late_percent"] == pytest.approx(100 * 6 / 9) and found["late_ms_most"] == pytest.approx(700)
    assert found["clients_without_stall"] == 0 and found["served_fps"] == pytest.approx(9 / 4.2)
    assert set(found) == set(METRICS)


def stream(seconds, blocks=3):
    for index in range(blocks):
        time.sleep(seconds)
        yield Frames(torch.zeros(1, 1, 2, 2, 3, dtype=torch.uint8), index)


def test_fifo_makes_the_last_wait_and_round_robin_makes_all_slow():
    fifo, robin = (serve(lambda _: stream(0.01), [0.0] * 3, serving) for serving in ("fifo", "turns"))
    ends = [client.deliveries[-1][0] for client in fifo]
    assert fifo[1].begun >= ends[0] and fifo[2].begun >= ends[1]
    assert robin[2].deliveries[0] < robin[0].deliveries[-1]
    assert all(client.num_frames == 3 for client in (*fifo, *robin))
    assert max(client.begun for client in robin) < min(client.deliveries[-1][0] for client in robin)


def test_no_client_is_served_before_its_arrival():
    clients = serve(lambda _: stream(0.001), [0.08, 0.0], "fifo")
    assert clients[0].begun >= 0.08
    assert all(client.queue_s >= 0 for client in clients)


@pytest.mark.parametrize("serving,order", [("turns", [0, 1, 2] * 8), ("fifo", [0] * 8 + [1] * 8 + [2] * 8)])
def test_a_model_serves_three_clients(world, serving, order):
    clients = serve(lambda number: world.stream("ours", number), [0.0] * 3, serving)
    made = sorted((moment, number) for number, client in enumerate(clients) for moment, _ in client.deliveries)
    assert [number for _, number in made] == order
    late = summary(clients, fps=1e5)["late_percent"]
    assert late == pytest.approx(100 * 7 / 8), "at 100,000 frames per second all but the first are late"
