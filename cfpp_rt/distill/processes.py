"""The processes of one run: started by torchrun, each with its rows of every batch and its shard of every network.

A process alone is rank 0 of 1, and nothing here does anything to it.
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

_WAIT = datetime.timedelta(minutes=30)  # for the slowest process: a checkpoint or a first compilation takes minutes


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def process_group(device: str = "auto") -> Iterator[torch.device]:
    """Take part in the run that torchrun started, if it did; yields this process's device.

    device: cpu, cuda, or auto: cuda where there is one. Raises InputError where it cannot be used.
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
        gc.collect()  # sharded networks hold the group in cycles: its threads are to end here, not with the interpreter
        dist.destroy_process_group()


def mean(value: Tensor) -> Tensor:
    """The mean of a scalar over all processes; not a number anywhere is not a number everywhere."""
    if world_size() == 1:
        return value
    total = value.detach().double()
    dist.all_reduce(total)
    return total / world_size()


def any_of(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    if world_size() == 1:
        return flag
    raised = torch.tensor(int(flag), device=device)
    dist.all_reduce(raised, op=dist.ReduceOp.MAX)
    return bool(raised)


def shard(network: CausalWanTransformer, dtype: torch.dtype) -> None:
    """Share a network out among the processes, in place: each block is gathered when it runs, in `dtype`.

    The shards stay in the dtype they have, float32 for what is trained, and gradients are summed in float32. Inputs
    are not cast: timesteps are float32.
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
    """Keep all of a sharded network here, for many passes in a row, until `release` or a backward pass."""
    for part in _sharded(network):
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()


def release(network: nn.Module) -> None:
    """Let go of what `gather`, or a pass that no backward pass followed, left here."""
    for part in _sharded(network):
        part.set_reshard_after_forward(True, recurse=False)
        part.reshard()


def full_state(value: Any) -> Any:
    """A nested state with every shard replaced by the whole tensor, on the CPU. A call of all processes."""
    if isinstance(value, dict):
        return {name: full_state(one) for name, one in value.items()}
    if isinstance(value, list):
        return [full_state(one) for one in value]
    if hasattr(value, "full_tensor"):
        full = value.full_tensor()
        return full.cpu() if rank() == 0 else None  # rank 0 writes: the others need no memory for it
    return value


def full_tensor(value: Tensor) -> Tensor:
    """A gradient norm, which is a tensor of its own kind where the gradients are sharded."""
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def shard_like(value: Tensor, like: Tensor) -> Tensor:
    """This process's part of a whole tensor, sharded as `like` is; `value` itself where `like` is not."""
    if not hasattr(like, "full_tensor") or value.shape != like.shape:
        return value
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def shard_optimizer_state(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """A whole state dict of an optimiser as the one of this process."""
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
