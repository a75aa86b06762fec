"""Several videos generated in the same passes, each with its own prompt, seed, actions and position.

Every member is a `Rollout` of one row whose keys and values lie in a row of the batch's cache. `step` makes the next
block of every rollout: it collects the passes that each needs, and runs those of one shape that lie side by side as
one. Rollouts in a steady state always share their passes; one that was just added has passes of its own until its first
block is made, unless their shape is that of the others.

Rows are filled from the first one on and stay without gaps: no pass computes an unused row, and where a rollout is
removed, the last one moves to its row.
"""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache
from cfpp_rt.config import RolloutConfig
from cfpp_rt.core.exclusive import Exclusive
from cfpp_rt.core.frame_ring import FrameRing, slots_for
from cfpp_rt.errors import InputError, NonFiniteError
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText
from cfpp_rt.runtime.checks import check_prompt_embeds
from cfpp_rt.runtime.forward_inputs import ForwardInputs, join_inputs, join_text
from cfpp_rt.runtime.rollout import Rollout
from cfpp_rt.values import Latents


class RolloutBatch:
    """Up to `rows` rollouts of one student that share their forward passes.

    model, config, latent_size, latent_frames: see `Rollout`; the same for every rollout.
    rows: number of rollouts that the cache has memory for; it is allocated at once.

    The latents of a member are those of a `Rollout` of its own to rounding (products of another number of rows may sum
    in another order), and bit for bit while it is alone.

    One thread adds, removes and steps; others may set prompt and actions of the rollouts meanwhile. A second call that
    runs passes, of the batch or of one of its rollouts, is refused with InputError before anything runs.

    Cameras are not supported. Raises InputError for a float8 cache, whose scales the first pass of each rollout would
    have to set, and OutOfMemoryError if the cache cannot be allocated.
    """

    def __init__(
        self,
        model: CausalWanTransformer,
        config: RolloutConfig,
        *,
        latent_size: tuple[int, int],
        latent_frames: int | None,
        rows: int = 8,
    ):
        if not isinstance(rows, int) or rows < 1:
            raise InputError(f"rows must be an integer >= 1, got {rows}")
        if config.kv_dtype is not None:
            raise InputError(f"kv_dtype must be None for a batch of rollouts, got {config.kv_dtype!r}")
        self.model, self.config, self.rows = model, config, rows
        self.latent_size, self.latent_frames = latent_size, latent_frames
        sinks, ring = slots_for(config, latent_frames)
        shape = CacheShape.of(model.config, rows, sinks + ring, model.config.tokens_per_frame(*latent_size))
        self.cache = KVCache.allocate(
            shape, FrameRing(sinks, ring, config.frames_per_block), model.dtype, model.device, config
        )
        self._rollouts: list[Rollout] = []  # by row
        self._in_use = Exclusive("a batch of rollouts")
        # Text of the newest joined pass: what each rollout gave, and the joined copy.
        self._texts: tuple[list[Sequence[LayerText]], list[LayerText]] = [], []

    @property
    def rollouts(self) -> tuple[Rollout, ...]:
        """The rollouts in the batch, in the order of their rows."""
        return tuple(self._rollouts)

    def add(
        self,
        prompt_embeds: Tensor,
        *,
        initial_latents: Tensor | None = None,
        seed: int = 0,
        noise: Tensor | None = None,
        renoise: Iterable[Tensor] | None = None,
    ) -> Rollout:
        """Add a rollout, which begins with the next step; steer it by its methods, as any `Rollout`.

        prompt_embeds: [1, text_len, text_dim]. initial_latents, seed, noise, renoise: see `Rollout`. Given frames are
        written to the cache here. Raises InputError if all rows are in use.
        """
        if len(self._rollouts) == self.rows:
            raise InputError(f"a batch of {self.rows} rows is full: remove a rollout before adding another")
        if (batch := check_prompt_embeds(prompt_embeds, self.model)) != 1:
            raise InputError(f"prompt_embeds must be of one row, got {batch}")
        with self._in_use:
            row = len(self._rollouts)
            rollout = Rollout(
                self.model,
                prompt_embeds,
                self.config,
                latent_size=self.latent_size,
                latent_frames=self.latent_frames,
                initial_latents=initial_latents,
                seed=seed,
                noise=noise,
                renoise=renoise,
                cache=self.cache.rows(row, row + 1),
            )
            self._rollouts.append(rollout)
        return rollout

    def remove(self, rollout: Rollout) -> None:
        """Close a rollout and free its row. Raises InputError if it is not in the batch."""
        if rollout not in self._rollouts:
            raise InputError("rollout must be one of the batch, got one that was removed or never added")
        with self._in_use, ExitStack() as stack:
            for changed in {rollout, self._rollouts[-1]}:
                stack.enter_context(changed.in_use)
            self._remove(rollout)

    def _remove(self, rollout: Rollout) -> None:
        """Remove a rollout; the caller has entered `in_use` of the batch, of the rollout and of the last one."""
        row, last = self._rollouts.index(rollout), self._rollouts.pop()
        rollout.end()
        if last is rollout:
            return
        with torch.inference_mode():
            self.cache.data[:, :, row].copy_(self.cache.data[:, :, len(self._rollouts)])
        ring = last.cache.ring
        last.cache = self.cache.rows(row, row + 1)
        last.cache.ring = ring
        self._rollouts[row] = last

    def step(self) -> dict[Rollout, Latents | NonFiniteError]:
        """Make the next block of every rollout.

        A rollout that is finished leaves the batch. So does one whose model output is not finite: its result is the
        NonFiniteError, and the others go on. Any other error ends all rollouts of the batch.
        """
        with self._in_use, ExitStack() as stack:
            for rollout in self._rollouts:  # all of them before any pass runs: what is refused has changed nothing
                stack.enter_context(rollout.in_use)
            results = self._next_blocks()
            for rollout, result in results.items():
                if rollout.closed or isinstance(result, NonFiniteError):
                    self._remove(rollout)
        return results

    def _next_blocks(self) -> dict[Rollout, Latents | NonFiniteError]:
        results: dict[Rollout, Latents | NonFiniteError] = {}
        with ExitStack() as stack:
            passes = [stack.enter_context(rollout.next_block_passes()) for rollout in self._rollouts]
            requested = {row: next(generator) for row, generator in enumerate(passes)}
            while requested:
                for rows in _joinable_rows(requested):
                    velocity = self._run(rows[0], [requested[row] for row in rows])
                    for index, row in enumerate(rows):
                        try:
                            requested[row] = passes[row].send(None if velocity is None else velocity[index : index + 1])
                        except StopIteration as done:
                            results[self._rollouts[row]] = done.value
                            del requested[row]
                        except NonFiniteError as error:
                            results[self._rollouts[row]] = error
                            del requested[row]
        return results

    def _run(self, first_row: int, inputs: list[ForwardInputs]) -> Tensor | None:
        """Run the passes of consecutive rows as one."""
        texts = [single.text for single in inputs]
        if [id(text) for text in texts] != [id(text) for text in self._texts[0]]:
            self._texts = texts, join_text(texts)
        joined = join_inputs(inputs, self._texts[1])
        cache = self.cache.rows(first_row, first_row + len(inputs))
        return self.model(joined.latents, joined.time, joined.text, cache, joined.attn, joined.num_outputs)


def _joinable_rows(requested: dict[int, ForwardInputs]) -> list[list[int]]:
    """Group consecutive rows whose passes have one shape."""
    runs: list[list[int]] = []
    for row in sorted(requested):
        if runs and runs[-1][-1] == row - 1 and requested[row - 1].shape_key == requested[row].shape_key:
            runs[-1].append(row)
        else:
            runs.append([row])
    return runs
