"""Many clients on one device: requests arrive, wait, really run, and are judged by the deadlines of their playback.

A client plays its video at a fixed rate from its first frame on: frame k is late if it arrives more than k / fps
seconds after the first. No frame is skipped and no client gives up.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from cfpp_rt.device.timing import percentile
from cfpp_rt.values import Frames

SERVING = {
    "turns": "one block per client, round robin: all begin soon, all are equally slow",
    "fifo": "first in, first out, each request to its end: later clients wait, a running request is fast",
}


@dataclasses.dataclass
class Client:
    """One request. Times are in seconds since the run began; deliveries: (time, number of frames) of each `Frames`."""

    arrival: float
    begun: float | None = None
    deliveries: list[tuple[float, int]] = dataclasses.field(default_factory=list)

    @property
    def queue_s(self) -> float:
        """Seconds from arrival until the device first works for the request."""
        return (self.begun if self.begun is not None else self.arrival) - self.arrival

    @property
    def ttff_s(self) -> float:
        """Seconds from arrival to the first frame."""
        return self.deliveries[0][0] - self.arrival

    @property
    def num_frames(self) -> int:
        return sum(count for _, count in self.deliveries)

    def late(self, fps: float) -> list[float]:
        """Return the seconds by which late frames missed their deadlines."""
        first, delivered, late = self.deliveries[0][0], 0, []
        for moment, count in self.deliveries:
            late += [over for k in range(delivered, delivered + count) if (over := moment - first - k / fps) > 0]
            delivered += count
        return late


def arrivals(clients: int, rate: float | None, seed: int) -> list[float]:
    """Return arrival times in seconds: a Poisson process of `rate` requests per second, or all 0 if it is None."""
    if rate is None:
        return [0.0] * clients
    return np.cumsum(np.random.default_rng(seed).exponential(1 / rate, clients)).tolist()


def serve(start: Callable[[int], Iterator[Frames]], arrival_times: Sequence[float], serving: str) -> list[Client]:
    """Run all requests to their end on one device, in real time.

    start: returns the stream of the request of a number.
    arrival_times: seconds from now, one per request.
    serving: a key of `SERVING`.
    """
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
    """Return the `METRICS` of all requests together, for playback at `fps`."""
    late = [[1000 * over for over in client.late(fps)] for client in clients]
    num_frames = sum(client.num_frames for client in clients)
    first, last = min(c.arrival for c in clients), max(c.deliveries[-1][0] for c in clients)
    out: dict[str, Any] = {}
    for name, values in (
        ("queue_ms", [1000 * client.queue_s for client in clients]),
        ("ttff_ms", [1000 * client.ttff_s for client in clients]),
    ):
        out |= {f"{name}_p{p}": percentile(values, p) for p in (50, 99)}
    return out | {
        "late_percent": 100 * sum(map(len, late)) / num_frames,
        "clients_without_stall": sum(not misses for misses in late),
        "late_ms_p50": percentile([ms for misses in late for ms in misses] or [0.0], 50),
        "late_ms_most": max((ms for misses in late for ms in misses), default=0.0),
        "served_fps": num_frames / (last - first),
    }


# Metric: (explanation, True if less of it is better).
METRICS = {
    "queue_ms_p50": ("arrival until the device first works for a client, median", True),
    "queue_ms_p99": ("  99th percentile", True),
    "ttff_ms_p50": ("time to first frame: arrival to the first frame, median", True),
    "ttff_ms_p99": ("  99th percentile", True),
    "late_percent": ("frames that missed their deadline", True),
    "late_ms_p50": ("lateness of the late frames, median", True),
    "late_ms_most": ("  maximum", True),
    "clients_without_stall": ("clients without a late frame", False),
    "served_fps": ("frames per second of all clients together", False),
}
