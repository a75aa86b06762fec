"""The training loop of every stage: losses come from the stage, all else is here."""

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
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.log import Log
from cfpp_rt.distill.optim import make_optimizers, rate, update_ema
from cfpp_rt.distill.precision import Master
from cfpp_rt.distill.settings import StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.errors import CheckpointError, InputError, NonFiniteError

Feed = Callable[[int], Batch]  # batch number n of a run


@dataclasses.dataclass(frozen=True)
class Work:
    """What a step costs and what the device could do. flops: of a step in one process. rate: FLOP/s of a large matrix
    product here, measured.
    """

    flops: float
    rate: float


class Trainer:
    """One stage of one run, in one process or in several that torchrun started.

    name: of the stage, for messages. feed: gives batch number n. folder: of checkpoints and log. dtype: of the
    arithmetic; trained weights are float32. sample: called with the step every `sample_every` steps. work: for the
    share of the device's rate that a step reaches (`mfu` in the log). A loss or gradient that is not finite stops the
    run with NonFiniteError before any weight changes; the last checkpoint stays.

    Of w processes, process r takes batches r, w + r, 2 w + r, ...: together they train as one with w times the batch.
    """

    def __init__(
        self,
        name: str,
        stage: Stage,
        settings: StageSettings,
        feed: Feed,
        folder: Path,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | None = None,
        sample: Callable[..., object] | None = None,
        work: Work | None = None,
    ):
        self.name, self.stage, self.settings, self.feed, self.folder = name, stage, settings, feed, folder
        self.device, self.sample, self.work = device or torch.device("cpu"), sample, work
        arithmetic = dtype if processes.count() == 1 else torch.float32  # of shards, that is for `shard` to see to
        self.masters = {network: Master(module, arithmetic) for network, module in stage.trained.items()}
        self.ema = Master(stage.ema, arithmetic)
        lrs = {network: settings.critic_lr if network == "critic" else settings.lr for network in stage.trained}
        self.optimizers = {
            network: make_optimizers(master.module, settings, lrs[network]) for network, master in self.masters.items()
        }
        self.draws = torch.Generator().manual_seed(settings.seed)
        self.step = self.position = 0
        self._asked_to_stop = False

    def run(self, report: Callable[[str], object] = print) -> None:
        """Train to the settings' number of steps, from where a resumed run was; saves at the end."""
        first_process = processes.rank() == 0
        log = Log(self.folder, self.step, tensorboard=self.settings.tensorboard) if first_process else None
        began, first = time.perf_counter(), self.step
        bar = _bar(self.settings.steps, self.step, self.name) if first_process else lambda _: None
        while self.step < self.settings.steps:
            row = self._one_step()
            self.step += 1
            row["seconds"] = time.perf_counter() - began
            speed = row["seconds"] / (self.step - first)
            if self.work is not None:
                row["mfu"] = self.work.flops / speed / self.work.rate
            if log is not None:
                log.add(self.step, row)
                bar(1)
                if self.step % self.settings.log_every == 0 and not sys.stderr.isatty():
                    report(self._line(row, speed))
            stopping = processes.any_of(self._asked_to_stop, self.device)
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps or stopping:
                if log is not None:
                    log.flush()
                self.save()
            if self.sample is not None and self.step % self.settings.sample_every == 0:
                self.sample(self.step, write=first_process)
            if stopping:
                break

    def stop(self) -> None:
        """Finish the step, save, and leave `run`."""
        self._asked_to_stop = True

    def _line(self, row: dict[str, float], speed: float) -> str:
        left = speed * (self.settings.steps - self.step) / 60
        losses = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key.endswith("loss"))
        mfu = f" {100 * row['mfu']:.0f} % of the matrix rate" if "mfu" in row else ""
        return f"{self.name} {self.step}/{self.settings.steps} {losses} {speed:.3f} s/step{mfu} {left:.0f} min left"

    def _one_step(self) -> dict[str, float]:
        share = rate(self.step, self.settings)
        row: dict[str, float] = {"lr": share * self.settings.lr}
        earlier: dict[str, list[Tensor]] = defaultdict(list)
        for _ in range(self.settings.accumulate - 1):
            for network, loss in self.stage.updates(self._next_batch, self.draws, self.step):
                earlier[network].append(self._backward(network, loss))
        for network, loss in self.stage.updates(self._next_batch, self.draws, self.step):
            losses = [*earlier[network], self._backward(network, loss)]
            row[f"{network}_loss"], row[f"{network}_norm"] = self._apply(network, losses, share)
            if network == "student":
                processes.release(self.ema.module)  # stage cd has just run it
                update_ema(self.ema.module, self.masters[network].module, self.step, self.settings)
                self.ema.publish()
        return row

    def _next_batch(self) -> Batch:
        batch = self.feed(self.position * processes.count() + processes.rank())
        self.position += 1
        return batch if self.device.type == "cpu" else batch.to(self.device)

    def _backward(self, network: str, loss: Tensor) -> Tensor:
        (loss / self.settings.accumulate).backward()
        self.masters[network].take_gradients()
        return processes.mean(loss.detach())

    def _apply(self, network: str, losses: list[Tensor], share: float) -> tuple[float, float]:
        """Let the gradients of these losses change the network; returns the last loss and the gradients' norm."""
        master = self.masters[network]
        found = processes.whole_norm(nn.utils.clip_grad_norm_(master.module.parameters(), self.settings.clip))
        # One wait for the device per update: all that must be finite comes to the host together.
        *values, norm = torch.stack([x.double() for x in (*losses, found)]).tolist()
        for name, value in (*((f"the loss of {network}", value) for value in values), ("", norm)):
            if not math.isfinite(value):
                what = name or f"the gradient norm of {network}"
                raise NonFiniteError(f"stage {self.name}, step {self.step + 1}: {what} is {value}")
        for optimizer in self.optimizers[network]:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
            optimizer.step()
        master.module.zero_grad(set_to_none=True)
        master.publish()
        return values[-1], norm

    def save(self) -> Path:
        """Write a checkpoint of everything that the next step depends on: whole tensors, however many processes."""
        state = processes.whole(
            {
                "step": self.step,
                "position": self.position,
                "draws": self.draws.get_state(),
                "networks": {name: dict(master.module.state_dict()) for name, master in self.masters.items()},
                "ema": dict(self.ema.module.state_dict()),
                "optimizers": {name: [one.state_dict() for one in made] for name, made in self.optimizers.items()},
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
        """Go on from the newest checkpoint of the folder. Raises InputError if there is none, CheckpointError if it is
        of another model or stage.
        """
        found = checkpoint.checkpoints(self.folder)
        if not found:
            raise InputError(f"{self.folder}: wanted a checkpoint to resume from, found none")
        path = list(found.values())[-1]
        state: dict[str, Any] = checkpoint.load(path)
        if set(state["networks"]) != set(self.stage.trained):
            raise CheckpointError(f"{path}: of another stage: it trains {', '.join(state['networks'])}")
        try:
            for name, master in self.masters.items():
                _load(master, state["networks"][name])
                for optimizer, kept in zip(self.optimizers[name], state["optimizers"][name], strict=True):
                    optimizer.load_state_dict(processes.parted_optimizer(kept, optimizer))
            _load(self.ema, state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: of another model ({' '.join(str(error).split())[:160]})") from error
        self.draws.set_state(state["draws"])
        self.step, self.position = state["step"], state["position"]


def _load(master: Master, state: dict[str, Tensor]) -> None:
    own = master.module.state_dict()
    master.module.load_state_dict({name: processes.parted(t, own[name]) for name, t in state.items()})
    master.publish()


def _bar(total: int, done: int, name: str) -> Callable[[int], object]:
    if not sys.stderr.isatty():
        return lambda _: None
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=name, unit="step").update
