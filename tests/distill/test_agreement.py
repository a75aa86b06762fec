"""A failure in one process ends all of them at the same step, and the last checkpoint stays complete."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from cfpp_rt.distill import checkpoint

WORKER = """
import sys
from pathlib import Path
import torch
from cfpp_rt.distill import checkpoint
from cfpp_rt.distill.batch import Batch
from cfpp_rt.distill.processes import process_group, rank, shard
from cfpp_rt.distill.settings import StageSettings
from cfpp_rt.distill.train import Trainer
from cfpp_rt.errors import InputError, NonFiniteError
from tests.distill.tiny import tiny_model

fault, folder = sys.argv[1], Path(sys.argv[2])
with process_group("cpu"):
    student, ema = tiny_model().requires_grad_(True), tiny_model()
    for network in (student, ema):
        shard(network, torch.float32)

    class Stage:
        trained = {"student": student}

        def updates(self, next_batch, generator, step):
            here = step == 2 and rank() == 1
            if fault == "stop" and here:
                trainer.stop()
            loss = sum(p.to_local().square().sum() for p in student.parameters())
            yield "student", loss * (float("nan") if fault == "nan" and here else 1.0)

    Stage.ema = ema
    trainer = Trainer("ar", Stage(), StageSettings(steps=6, save_every=2, keep=9), lambda n: Batch(None), folder)
    if fault == "disk":
        save = checkpoint.save

        def full(folder, step, state, keep):
            if step == 4:
                raise InputError(f"{folder}: No space left on device")
            return save(folder, step, state, keep)

        checkpoint.save = full
    try:
        trainer.run(lambda text: None)
        print(f"<{rank()} left after {trainer.step}>", flush=True)
    except (NonFiniteError, InputError) as error:
        print(f"<{rank()} {type(error).__name__} after {trainer.step}: {error}>", flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "message", "kept"),
    [
        ("nan", "NonFiniteError after 2: stage ar, step 3: the loss of student is nan", [2]),
        ("stop", "left after 3", [2, 3]),
        ("disk", "InputError after 4: ", [2]),
    ],
)
def test_all_processes_end_together(tmp_path, fault, message, kept):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "worker.py").write_text(WORKER)
    root = Path(__file__).parents[2]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", str(port)]
    done = subprocess.run(
        [sys.executable, *torchrun, str(tmp_path / "worker.py"), fault, str(tmp_path / "out")],
        capture_output=True,
        text=True,
        timeout=120,
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for rank in range(2):
        assert f"<{rank} {message}" in done.stdout, done.stdout
    if fault == "disk":
        assert "No space left on device" in done.stdout
    assert list(checkpoint.checkpoints(tmp_path / "out")) == kept
