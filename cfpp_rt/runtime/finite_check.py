"""Detection of NaN and infinity in a rollout, without waiting for the device, and the search for where they began."""

from collections.abc import Callable

import torch
from torch import Tensor

from cfpp_rt.errors import NonFiniteError
from cfpp_rt.runtime.forward_inputs import BlockInput

Probe = Callable[[int, Tensor], None]  # called with the index of a layer and its output


class FiniteCheck:
    """The passes of the newest block, each with a device flag that says whether its result is finite."""

    def __init__(self) -> None:
        self._passes: list[tuple[list[BlockInput], Tensor]] = []

    @property
    def pending(self) -> bool:
        """True if passes wait for `require_finite`."""
        return bool(self._passes)

    @property
    def all_finite(self) -> Tensor | None:
        """True if every recorded result is finite: bool [], on the device; None where nothing is recorded."""
        return torch.stack([finite for _, finite in self._passes]).all() if self._passes else None

    def clear(self) -> None:
        self._passes = []

    def record(self, blocks: list[BlockInput], result: Tensor) -> None:
        """Note a pass over `blocks` and its result."""
        self._passes.append((blocks, result.isfinite().all()))

    def require_finite(self, run_again: Callable[[list[BlockInput], Probe], object]) -> None:
        """Raise NonFiniteError, naming latent frame, step and layer, if a recorded result is not finite.

        run_again: runs a pass over the same blocks, which overwrites the same cache slots, and calls a probe after
        every layer. Waits for the device.
        """
        passes, self._passes = self._passes, []
        if not passes or bool(torch.stack([finite for _, finite in passes]).all()):
            return
        step, blocks = next((i, blocks) for i, (blocks, finite) in enumerate(passes) if not bool(finite))
        where = f"latent frame {blocks[-1].start}, step {step + 1}"

        def stop_at_first(layer: int, tokens: Tensor) -> None:
            if not bool(tokens.isfinite().all()):
                raise NonFiniteError(f"the model produced NaN or infinity at {where}, layer {layer}")

        run_again(blocks, stop_at_first)
        raise NonFiniteError(f"the model produced NaN or infinity at {where}, output head")
