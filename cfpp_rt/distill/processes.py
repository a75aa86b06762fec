"""The processes of one training run: torchrun starts them; each has its rows of a batch and a shard of every network.

A single process is rank 0 of 1; these functions then leave everything as it is.
"""

import contextlib
import datetime
import gc
import os
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import CausalWanTransformer

_WAIT = datetime.timedelta(minutes=30)  # a checkpoint or a first compilation takes minutes


def rank() -> int:
    """Return the rank of this process, 0 if it is alone."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes of the run."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Join the process group of torchrun, if torchrun started this process, and yield the device of this process.

    device: cpu, cuda, or auto (cuda if there is a GPU). Raise InputError if the device cannot be used.
    """
    kind = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if kind == "cuda" and not torch.cuda.is_available():
        raise InputError("device must be cpu or auto here, got cuda: no GPU can be used")
    started = "WORLD_SIZE" in os.environ and "RANK" in os.environ
    here = torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)) if started else 0) if kind == "cuda" else None
    if here is not None:
        if here.index >= torch.cuda.device_count():
            raise InputError(f"torchrun started more processes here than the {torch.cuda.device_count()} GPUs")
        torch.cuda.set_device(here)
    if not started or int(os.environ["WORLD_SIZE"]) == 1:
        yield here or torch.device(kind)
        return
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=_WAIT, device_id=here)
    try:
        yield here or torch.device(kind)
    finally:
        gc.collect()  # sharded networks refer to the group in cycles; its threads must end now, not at exit
        dist.destroy_process_group()


def mean(value: Tensor) -> Tensor:
    """Return the mean of a scalar over all processes; NaN in one process is NaN in all."""
    if world_size() == 1:
        return value
    total = value.detach().double()
    dist.all_reduce(total)
    return total / world_size()


def any_of(flag: bool, device: torch.device) -> bool:
    """Return True if the flag is set in any process."""
    if world_size() == 1:
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def shard(network: CausalWanTransformer, dtype: torch.dtype) -> None:
    """Shard a network among the processes, in place (FSDP2): each block is gathered in `dtype` when it runs.

    Shards keep their dtype, float32 for trained networks, and gradients are summed in float32. Inputs are not cast,
    because timesteps are float32.
    """
    if world_size() == 1:
        return
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh("cuda" if dist.get_backend() == "nccl" else "cpu", (world_size(),))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in (*network.blocks, network):
        fully_shard(module, mesh=mesh, mp_policy=policy)
        register_fsdp_forward_method(module, "forward_sequence")


def gather(network: nn.Module) -> None:
    """Gather all blocks of a sharded network for many passes in a row, until `release` or a backward pass."""
    for part in _sharded(network):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def release(network: nn.Module) -> None:
    """Free the blocks that `gather`, or a pass without a backward pass, has gathered."""
    for part in _sharded(network):
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


def full_state(value: Any) -> Any:
    """Return a nested state with shards replaced by full tensors, on the CPU. All processes must call this.

    Processes other than rank 0 get None in their place, as only rank 0 writes.
    """
    if isinstance(value, dict):
        return {name: full_state(item) for name, item in value.items()}
    if isinstance(value, list):
        return [full_state(item) for item in value]
    if hasattr(value, "full_tensor"):
        full = value.full_tensor()
        return full.cpu() if rank() == 0 else None
    return value


def full_tensor(value: Tensor) -> Tensor:
    """Return the full tensor of a sharded one, such as the norm of sharded gradients; other tensors as they are."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """Return this process's shard of a full tensor, sharded as `like` is; `value` itself if `like` is not sharded."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return the state dict of an optimiser with its full tensors replaced by this process's shards."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    shards = {
        index: {name: shard_like(v, parameters[index]) if torch.is_tensor(v) else v for name, v in entries.items()}
        for index, entries in state["state"].items()
    }
    return {**state, "state": shards}


def _sharded(network: nn.Module) -> list[Any]:
    if world_size() == 1:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in network.modules() if isinstance(module, FSDPModule)]
