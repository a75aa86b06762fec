"""Many clients, one device: requests arrive, wait, run for real, and are judged by the deadlines of their playback.

A client plays its video at a fixed rate from its first picture on: picture k is late if it comes more than k / fps
seconds after the first. Nothing is skipped and nobody gives up.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cfpp_rt.device.timing import percentile
from cfpp_rt.values import Frames

SERVING = {
    "turns": "one block for each client in turns: all begin soon, all are equally slow",
    "fifo": "first come, first served to the end: later clients wait, those served are fast",
}


@dataclasses.dataclass
class Client:
    """One request. Times in seconds since the run began; deliveries: (time, pictures) of each `Frames`."""

    arrival: float
    begun: float | None = None
    deliveries: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    @property
    def queue_s(self) -> float:
        """From arrival until the device first works for it."""
        return (self.begun if self.begun is not None else self.arrival) - self.arrival

    @property
    def ttff_s(self) -> float:
        """From arrival to the first picture."""
        return self.deliveries[0][0] - self.arrival

    @property
    def pictures(self) -> int:
        return sum(pictures for _, pictures in self.deliveries)

    def late(self, fps: float) -> list[float]:
        """Seconds by which each picture missed its deadline; none for those in time."""
        first, shown, late = self.deliveries[0][0], 0, []
        for moment, pictures in self.deliveries:
            late += [over for k in range(shown, shown + pictures) if (over := moment - first - k / fps) > 0]
            shown += pictures
        return late


def arrivals(clients: int, rate: float | None, seed: int) -> list[float]:
    """Arrival times in seconds: a Poisson process of `rate` requests per second, or all at 0 for None."""
    if rate is None:
        return [0.0] * clients
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, clients)).tolist()


def serve(start: Callable[[int], Iterator[Frames]], arrival_times: Sequence[float], serving: str) -> list[Client]:
    """Run all requests to their end on one device, by the clock. start: the stream of the request of that number."""
    clients = [Client(arrival) for arrival in arrival_times]
    coming = sorted(range(len(clients)), key=lambda i: clients[i].arrival)
    active: list[tuple[int, Iterator[Frames] | None]] = []
    begin = time.perf_counter()
    while coming or active:
        now = time.perf_counter() - begin
        while coming and clients[coming[0]].arrival <= now:
            active.append((coming.pop(0), None))
        if not active:
            time.sleep(max(0.0, clients[coming[0]].arrival - now))
            continue
        number, stream = active.pop(0)
        if stream is None:
            clients[number].begun = time.perf_counter() - begin
            stream = start(number)
        frames = next(stream, None)
        if frames is None:
            continue
        clients[number].deliveries.append((time.perf_counter() - begin, frames.pixels.shape[1]))
        if serving == "turns":
            active.append((number, stream))
        else:
            active.insert(0, (number, stream))
    return clients


def summary(clients: Sequence[Client], fps: float) -> dict[str, Any]:
    """queue_ms, ttff_ms (p50, p99), late pictures in percent of all, how late in ms, pictures per second of all."""
    late = [[1000 * over for over in client.late(fps)] for client in clients]
    pictures = sum(client.pictures for client in clients)
    first, last = min(c.arrival for c in clients), max(c.deliveries[-1][0] for c in clients)
    out: dict[str, Any] = {}
    for name, values in (
        ("queue_ms", [1000 * client.queue_s for client in clients]),
        ("ttff_ms", [1000 * client.ttff_s for client in clients]),
    ):
        out |= {f"{name}_p{p}": percentile(values, p) for p in (50, 99)}
    return out | {
        "late_percent": 100 * sum(map(len, late)) / pictures,
        "clients_without_stall": sum(not misses for misses in late),
        "late_ms_p50": percentile([ms for misses in late for ms in misses] or [0.0], 50),
        "late_ms_most": max((ms for misses in late for ms in misses), default=0.0),
        "served_fps": pictures / (last - first),
    }


# The words of a row, what each means, and whether less is better.
WORDS = {
    "queue_ms_p50": ("arrival until the device first works for a client, median", True),
    "queue_ms_p99": ("  99th percentile", True),
    "ttff_ms_p50": ("arrival to the first picture, median", True),
    "ttff_ms_p99": ("  99th percentile", True),
    "late_percent": ("pictures that missed their deadline", True),
    "late_ms_p50": ("by how much, median of the late ones", True),
    "late_ms_most": ("  at most", True),
    "clients_without_stall": ("clients all of whose pictures were in time", False),
    "served_fps": ("pictures per second of all clients together", False),
}
