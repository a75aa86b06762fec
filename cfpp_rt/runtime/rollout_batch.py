"""Several videos made in the same passes, each with its own prompt, seed, actions and position: streams of one batch.

A stream is a `Rollout` of one row whose keys and values lie in a row of the batch's cache. `step` makes the next block
of every stream: it asks each for its passes, and runs those of one form that lie side by side as one. Streams in a
steady state always do; one that has just joined has a pass of its own until its first block is made, unless its form is
that of the others.

Rows are filled from the first on and are kept without holes: there is no pass over a row that nobody uses, and where a
stream leaves, the last one moves to its row.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, allocate
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.frame_ring import FrameRing, slots_for
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText
from cfpp_rt.runtime.forward_inputs import Pass, join_passes, join_text
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import Conditioning, Latents


class StreamBatch:
    """Room for `rows` streams of one student.

    model, config, latent_size, frames: as of `Rollout`, the same for every stream; frames is the length of each. The
    cache of all rows is taken at once. A stream's latents are those of a `Rollout` of its own to rounding (products of
    another number of rows may sum in another order), and bit by bit while it is alone.

    Cameras are not taken. Raises InputError for a float8 cache, whose scales the first pass of a stream would have to
    set, and OutOfMemoryError if the cache cannot be allocated.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        config: RolloutConfig,
        *,
        latent_size: tuple[int, int],
        frames: int | None,
        rows: int = 8,
    ):
        if not isinstance(rows, int) or rows < 1:
            raise InputError(f"rows must be an integer >= 1, got {rows}")
        if config.kv_dtype is not None:
            raise InputError(f"kv_dtype must be None for a batch of streams, got {config.kv_dtype!r}")
        self.model, self.config, self.latent_size, self.frames, self.rows = model, config, latent_size, frames, rows
        sinks, ring = slots_for(config, frames)
        shape = CacheShape.of(model.config, rows, sinks + ring, model.config.tokens_per_frame(*latent_size))
        self.cache = allocate(shape, FrameRing(sinks, ring, config.frames_per_block), model.dtype, model.device, config)
        self._streams: list[Rollout] = []  # that of row i at i
        self._texts: tuple[list[Sequence[LayerText]], list[LayerText]] = [], []  # of the newest pass: apart and joined

    @property
    def streams(self) -> tuple[Rollout, ...]:
        """Those that are in the batch, in the order of their rows."""
        return tuple(self._streams)

    def join(
        self,
        text: Conditioning,
        *,
        initial: Tensor | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        renoise: Iterable[Tensor] | None = None,
    ) -> Rollout:
        """A stream that begins with the next step; `act` and `switch_prompt` are called on it as on any `Rollout`.

        text: of one row. initial, seed, noise, renoise: as of `Rollout`. Given frames are written to the cache here.
        Raises InputError where all rows are taken.
        """
        if len(self._streams) == self.rows:
            raise InputError(f"a batch of {self.rows} rows is full: a stream must leave before another joins")
        if text.embeds.shape[0] != 1:
            raise InputError(f"text must be of one row, got {text.embeds.shape[0]}")
        row = len(self._streams)
        stream = Rollout(
            self.model,
            text,
            self.config,
            latent_size=self.latent_size,
            frames=self.frames,
            initial=initial,
            seed=seed,
            noise=noise,
            renoise=renoise,
            cache=self.cache.rows(row, row + 1),
        )
        self._streams.append(stream)
        return stream

    def leave(self, stream: Rollout) -> None:
        """Give a stream's row to others; it makes no more blocks. Raises InputError if it is not in the batch."""
        if stream not in self._streams:
            raise InputError("stream must be one of the batch, got one that has left or never joined")
        row, last = self._streams.index(stream), self._streams.pop()
        stream.close()
        if last is stream:
            return
        with torch.inference_mode():
            self.cache.data[:, :, row].copy_(self.cache.data[:, :, len(self._streams)])
        ring = last.cache.ring
        last.cache = self.cache.rows(row, row + 1)
        last.cache.ring = ring
        self._streams[row] = last

    def step(self) -> dict[Rollout, Latents | NonFiniteError]:
        """The next block of every stream. One whose last block that is leaves the batch.

        Where the model makes NaN or infinity of a stream, the error that says where stands in place of its block, it
        leaves the batch, and the others go on. Whatever else breaks a pass off breaks off all streams.
        """
        made: dict[Rollout, Latents | NonFiniteError] = {}
        with ExitStack() as stack:
            blocks = [stack.enter_context(stream.block()) for stream in self._streams]
            asked = {row: next(block) for row, block in enumerate(blocks)}
            while asked:
                for rows in _side_by_side(asked):
                    velocity = self._run(rows[0], [asked[row] for row in rows])
                    for index, row in enumerate(rows):
                        try:
                            asked[row] = blocks[row].send(None if velocity is None else velocity[index : index + 1])
                        except StopIteration as done:
                            made[self._streams[row]] = done.value
                            del asked[row]
                        except NonFiniteError as error:
                            made[self._streams[row]] = error
                            del asked[row]
        for stream, block in made.items():
            if stream.over or isinstance(block, NonFiniteError):
                self.leave(stream)
        return made

    def _run(self, first: int, passes: list[Pass]) -> Tensor | None:
        texts = [single.text for single in passes]
        if [id(text) for text in texts] != [id(text) for text in self._texts[0]]:
            self._texts = texts, join_text(texts)
        whole = join_passes(passes, self._texts[1])
        cache = self.cache.rows(first, first + len(passes))
        return self.model(whole.latents, whole.time, whole.text, cache, whole.place, groups=whole.keep)


def _side_by_side(asked: dict[int, Pass]) -> list[list[int]]:
    """Rows whose passes are of one form, as long as they lie side by side."""
    runs: list[list[int]] = []
    for row in sorted(asked):
        if runs and runs[-1][-1] == row - 1 and asked[row - 1].form == asked[row].form:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs
