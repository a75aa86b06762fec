"""The training loop of every stage. A stage computes losses; the trainer does everything else."""

import dataclasses
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.distill import checkpoint, processes
from cfpp_rt.distill.batch import Batch, DataSource
from cfpp_rt.distill.log import Log
from cfpp_rt.distill.optim import learning_rate_share, make_optimizers, update_ema
from cfpp_rt.distill.precision import MasterWeights
from cfpp_rt.distill.settings import StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.errors import CheckpointError, InputError, NonFiniteError
from cfpp_rt.io.progress import progress_bar


@dataclasses.dataclass(frozen=True)
class StepCost:
    """The arithmetic of a training step, and the rate of the device to compare it with.

    flops: FLOPs of one step in one process.
    peak_flops_per_s: FLOP/s of a large matrix product, measured on this device.
    """

    flops: float
    peak_flops_per_s: float


class Trainer:
    """The training of one stage in one process, or in several that torchrun started.

    With w processes, process r takes batches r, w + r, 2 w + r, ...: together they train as one process with w times
    the batch. A loss or gradient that is not finite raises NonFiniteError before any weight changes; the last
    checkpoint stays.

    name: name of the stage, for messages.
    data_source: returns batch number n.
    folder: where checkpoints and the log are written.
    dtype: dtype of the arithmetic; trained weights are float32.
    sample: called with the step every `sample_every` steps.
    step_cost: used to log the share of the device's peak rate that a step reaches (`mfu`); None = not logged.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        settings: StageSettings,
        data_source: DataSource,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        sample: Callable[..., object] | None = None,
        step_cost: StepCost | None = None,
    ):
        self.name, self.stage, self.settings, self.data_source, self.folder = name, stage, settings, data_source, folder
        self.device, self.sample, self.step_cost = device or torch.device("cpu"), sample, step_cost
        arithmetic = dtype if processes.world_size() == 1 else torch.float32  # `shard` casts shards itself
        self.masters = {network: MasterWeights(module, arithmetic) for network, module in stage.trained.items()}
        self.ema = MasterWeights(stage.ema, arithmetic)
        lrs = {network: settings.critic_lr if network == "critic" else settings.lr for network in stage.trained}
        self.optimizers = {
            network: make_optimizers(master.module, settings, lrs[network]) for network, master in self.masters.items()
        }
        self.generator = torch.Generator().manual_seed(settings.seed)
        self.step = self.position = 0
        self._stop_requested = False

    def run(self, report: Callable[[str], object] = print) -> None:
        """Train up to the number of steps of the settings, from step 0 or the resumed step, and save at the end.

        report: called with a line of text every `log_every` steps if stderr is not a terminal.
        """
        settings, first_process = self.settings, processes.rank() == 0
        log = Log(self.folder, self.step, tensorboard=settings.tensorboard) if first_process else None
        began, first_step = time.perf_counter(), self.step
        with progress_bar(
            self.name, settings.steps, unit="step", initial=self.step, enabled=first_process
        ) as show_progress:
            while self.step < settings.steps:
                row = self._one_step()
                self.step += 1
                row["seconds"] = time.perf_counter() - began
                seconds_per_step = row["seconds"] / (self.step - first_step)
                if self.step_cost is not None:
                    row["mfu"] = self.step_cost.flops / seconds_per_step / self.step_cost.peak_flops_per_s
                if log is not None:
                    log.add(self.step, row)
                    show_progress(1)
                    if self.step % settings.log_every == 0 and not sys.stderr.isatty():
                        report(self._line(row, seconds_per_step))
                stopping = processes.any_of(self._stop_requested, self.device)
                if self.step % settings.save_every == 0 or self.step == settings.steps or stopping:
                    if log is not None:
                        log.flush()
                    self.save()
                if self.sample is not None and self.step % settings.sample_every == 0:
                    self.sample(self.step, write=first_process)
                if stopping:
                    break

    def stop(self) -> None:
        """Make `run` finish the current step, save a checkpoint and return."""
        self._stop_requested = True

    def _line(self, row: dict[str, float], seconds_per_step: float) -> str:
        minutes_left = seconds_per_step * (self.settings.steps - self.step) / 60
        losses = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key.endswith("loss"))
        mfu = f" {100 * row['mfu']:.0f} % of the peak rate" if "mfu" in row else ""
        progress = f"{self.name} {self.step}/{self.settings.steps}"
        return f"{progress} {losses} {seconds_per_step:.3f} s/step{mfu} {minutes_left:.0f} min left"

    def _one_step(self) -> dict[str, float]:
        share = learning_rate_share(self.step, self.settings)
        row: dict[str, float] = {"lr": share * self.settings.lr}
        earlier: dict[str, list[Tensor]] = defaultdict(list)
        for _ in range(self.settings.accumulate - 1):
            for network, loss in self.stage.updates(self._next_batch, self.generator, self.step):
                earlier[network].append(self._backward(network, loss))
        for network, loss in self.stage.updates(self._next_batch, self.generator, self.step):
            losses = [*earlier[network], self._backward(network, loss)]
            row[f"{network}_loss"], row[f"{network}_norm"] = self._apply(network, losses, share)
            if network == "student":
                processes.release(self.ema.module)  # stage cd has just run it and left it gathered
                update_ema(self.ema.module, self.masters[network].module, self.step, self.settings)
                self.ema.sync()
        return row

    def _next_batch(self) -> Batch:
        batch = self.data_source(self.position * processes.world_size() + processes.rank())
        self.position += 1
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def _backward(self, network: str, loss: Tensor) -> Tensor:
        (loss / self.settings.accumulate).backward()
        self.masters[network].take_gradients()
        return processes.mean(loss.detach())

    def _apply(self, network: str, losses: list[Tensor], share: float) -> tuple[float, float]:
        """Clip the accumulated gradients and step the optimisers of a network.

        Return the last of the losses and the norm of the gradients before clipping. Raise NonFiniteError, before any
        weight changes, if a loss or the norm is not finite.
        """
        master = self.masters[network]
        gradient_norm = processes.full_tensor(nn.utils.clip_grad_norm_(master.module.parameters(), self.settings.clip))
        # A single copy to the host, so that each update waits for the device once.
        *values, norm = torch.stack([x.double() for x in (*losses, gradient_norm)]).tolist()
        named = [*((f"the loss of {network}", value) for value in values), (f"the gradient norm of {network}", norm)]
        for quantity, value in named:
            if not math.isfinite(value):
                raise NonFiniteError(f"stage {self.name}, step {self.step + 1}: {quantity} is {value}")
        for optimizer in self.optimizers[network]:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
            optimizer.step()
        master.module.zero_grad(set_to_none=True)
        master.sync()
        return values[-1], norm

    def save(self) -> Path:
        """Write a checkpoint of all that the next step depends on, with full tensors. All processes must call this."""
        state = processes.full_state(
            {
                "step": self.step,
                "position": self.position,
                "draws": self.generator.get_state(),
                "networks": {name: dict(master.module.state_dict()) for name, master in self.masters.items()},
                "ema": dict(self.ema.module.state_dict()),
                "optimizers": {
                    name: [optimizer.state_dict() for optimizer in optimizers]
                    for name, optimizers in self.optimizers.items()
                },
            }
        )
        fault: InputError | None = None
        path = checkpoint.path_of(self.folder, self.step)
        if processes.rank() == 0:
            try:
                checkpoint.save(self.folder, self.step, state, self.settings.keep)
            except InputError as error:
                fault = error
        if processes.any_of(fault is not None, self.device):
            raise fault or InputError(f"{path}: the checkpoint cannot be written (rank 0 says why)")
        return path

    def resume(self) -> None:
        """Load the newest checkpoint of the folder.

        Raise InputError if there is none, CheckpointError if it belongs to another model or stage.
        """
        checkpoints = checkpoint.checkpoints(self.folder)
        if not checkpoints:
            raise InputError(f"{self.folder}: wanted a checkpoint to resume from, found none")
        path = list(checkpoints.values())[-1]
        state: dict[str, Any] = checkpoint.load(path)
        if set(state["networks"]) != set(self.stage.trained):
            raise CheckpointError(f"{path}: of another stage: it trains {', '.join(state['networks'])}")
        try:
            for name, master in self.masters.items():
                _load(master, state["networks"][name])
                for optimizer, saved in zip(self.optimizers[name], state["optimizers"][name], strict=True):
                    optimizer.load_state_dict(processes.shard_optimizer_state(saved, optimizer))
            _load(self.ema, state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: of another model ({' '.join(str(error).split())[:160]})") from error
        self.generator.set_state(state["draws"])
        self.step, self.position = state["step"], state["position"]


def _load(master: MasterWeights, state: dict[str, Tensor]) -> None:
    current = master.module.state_dict()
    master.module.load_state_dict({name: processes.shard_like(t, current[name]) for name, t in state.items()})
    master.sync()
