"""The training loop of every stage: losses come from the stage, all else is here."""

import csv
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.distill import checkpoint
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.optim import make_optimizers, rate, update_ema
from cfpp_rt.distill.settings import StageSettings
from cfpp_rt.distill.stage import Stage
from cfpp_rt.errors import CheckpointError, InputError, NonFiniteError

Feed = Callable[[int], Batch]  # batch number n of a run


class Trainer:
    """One stage of one run, in one process.

    name: of the stage, for messages. feed: gives batch number n. folder: of checkpoints and log. A loss or gradient
    that is not finite stops the run with NonFiniteError before any weight changes; the last checkpoint stays.
    """

    def __init__(self, name: str, stage: Stage, settings: StageSettings, feed: Feed, folder: Path):
        self.name, self.stage, self.settings, self.feed, self.folder = name, stage, settings, feed, folder
        lrs = {network: settings.critic_lr if network == "critic" else settings.lr for network in stage.trained}
        self.optimizers = {
            network: make_optimizers(module, settings, lrs[network]) for network, module in stage.trained.items()
        }
        self.draws = torch.Generator().manual_seed(settings.seed)
        self.step = self.position = 0
        self._asked_to_stop = False

    def run(self, report: Callable[[str], object] = print) -> None:
        """Train to the settings' number of steps, from where a resumed run was; saves at the end."""
        log = _Log(self.folder / "log.csv", self.step)
        began, first = time.perf_counter(), self.step
        bar = _bar(self.settings.steps, self.step, self.name)
        while self.step < self.settings.steps and not self._asked_to_stop:
            row = self._one_step()
            self.step += 1
            row["seconds"] = time.perf_counter() - began
            log.add(self.step, row)
            bar(1)
            if self.step % self.settings.log_every == 0 and not sys.stderr.isatty():
                speed = row["seconds"] / (self.step - first)
                left = speed * (self.settings.steps - self.step) / 60
                losses = " ".join(f"{key} {value:.4g}" for key, value in row.items() if key.endswith("loss"))
                report(f"{self.name} {self.step}/{self.settings.steps} {losses} {speed:.3f} s/step {left:.0f} min left")
            if self.step % self.settings.save_every == 0 or self.step == self.settings.steps or self._asked_to_stop:
                log.flush()
                self.save()

    def stop(self) -> None:
        """Finish the step, save, and leave `run`."""
        self._asked_to_stop = True

    def _one_step(self) -> dict[str, float]:
        share = rate(self.step, self.settings)
        row: dict[str, float] = {"lr": share * self.settings.lr}
        for _ in range(self.settings.accumulate - 1):
            for network, loss in self.stage.updates(self._next_batch, self.draws, self.step):
                self._backward(network, loss)
        for network, loss in self.stage.updates(self._next_batch, self.draws, self.step):
            row[f"{network}_loss"] = self._backward(network, loss)
            row[f"{network}_norm"] = self._apply(network, share)
            if network == "student":
                update_ema(self.stage.ema, self.stage.trained[network], self.step, self.settings)
        return row

    def _next_batch(self) -> Batch:
        batch = self.feed(self.position)
        self.position += 1
        return batch

    def _backward(self, network: str, loss: Tensor) -> float:
        value = loss.item()
        if not math.isfinite(value):
            raise NonFiniteError(f"stage {self.name}, step {self.step + 1}: the loss of {network} is {value}")
        (loss / self.settings.accumulate).backward()
        return value

    def _apply(self, network: str, share: float) -> float:
        module = self.stage.trained[network]
        norm = float(nn.utils.clip_grad_norm_(module.parameters(), self.settings.clip))
        if not math.isfinite(norm):
            raise NonFiniteError(f"stage {self.name}, step {self.step + 1}: the gradient norm of {network} is {norm}")
        for optimizer in self.optimizers[network]:
            for group in optimizer.param_groups:
                group["lr"] = share * group["peak"]
            optimizer.step()
        module.zero_grad(set_to_none=True)
        return norm

    def save(self) -> Path:
        """Write a checkpoint of everything that the next step depends on."""
        state = {
            "step": self.step,
            "position": self.position,
            "draws": self.draws.get_state(),
            "networks": {name: module.state_dict() for name, module in self.stage.trained.items()},
            "ema": self.stage.ema.state_dict(),
            "optimizers": {name: [one.state_dict() for one in made] for name, made in self.optimizers.items()},
        }
        return checkpoint.save(self.folder, self.step, state, self.settings.keep)

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
            for name, module in self.stage.trained.items():
                module.load_state_dict(state["networks"][name])
                for optimizer, kept in zip(self.optimizers[name], state["optimizers"][name], strict=True):
                    optimizer.load_state_dict(kept)
            self.stage.ema.load_state_dict(state["ema"])
        except (RuntimeError, ValueError, KeyError) as error:
            raise CheckpointError(f"{path}: of another model ({' '.join(str(error).split())[:160]})") from error
        self.draws.set_state(state["draws"])
        self.step, self.position = state["step"], state["position"]


class _Log:
    """A CSV file of one row per step. A resumed run drops what was logged after its checkpoint."""

    def __init__(self, path: Path, step: int):
        self.path, self.rows, self.columns = path, [], ["step"]
        if step and path.exists():
            with path.open(newline="") as file:
                self.rows = [row for row in csv.DictReader(file) if int(row["step"]) <= step]
            self.columns = list(self.rows[0]) if self.rows else ["step"]

    def add(self, step: int, row: dict[str, float]) -> None:
        self.rows.append({"step": step, **{name: f"{value:.6g}" for name, value in row.items()}})
        self.columns += [name for name in row if name not in self.columns]

    def flush(self) -> None:
        from cfpp_rt.checkpoint import write_atomically

        self.path.parent.mkdir(parents=True, exist_ok=True)
        with write_atomically(self.path) as temporary, temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns, restval="")
            writer.writeheader()
            writer.writerows(self.rows)


def _bar(total: int, done: int, name: str) -> Callable[[int], object]:
    if not sys.stderr.isatty():
        return lambda _: None
    from tqdm import tqdm

    return tqdm(total=total, initial=done, desc=name, unit="step").update
