"""A guard against two threads in one object; needs no torch."""

import threading

from cfpp_rt.errors import InputError


class Exclusive:
    """A context that only one thread is in at a time; entering it a second time is refused and does not wait.

    what: what is guarded, for the error.

    Raises InputError at the entry while it is in use, also by the same thread. What is refused has changed nothing.
    """

    def __init__(self, what: str):
        self._what, self._lock = what, threading.Lock()

    def __enter__(self) -> None:
        if not self._lock.acquire(blocking=False):
            raise InputError(f"{self._what} must be used by one call at a time, got a second one while it computes")

    def __exit__(self, *_: object) -> None:
        self._lock.release()
