"""Loading of checkpoints: every public layout is mapped to the same tensor names, which are checked strictly.

Accepted: Causal Forcing `.pt` containers (`generator_ema`, `generator`, FSDP and compile prefixes), bare state dicts,
`.safetensors`, what `cfpp convert` writes (`.safetensors` with its `.json` beside), the Wan2.1 directory
(`config.json`, `diffusion_pytorch_model*.safetensors`) and its diffusers layout (`transformer/`).
"""

import dataclasses
import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cfpp_rt.config import ModelConfig
from cfpp_rt.errors import CheckpointError
from cfpp_rt.io.checkpoint import read_sharded, read_tensors, require_exact
from cfpp_rt.model.transformer import CausalWanTransformer

CONTAINER_KEYS = ("generator_ema", "generator")
_WRAPPERS = re.compile(r"_fsdp_wrapped_module\.|_checkpoint_wrapped_module\.|_orig_mod\.")
_WEIGHTS_STEM = "diffusion_pytorch_model"
_CAMERA_BRANCH = "blocks.0.self_attn.prope_o.weight"

# diffusers' WanTransformer3DModel -> the original names; applied in order, whole name segments only.
_FROM_DIFFUSERS = (
    ("condition_embedder.time_embedder.linear_1", "time_embedding.0"),
    ("condition_embedder.time_embedder.linear_2", "time_embedding.2"),
    ("condition_embedder.text_embedder.linear_1", "text_embedding.0"),
    ("condition_embedder.text_embedder.linear_2", "text_embedding.2"),
    ("condition_embedder.time_proj", "time_projection.1"),
    ("proj_out", "head.head"),
    ("attn1", "self_attn"),
    ("attn2", "cross_attn"),
    ("to_out.0", "o"),
    ("to_q", "q"),
    ("to_k", "k"),
    ("to_v", "v"),
    ("norm2", "norm3"),
    ("ffn.net.0.proj", "ffn.0"),
    ("ffn.net.2", "ffn.2"),
)


def _from_diffusers(name: str) -> str:
    if name == "scale_shift_table":
        return "head.modulation"
    name = name.replace(".scale_shift_table", ".modulation")
    for theirs, ours in _FROM_DIFFUSERS:
        name = re.sub(rf"(^|\.){re.escape(theirs)}(\.|$)", rf"\g<1>{ours}\g<2>", name)
    return name


def plain_names(state: dict[str, Tensor], source: str | Path) -> dict[str, Tensor]:
    """Return a state dict under the original names: prefixes of wrappers removed, names of diffusers mapped."""
    names = {name: _WRAPPERS.sub("", name).removeprefix("model.") for name in state}
    if any(name.startswith("condition_embedder.") for name in names.values()):
        names = {name: _from_diffusers(plain) for name, plain in names.items()}
    plain = {names[name]: tensor for name, tensor in state.items()}
    if len(plain) != len(state):
        raise CheckpointError(f"{source}: several tensors have the same name once wrapper prefixes are removed")
    return plain


def _unpack(content: dict[str, Any], source: Path, key: str | None) -> dict[str, Tensor]:
    """Return the flat state dict of a container. key: None = generator_ema, else generator, else a bare dict."""
    if key is not None and key not in content:
        raise CheckpointError(f"{source}: wanted key {key!r}, found {', '.join(map(str, list(content)[:4]))}")
    found = key or next((name for name in CONTAINER_KEYS if name in content), None)
    state = content[found] if found else content
    flat = isinstance(state, dict) and all(isinstance(k, str) and isinstance(v, Tensor) for k, v in state.items())
    if not flat or not state:
        wanted = " or ".join(CONTAINER_KEYS)
        raise CheckpointError(f"{source}: wanted a state dict, bare or under {wanted}, found none")
    return plain_names(state, source)


def _count_layers(state: dict[str, Tensor]) -> int:
    """Return the number of blocks in a state dict. Raises ValueError unless they are numbered 0, 1, 2, ..."""
    numbers = {name.split(".")[1] for name in state if name.startswith("blocks.")}
    gaps = [number for number in range(len(numbers)) if str(number) not in numbers]
    if gaps:
        others = sorted(numbers - {str(number) for number in range(len(numbers))})
        raise ValueError(f"has no blocks.{gaps[0]}, but blocks.{others[-1][:20]}")
    return len(numbers)


def infer_config(state: dict[str, Tensor], source: str | Path) -> ModelConfig:
    """Infer the sizes from the tensors. Head size 128 and text length 512, as in all of Wan2.1, are assumed."""
    try:
        dim, in_dim, *patch = state["patch_embedding.weight"].shape
        if dim % 128:
            raise ValueError(f"its width must be a multiple of 128 where no config tells the heads, got {dim}")
        out = state["head.head.weight"].shape[0]
        layers = _count_layers(state)
        return ModelConfig(
            dim=dim,
            in_dim=in_dim,
            patch_size=(patch[0], patch[1], patch[2]),
            out_dim=out // (patch[0] * patch[1] * patch[2]),
            ffn_dim=state["blocks.0.ffn.0.weight"].shape[0],
            freq_dim=state["time_embedding.0.weight"].shape[1],
            text_dim=state["text_embedding.0.weight"].shape[1],
            num_heads=dim // 128,
            num_layers=layers,
            camera=_CAMERA_BRANCH in state,
        )
    except (KeyError, ValueError, IndexError) as error:
        raise CheckpointError(f"{source}: not a causal Wan transformer ({error})") from error


def read_weights(
    path: str | Path, *, config: ModelConfig | None = None, key: str | None = None
) -> tuple[dict[str, Tensor], ModelConfig]:
    """Read a state dict under the original names, memory-mapped and on the CPU, and its config; the match is exact.

    path: a file or directory as listed above.
    config: sizes, where neither a config file nor the tensors tell them. Whether there is a camera branch is read off
        the tensors, since public config files do not know it.
    key: entry of a `.pt` container; None = generator_ema if there, else generator, else a bare dict.
    Raises CheckpointError naming the file, the key and both shapes.
    """
    path = Path(path)
    if path.is_dir():
        folder = path / "transformer" if (path / "transformer").is_dir() else path
        state = _unpack(read_sharded(folder, _WEIGHTS_STEM), folder, None)
        beside = folder / "config.json"
    else:
        state = _unpack(read_tensors(path), path, key)
        beside = path.with_suffix(".json")
    if config is None:
        config = ModelConfig.from_json(beside) if beside.exists() else infer_config(state, path)
    config = dataclasses.replace(config, camera=config.camera or _CAMERA_BRANCH in state)
    try:
        layers = _count_layers(state)
    except ValueError:  # a gap in the names: the config bounds the modules, and the comparison names the fault
        layers = 0
    if layers not in (0, config.num_layers):  # before so many modules are made
        raise CheckpointError(
            f"{path}: num_layers of the config must be {layers}, as in the weights, got {config.num_layers}"
        )
    with torch.device("meta"):
        wanted = {name: tuple(p.shape) for name, p in CausalWanTransformer(config).named_parameters()}
    require_exact(state, wanted, path)
    return state, config


def load_model(
    path: str | Path,
    *,
    config: ModelConfig | None = None,
    key: str | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> CausalWanTransformer:
    """Load a model in eval mode, its weights in `dtype` on `device`. Other arguments and errors: see `read_weights`."""
    state, config = read_weights(path, config=config, key=key)
    return build_model(state, config, dtype=dtype, device=device)


def build_model(
    state: dict[str, Tensor], config: ModelConfig, *, dtype: torch.dtype, device: torch.device | str
) -> CausalWanTransformer:
    """Build a model in eval mode from a state dict of exactly its names; tensors are converted one by one."""
    with torch.device("meta"):
        model = CausalWanTransformer(config)
    model.load_state_dict({name: t.to(device, dtype) for name, t in state.items()}, strict=True, assign=True)
    return model.eval().requires_grad_(False)
