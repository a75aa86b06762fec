"""What fits: the KV cache is the one large allocation that depends on the request, so it is checked beforehand."""

from pathlib import Path

import torch

from cfpp_rt.cache import CacheShape, KVCache
from cfpp_rt.config import RolloutConfig
from cfpp_rt.errors import OutOfMemoryError
from cfpp_rt.ring import FrameRing
from cfpp_rt.values import KV_DTYPES

# Activations of one pass, next to weights and cache; below this much the run would die later with a worse message.
_HEADROOM_BYTES = 256 << 20


def available_bytes(device: torch.device) -> int | None:
    """Free memory of the device, or None where the system does not tell."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    meminfo = Path("/proc/meminfo")
    if not meminfo.exists():
        return None
    fields = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    free = int(fields["MemAvailable"].split()[0]) << 10
    limit, used = (Path("/sys/fs/cgroup", name) for name in ("memory.max", "memory.current"))  # of a container
    if limit.exists() and used.exists() and (text := limit.read_text().strip()).isdigit():
        free = min(free, int(text) - int(used.read_text()))
    return free


def require_cache_fits(shape: CacheShape, dtype: torch.dtype, device: torch.device, rollout: RolloutConfig) -> None:
    """Raise OutOfMemoryError, saying which window would fit, if the cache does not fit in free memory."""
    available = available_bytes(device)
    per_frame = shape.bytes_per_frame(dtype, None if rollout.kv_dtype is None else KV_DTYPES[rollout.kv_dtype])
    wanted = per_frame * shape.frames
    if available is None or wanted + _HEADROOM_BYTES <= available:
        return
    block, fits = rollout.frames_per_block, max(available - _HEADROOM_BYTES, 0) // per_frame
    spare = block if rollout.refresh == "fused" else 0
    window = fits // block * block - spare
    least = rollout.sinks + block
    remedy = f"a window of {window} frames fits" if window >= least else "a smaller picture or batch is needed"
    raise OutOfMemoryError(
        f"the KV cache of {shape.frames} frames x batch {shape.batch} needs {wanted / 2**30:.2f} GiB on {device},"
        f" {available / 2**30:.2f} GiB are free: {remedy}"
    )


def allocate(
    shape: CacheShape, ring: FrameRing, dtype: torch.dtype, device: torch.device, rollout: RolloutConfig
) -> KVCache:
    """The cache of a rollout. Raises OutOfMemoryError, if possible before anything is taken."""
    require_cache_fits(shape, dtype, device, rollout)
    return KVCache(shape, ring, dtype, device, None if rollout.kv_dtype is None else KV_DTYPES[rollout.kv_dtype])


def give_back(device: torch.device) -> None:
    """Return to the device what torch keeps of freed memory."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
