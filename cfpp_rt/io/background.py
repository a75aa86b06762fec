"""A frame writer that works in a separate thread, in parallel with the code that makes the frames."""

import contextlib
import queue
import threading
import time

import numpy as np
import torch

from cfpp_rt.io.video import FrameWriter
from cfpp_rt.values import Frames

_QUEUED = 16  # frames; at 480x832 they take 19 MB
_ABORT_S = 5.0  # a frame takes milliseconds, so a writer that needs longer is stuck


class BackgroundWriter(FrameWriter):
    """Pass the frames to another writer in a thread; encoders release the GIL while they encode.

    writer: receives every frame in order, and is closed or aborted with this writer.
    queued: number of frames that may wait for the writer; `write` blocks while the queue is full.
    row: the row of the batch to write.

    work_s: seconds that the writer has worked in its thread, including the end of the file.
    An error of the writer is raised by the next `write` or by `close`, and the writer is aborted. `abort` drops the
    queued frames and returns as soon as the frame in progress is encoded. A writer that is stuck, such as on a pipe
    without a reader, is abandoned after 5 s.
    """

    def __init__(self, writer: FrameWriter, *, queued: int = _QUEUED, row: int = 0):
        super().__init__(row)
        self.work_s = 0.0
        self._writer = writer
        self._queue: queue.Queue[tuple[np.ndarray, int] | None] = queue.Queue(queued)
        self._error: BaseException | None = None
        self._dropping = False
        # A daemon, so that the interpreter does not wait for a disk that does not respond.
        self._thread = threading.Thread(target=self._run, name="frame writer", daemon=True)
        self._thread.start()

    def _put(self, frame: np.ndarray, index: int) -> None:
        if self._error is not None:
            raise self._error
        self._queue.put((frame, index))

    def _finish(self) -> None:
        try:
            self._end()
        except BaseException:  # such as KeyboardInterrupt while this waits
            self._drop()
            raise
        if self._error is not None:
            raise self._error

    def _drop(self) -> None:
        self._dropping = True
        with contextlib.suppress(queue.Empty):  # so that the end mark has room even if the writer is stuck
            while True:
                self._queue.get_nowait()
        self._end(_ABORT_S)

    def _end(self, timeout_s: float = threading.TIMEOUT_MAX) -> None:
        """Stop the thread and wait for it. The end mark may be in the queue twice: the thread stops at the first."""
        deadline = time.monotonic() + timeout_s
        while self._thread.is_alive() and (left := deadline - time.monotonic()) > 0:
            with contextlib.suppress(queue.Full):
                self._queue.put(None, timeout=min(left, 0.05))
                self._thread.join(min(left, threading.TIMEOUT_MAX))

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            if (
                not self._dropping and self._error is None
            ):  # otherwise only empty the queue, so that `write` does not block
                self._work(item)
        began = time.perf_counter()
        try:
            if self._dropping or self._error is not None:
                self._writer.abort()
            else:
                self._writer.close()
        except BaseException as error:
            self._error = self._error or error
        self.work_s += time.perf_counter() - began

    def _work(self, item: tuple[np.ndarray, int]) -> None:
        frame, index = item
        began = time.perf_counter()
        try:
            self._writer.write(Frames(torch.from_numpy(frame)[None, None], index))
        except BaseException as error:
            self._error = error
        self.work_s += time.perf_counter() - began
