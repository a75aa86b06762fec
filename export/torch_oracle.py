"""The graphs of the contract computed in PyTorch, on the same inputs: the oracle of the parity gate."""

import copy

import numpy as np
import torch
from torch import Tensor

from cfpp_rt.cache import CacheShape, KVCache
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.export.bundle import Card
from cfpp_rt.export.contract import GraphSpec, caches_of_layer, text_names, updated
from cfpp_rt.export.runner import Array
from cfpp_rt.model.attention import AttentionMetadata, CameraMetadata
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import CausalWanTransformer, LayerText, TimeEmbedding
from cfpp_rt.ops.token_ranges import TokenRanges


def fixed_inputs(card: Card, spec: GraphSpec, seed: int = 0) -> dict[str, Array]:
    """Return inputs that exercise a graph: normal numbers, a write to the last slot, a mask that hides some slots."""
    random, sizes, n = np.random.default_rng(seed), card.sizes, card.sizes.frames_per_block
    inputs: dict[str, Array] = {}
    for tensor in spec.inputs:
        if tensor.name == "visible":
            value = np.ones(tensor.shape, bool)
            value[0, -n:] = False  # the finished block does not see the noisy one
            value[1, :n] = sizes.slots == n  # the noisy block sees all but the oldest
        elif tensor.name in ("write_index", "valid"):
            value = np.full(tensor.shape, tensor.high, np.int64)
        elif tensor.name == "projections":
            matrices = np.eye(4) + 0.2 * random.standard_normal((*tensor.shape[:2], 4, 4))
            value = np.stack([matrices, np.linalg.inv(matrices)], axis=2).astype(np.float32)
        elif tensor.low is not None and tensor.high is not None:
            value = random.integers(tensor.low, tensor.high + 1, tensor.shape)
        else:
            value = random.standard_normal(tensor.shape, dtype=np.float32)
            if tensor.name == "modulation":  # the model keeps these rows without the 1, in its own dtype
                value = (0.3 * value).astype(sizes.dtype).astype(np.float32)
                value[:, :, _factor_rows(sizes.model.num_layers)] += 1
            value = value.astype(tensor.dtype)
        inputs[tensor.name] = value
    return inputs


def run_in_torch(
    model: CausalWanTransformer, card: Card, spec: GraphSpec, inputs: dict[str, Array]
) -> dict[str, Array]:
    """Return every output of the graph, in the model's dtype, computed by the runtime's own network."""
    with torch.inference_mode():
        if spec.name == "embed_time":
            made = {"modulation": _modulation(model, card, inputs)}
        elif spec.name == "embed_text":
            text = model.embed_text(torch.from_numpy(inputs["embeds"]))
            made = dict(zip(text_names(len(text)), (t for pair in text if pair for t in pair), strict=True))
        else:
            made = _pass(model, card, spec, inputs)
    return {name: tensor.numpy() for name, tensor in made.items()}


def _factor_rows(layers: int) -> list[int]:
    """Return the rows of `modulation` that are 1 + scale."""
    return [row for row in range(6 * layers) if row % 6 in (1, 4)] + [6 * layers + 1]


def _modulation(model: CausalWanTransformer, card: Card, inputs: dict[str, Array]) -> Tensor:
    sizes = card.sizes
    timestep = torch.tensor([card.timesteps[int(inputs["timestep"][0])]] * sizes.frames_per_block)
    actions = torch.from_numpy(inputs["actions"]) if "actions" in inputs else None
    time = model.embed_time(timestep, actions)
    blocks = time.blocks.expand(-1, sizes.batch, -1, -1, -1).movedim(0, 2).flatten(2, 3)
    rows = torch.cat([blocks, time.head.expand(sizes.batch, -1, -1, -1)], dim=2).float()
    rows[:, :, _factor_rows(model.config.num_layers)] += 1
    return rows


def _pass(model: CausalWanTransformer, card: Card, spec: GraphSpec, inputs: dict[str, Array]) -> dict[str, Tensor]:
    sizes, layers, n = card.sizes, model.config.num_layers, card.sizes.frames_per_block
    fused = spec.name == "fused"
    # The model's forward writes every block. So the noisy block of a fused pass gets slots behind those of the graph.
    slots = sizes.slots + (n if fused else 0)
    shape = CacheShape.of(model.config, sizes.batch, slots, sizes.tokens_per_frame, camera=model.config.camera)
    cache = KVCache(shape, FrameRing(0, slots, n), model.dtype, "cpu")
    length = sizes.slots * sizes.tokens_per_frame
    caches = {}  # name -> the slots that the graph has too
    for layer in range(layers):
        parts = [*cache.data[layer], *(() if cache.camera_data is None else cache.camera_data[layer])]
        for name, part in zip(caches_of_layer(model.config, layer), parts, strict=True):
            caches[name] = part[:, :, :length]
            caches[name].copy_(torch.from_numpy(inputs[name]))
    write = torch.from_numpy(inputs["write_index"]).to(torch.int32)[:, None]
    if fused:
        write = torch.cat([write, torch.full_like(write, length)], dim=1)
        visible = [
            [(i * sizes.tokens_per_frame, (i + 1) * sizes.tokens_per_frame) for i in np.flatnonzero(r)]
            for r in inputs["visible"]
        ]
    else:
        visible = [[(0, int(inputs["valid"][0]) if "valid" in inputs else length)]]
    space = model.rotary_tables(*sizes.latent_size)
    attn = AttentionMetadata(
        write_index=write,
        ranges=TokenRanges.of(visible, capacity_tokens=slots * sizes.tokens_per_frame, batch=sizes.batch, device="cpu"),
        rope_time=torch.from_numpy(inputs["rope_time"])[None].expand(sizes.batch, -1, -1, -1).contiguous(),
        rope_rows=space.rows,
        rope_columns=space.columns,
        camera=_cameras(inputs, write // sizes.tokens_per_frame, n),
    )
    rows = torch.from_numpy(inputs["modulation"].copy())
    rows[:, :, _factor_rows(layers)] -= 1
    rows = rows.to(model.dtype)
    blocks = rows[:, :, : 6 * layers].unflatten(2, (layers, 6)).movedim(2, 0).contiguous()
    time = TimeEmbedding(blocks, rows[:, :, 6 * layers :].contiguous())
    velocity = model(
        torch.from_numpy(inputs["latents"]),
        time,
        _text(model, inputs),
        cache,
        attn,
        num_outputs=0 if spec.name == "refresh" else 1,
    )
    made = {} if velocity is None else {"velocity": velocity}
    return {**made, **{updated(name): part for name, part in caches.items()}}


def _cameras(inputs: dict[str, Array], slots: Tensor, frames_per_block: int) -> CameraMetadata | None:
    """slots: [B, G]. The first slot of each block of the pass."""
    if "projections" not in inputs:
        return None
    matrices, inverses = torch.from_numpy(inputs["projections"]).unbind(2)
    of_frames = (slots[0, :, None] + torch.arange(frames_per_block)).flatten().long()
    return CameraMetadata(Projections(matrices.contiguous(), inverses.contiguous()), of_frames)


def _text(model: CausalWanTransformer, inputs: dict[str, Array]) -> list[LayerText]:
    if not model.config.text_len:
        return [None] * model.config.num_layers
    names = iter(text_names(model.config.num_layers))
    read = [torch.from_numpy(inputs[name]).to(model.dtype) if name in inputs else None for name in names]
    return [(k, v) if k is not None and v is not None else None for k, v in zip(read[::2], read[1::2], strict=True)]


def with_plain_attention(model: CausalWanTransformer) -> CausalWanTransformer:
    """Return a copy of the model whose attention is plain PyTorch in the model's dtype: the measure of half precision.

    The runtime's attention keeps scores and weights in float32. onnxruntime's on the CPU rounds them to the dtype, as
    `_attention` does, with the same error; for a student with sharp attention it is several times that of the runtime.
    """
    model = copy.deepcopy(model)
    for block in model.blocks:
        block.self_attn.attend_to = _attention_to_ranges  # type: ignore[method-assign]
        if block.cross_attn is not None:
            block.cross_attn.attend_to = _attention  # type: ignore[method-assign]
    return model


def _attention(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attention of q [B, H, S, D], rounded after every step."""
    scores = (q @ keys.mT) * q.shape[-1] ** -0.5
    return scores.softmax(dim=-1) @ values


def _attention_to_ranges(q: Tensor, keys: Tensor, values: Tensor, ranges: TokenRanges) -> Tensor:
    assert ranges.host_ranges is not None  # the model is on the CPU
    groups = []
    for rows, spans in zip(q.chunk(len(ranges), dim=2), ranges.host_ranges, strict=True):
        visible = [torch.cat([cache[:, :, first:end] for first, end in spans], dim=2) for cache in (keys, values)]
        groups.append(_attention(rows, *visible))
    return torch.cat(groups, dim=2).transpose(1, 2).flatten(2)
