"""Writes the transformer's ONNX graphs from its weights: the counterpart of `cfpp_rt.model`, op for op.

Tokens are [B, F, T, dim] throughout, so that a frame's modulation rows [B, F, 1, dim] broadcast. Norms, modulation,
gates and rotation are computed in float32 and rounded once, as in the runtime's ops.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from cfpp_rt.export.contract import GraphSpec, Sizes, caches_of_layer, text_names, updated
from cfpp_rt.export.float8 import FILL, FLOAT8, SMALLEST, UNIT, is_float8, quantize_weight
from cfpp_rt.export.graph_builder import GraphBuilder, WeightFile, onnx_type
from cfpp_rt.model.attention import CrossAttention
from cfpp_rt.model.block import TransformerBlock
from cfpp_rt.model.transformer import CausalWanTransformer, sinusoid


def build_graph(
    model: CausalWanTransformer,
    sizes: Sizes,
    spec: GraphSpec,
    weights: WeightFile,
    times: Tensor,
    linear_dtype: str | None = None,
) -> Any:
    """Return the ModelProto of one graph of the contract.

    times: float64 [sizes.num_timesteps]. The timesteps that the input `timestep` indexes.
    linear_dtype: FLOAT8 for the linear layers of the blocks in 8 bits; None = sizes.dtype.
    """
    writer = GraphWriter(model, sizes, spec, weights, linear_dtype)
    if spec.name == "embed_time":
        writer.embed_time(times)
    elif spec.name == "embed_text":
        writer.embed_text()
    else:
        writer.run_pass()
    return writer.graph.model()


@dataclasses.dataclass(frozen=True)
class _Positions:
    """The names of the values that encode the positions of a pass's tokens, S = F * T.

    cos, sin: float32 [B, S, D / 2]. The rotary embedding.
    projections: float32 [B, F, 2, 4, 4]. P and P^-1 of each frame; "" for a model without the camera branch.
    """

    cos: str
    sin: str
    projections: str


class GraphWriter:
    """Writes one graph. Methods take and return names of values; `frames` is the number of latent frames in a value."""

    def __init__(
        self, model: CausalWanTransformer, sizes: Sizes, spec: GraphSpec, weights: WeightFile, linear_dtype: str | None
    ):
        self.graph = GraphBuilder(spec, weights)
        self.net, self.sizes, self.spec = model, sizes, spec
        self.eps = model.config.eps
        self._linear_dtype = linear_dtype
        self._masks: set[str] = set()  # names of the masks in the graph
        self._codes: dict[str, tuple[str, str]] = {}  # input of a linear -> its codes / 512, and the size of its tokens

    # -- layers ------------------------------------------------------------------------------------------------------

    def linear(self, x: str, layer: nn.Module, name: str) -> str:
        """A linear layer, in 8 bits if `is_float8` says so. name: that of the layer in checkpoints."""
        if self._linear_dtype == FLOAT8 and is_float8(name):
            y = self.float8_product(x, layer, name)
        else:
            y = self.graph.op("MatMul", x, self.graph.weight(f"{name}.weight", layer.get_parameter("weight").T))
        return self.graph.op("Add", y, self.graph.weight(f"{name}.bias", layer.get_parameter("bias")))

    def float8_product(self, x: str, layer: nn.Module, name: str) -> str:
        """The product of x and the weights, both in 8 bits; see `cfpp_rt.export.float8`."""
        graph = self.graph
        names = f"{name}.weight", f"{name}.weight_scale"
        if names[0] not in graph.weights.placed:  # else another graph has written them
            codes, scale = quantize_weight(layer.get_parameter("weight"))
            graph.weights.add(names[0], codes.T, FLOAT8)
            graph.weights.add(names[1], scale)
        weight = [graph.stored(name) for name in names]
        if x not in self._codes:  # queries, keys and values have one input
            wide = graph.cast(x, "float32")
            size = graph.op("ReduceMax", graph.op("Abs", wide), graph.integers([-1]), keepdims=1)
            size = graph.op("Max", graph.op("Mul", size, self.number(FILL)), self.number(SMALLEST))
            unit = graph.op("Div", wide, size)
            unit = graph.op("QuantizeLinear", unit, self.number(UNIT), output_dtype=onnx_type(FLOAT8))
            self._codes[x] = graph.op("DequantizeLinear", unit, self.number(UNIT, self.sizes.dtype)), size
        unit, size = self._codes[x]
        y = graph.op("MatMul", unit, graph.op("DequantizeLinear", *weight, axis=1))
        return graph.cast(graph.op("Mul", graph.cast(y, "float32"), size), self.sizes.dtype)

    def number(self, value: float, dtype: str = "float32") -> str:
        """A scalar constant."""
        return self.graph.weight(f"{dtype}.{value:.9g}", torch.tensor(value, dtype=torch.float64), dtype)

    def layer_norm(self, x: str, scale: str, *bias: str) -> str:
        """LayerNorm(x), float32."""
        wide = self.graph.cast(x, "float32")
        return self.graph.op("LayerNormalization", wide, scale, *bias, axis=-1, epsilon=self.eps)

    def modulate(self, x: str, shift: str, factor: str) -> str:
        """LayerNorm(x) * factor + shift, rounded once. factor, shift: float32; factor is 1 + scale."""
        ones = self.graph.weight("ones", torch.ones(self.net.config.dim), "float32")
        y = self.graph.op("Add", self.graph.op("Mul", self.layer_norm(x, ones), factor), shift)
        return self.graph.cast(y, self.sizes.dtype)

    def add_gated(self, x: str, y: str, gate: str) -> str:
        """x + y * gate, rounded once. gate: float32."""
        x, y = (self.graph.cast(value, "float32") for value in (x, y))
        return self.graph.cast(self.graph.op("Add", x, self.graph.op("Mul", y, gate)), self.sizes.dtype)

    def silu(self, x: str) -> str:
        """x * sigmoid(x)."""
        return self.graph.op("Mul", x, self.graph.op("Sigmoid", x))

    def normed(self, x: str, norm: nn.RMSNorm, name: str) -> str:
        """RMSNorm(x) over the model width, float32."""
        scale = self.graph.weight(f"{name}.weight", norm.weight, "float32")
        wide = self.graph.cast(x, "float32")
        return self.graph.op("RMSNormalization", wide, scale, axis=-1, epsilon=self.eps)

    def split_heads(self, x: str, tokens: int) -> str:
        """x [B, ..., dim] of `tokens` tokens as [B, H, S, D]."""
        config = self.net.config
        x = self.graph.reshape(x, self.sizes.batch, tokens, config.num_heads, config.head_dim)
        return self.graph.op("Transpose", x, perm=[0, 2, 1, 3])

    def join_heads(self, x: str, frames: int) -> str:
        """x [B, H, S, D] as [B, F, T, dim]."""
        x = self.graph.op("Transpose", x, perm=[0, 2, 1, 3])
        return self.graph.reshape(x, self.sizes.batch, frames, self.sizes.tokens_per_frame, self.net.config.dim)

    def rotate(self, x: str, frames: int, positions: _Positions) -> str:
        """The rotary embedding of x [B, F, T, dim], as [B, H, S, D]."""
        x = self.split_heads(x, frames * self.sizes.tokens_per_frame)
        x = self.graph.op("RotaryEmbedding", x, positions.cos, positions.sin, interleaved=1)
        return self.graph.cast(x, self.sizes.dtype)

    def project(self, x: str, frames: int, positions: _Positions, *, inverse: bool, transposed: bool) -> str:
        """Each 4 channels of x [B, F, T, dim], as a row vector, times P or P^-1 of their frame, or its transpose."""
        graph, sizes = self.graph, self.sizes
        matrices = graph.op("Gather", positions.projections, graph.integers([int(inverse)]), axis=2)
        matrices = graph.reshape(matrices, sizes.batch, frames, 4, 4)
        if transposed:
            matrices = graph.op("Transpose", matrices, perm=[0, 1, 3, 2])
        rows = graph.reshape(x, sizes.batch, frames, sizes.tokens_per_frame * self.net.config.dim // 4, 4)
        rows = graph.op("MatMul", graph.cast(rows, "float32"), matrices)
        rows = graph.reshape(rows, sizes.batch, frames, sizes.tokens_per_frame, self.net.config.dim)
        return graph.cast(rows, sizes.dtype)

    # -- embeddings --------------------------------------------------------------------------------------------------

    def embed_time(self, times: Tensor) -> None:
        """The graph embed_time. times: see `build_graph`."""
        graph, net, sizes = self.graph, self.net, self.sizes
        dim, block, batch = net.config.dim, sizes.frames_per_block, sizes.batch
        waves = graph.weight("time_waves", sinusoid(times, net.config.freq_dim))
        e = self.linear(graph.op("Gather", waves, "timestep"), net.time_embedding[0], "time_embedding.0")
        e = self.linear(self.silu(e), net.time_embedding[2], "time_embedding.2")
        e = graph.reshape(e, 1, 1, dim)
        if net.config.num_actions:
            embedding = graph.weight("action_embedding.weight", net.action_embedding.weight)
            e = graph.op("Add", e, graph.op("Gather", embedding, "actions"))
        else:
            e = graph.expand(e, batch, block, dim)
        rows = self.linear(self.silu(e), net.time_projection[1], "time_projection.1")
        rows = graph.cast(graph.reshape(rows, batch, block, 1, 6, dim), "float32")
        of_layers = torch.cat([layer.modulation for layer in net.blocks]).float()  # [L, 6, dim]
        of_layers = of_layers + torch.tensor([0.0, 1, 0, 0, 1, 0], device=of_layers.device)[:, None]
        of_head = net.head.modulation.float() + torch.tensor([[0.0], [1]], device=of_layers.device)
        rows = graph.op("Add", rows, graph.weight("modulation.blocks", of_layers, "float32"))
        rows = graph.reshape(rows, batch, block, 6 * net.config.num_layers, dim)
        head = graph.cast(graph.reshape(e, batch, block, 1, dim), "float32")
        head = graph.op("Add", head, graph.weight("modulation.head", of_head, "float32"))
        graph.op("Concat", rows, head, axis=2, name="modulation")

    def embed_text(self) -> None:
        """The graph embed_text."""
        graph, net = self.graph, self.net
        text = self.linear(graph.cast("embeds", self.sizes.dtype), net.text_embedding[0], "text_embedding.0")
        text = graph.op("Gelu", text, approximate="tanh")
        text = self.linear(text, net.text_embedding[2], "text_embedding.2")
        names = iter(text_names(net.config.num_layers))
        for index, layer in enumerate(net.blocks):
            cross, graph.scope = _cross(layer), f"blocks.{index}.cross_attn"
            keys = self.linear(text, cross.k, f"{graph.scope}.k")
            keys = graph.cast(self.normed(keys, cross.norm_k, f"{graph.scope}.norm_k"), self.sizes.dtype)
            values = self.linear(text, cross.v, f"{graph.scope}.v")
            for value in (keys, values):
                graph.op("Identity", self.split_heads(value, net.config.text_len), name=next(names))

    # -- passes ------------------------------------------------------------------------------------------------------

    def run_pass(self) -> None:
        """The graph of a pass: step, refresh or fused."""
        graph, net, sizes = self.graph, self.net, self.sizes
        fused, refresh, last = self.spec.name == "fused", self.spec.name == "refresh", net.config.num_layers - 1
        frames = sizes.frames_per_block * (2 if fused else 1)
        rows = graph.split("modulation", sizes.modulation_rows, axis=2)
        positions = self.positions(frames)
        x = self.patchify(frames)
        for index, layer in enumerate(net.blocks):
            graph.scope = f"blocks.{index}"
            own = rows[6 * index : 6 * index + 6]
            normed = self.modulate(x, own[0], own[1])
            caches = self.write(normed, layer, index, frames, positions)
            if refresh and index == last:
                return
            if fused and index == last:  # from here on only the noisy block is wanted
                frames = sizes.frames_per_block
                x, normed, *own = (graph.split(value, 2, axis=1)[1] for value in (x, normed, *own))
                parts = dataclasses.astuple(positions)
                positions = _Positions(*(graph.split(value, 2, axis=1)[1] if value else "" for value in parts))
            y = self.attend(normed, layer, frames, positions, caches)
            x = self.after_attention(x, y, layer, frames, own, index)
        graph.scope = "head"
        head = rows[-2:] if not fused else [graph.split(row, 2, axis=1)[1] for row in rows[-2:]]
        x = self.linear(self.modulate(x, head[0], head[1]), net.head.head, "head.head")
        self.unpatchify(x)

    def patchify(self, frames: int) -> str:
        """Latents to tokens. A convolution whose kernel equals its stride is a product with flattened patches."""
        graph, sizes, config = self.graph, self.sizes, self.net.config
        (height, width), (_, p, q) = sizes.latent_size, config.patch_size
        x = graph.cast("latents", sizes.dtype)
        if (p, q) == (1, 1):
            x = graph.reshape(x, sizes.batch, frames, config.in_dim, sizes.tokens_per_frame)
            x = graph.op("Transpose", x, perm=[0, 1, 3, 2])
        else:
            x = graph.reshape(x, sizes.batch * frames, config.in_dim, height // p, p, width // q, q)
            x = graph.op("Transpose", x, perm=[0, 2, 4, 1, 3, 5])
            x = graph.reshape(x, sizes.batch, frames, sizes.tokens_per_frame, config.in_dim * p * q)
        weight = graph.weight("patch_embedding.weight", self.net.patch_embedding.weight.flatten(1).T)
        x = graph.op("MatMul", x, weight)
        return graph.op("Add", x, graph.weight("patch_embedding.bias", self.net.patch_embedding.get_parameter("bias")))

    def unpatchify(self, x: str) -> None:
        """Tokens to the output `velocity`."""
        graph, sizes, config = self.graph, self.sizes, self.net.config
        (height, width), (_, p, q) = sizes.latent_size, config.patch_size
        x = graph.cast(x, "float32")
        x = graph.reshape(x, sizes.batch * sizes.frames_per_block, height // p, width // q, p, q, config.out_dim)
        x = graph.op("Transpose", x, perm=[0, 5, 1, 3, 2, 4])
        graph.reshape(x, sizes.batch, sizes.frames_per_block, config.out_dim, height, width, name="velocity")

    def positions(self, frames: int) -> _Positions:
        """The tables of all tokens, from the input `rope_time` and the constant tables of rows and columns."""
        graph, sizes = self.graph, self.sizes
        grid = self.net.rotary_tables(*sizes.latent_size)
        (rows, pairs), columns = grid.rows.shape[:2], grid.columns.shape[0]
        space = torch.cat(
            [
                grid.rows[:, None].expand(rows, columns, pairs, 2),
                grid.columns[None].expand(rows, columns, pairs, 2),
            ],
            dim=2,
        ).flatten(0, 1)  # [T, n_row + n_column, 2]
        tables = []
        for part, kind in enumerate(("cos", "sin")):
            time = graph.op("Gather", "rope_time", graph.integers([part]), axis=2)
            time = graph.reshape(time, frames, 1, sizes.time_pairs)
            time = graph.expand(time, frames, sizes.tokens_per_frame, sizes.time_pairs)
            grid_part = graph.weight(f"rope_space.{kind}", space[..., part], "float32")
            grid_part = graph.expand(grid_part, frames, sizes.tokens_per_frame, space.shape[1])
            table = graph.op("Concat", time, grid_part, axis=2)
            table = graph.reshape(table, 1, frames * sizes.tokens_per_frame, sizes.time_pairs + space.shape[1])
            if sizes.batch > 1:
                table = graph.expand(
                    table, sizes.batch, frames * sizes.tokens_per_frame, sizes.time_pairs + space.shape[1]
                )
            tables.append(table)
        return _Positions(tables[0], tables[1], "projections" if self.net.config.camera else "")

    def write(self, x: str, layer: TransformerBlock, index: int, frames: int, positions: _Positions) -> list[str]:
        """Write keys and values of the block (in a fused pass: of the finished block) to the caches of the layer.

        Return the values that attention reads: the updated caches, in a fused pass followed by those of the noisy
        block.
        """
        graph, attention, name = self.graph, layer.self_attn, f"blocks.{index}.self_attn"
        tokens = frames * self.sizes.tokens_per_frame
        keys = self.normed(self.linear(x, attention.k, f"{name}.k"), attention.norm_k, f"{name}.norm_k")
        values = self.linear(x, attention.v, f"{name}.v")
        new = [self.rotate(keys, frames, positions), self.split_heads(values, tokens)]
        if self.net.config.camera:
            projected = [self.project(t, frames, positions, inverse=True, transposed=True) for t in (keys, values)]
            new += [self.split_heads(t, tokens) for t in projected]
        caches = []
        for value, cache in zip(new, caches_of_layer(self.net.config, index), strict=True):
            appended = None
            if self.spec.name == "fused":
                value, appended = graph.split(value, 2, axis=2)
            value = graph.op("TensorScatter", cache, value, "write_index", name=updated(cache), axis=-2, mode="linear")
            caches.append(value if appended is None else graph.op("Concat", value, appended, axis=2))
        return caches

    def attend(self, x: str, layer: TransformerBlock, frames: int, positions: _Positions, caches: list[str]) -> str:
        """Self-attention of the tokens x with its output projection, plus the camera branch where there is one."""
        attention, name = layer.self_attn, f"{self.graph.scope}.self_attn"
        q = self.normed(self.linear(x, attention.q, f"{name}.q"), attention.norm_q, f"{name}.norm_q")
        q_rotated = self.rotate(q, frames, positions)
        y = self.visible_attention(q_rotated, caches[0], caches[1], frames, f"{name}.Attention")
        y = self.linear(y, attention.o, f"{name}.o")
        if attention.prope_o is None:
            return y
        q = self.project(q, frames, positions, inverse=False, transposed=False)
        q = self.split_heads(q, frames * self.sizes.tokens_per_frame)
        z = self.visible_attention(q, caches[2], caches[3], frames, f"{name}.camera.Attention")
        z = self.project(z, frames, positions, inverse=False, transposed=True)
        return self.graph.op("Add", y, self.linear(z, attention.prope_o, f"{name}.prope_o"))

    def visible_attention(self, q: str, keys: str, values: str, frames: int, name: str) -> str:
        """Attention of q [B, H, S, D] to the visible keys, as [B, F, T, dim]."""
        visible = (self.mask(frames),) if self.spec.name == "fused" else ("", "", "", "valid")
        return self.join_heads(self.graph.op("Attention", q, keys, values, *visible, name=name), frames)

    def mask(self, frames: int) -> str:
        """The attention mask of a fused pass, [1, 1, Sq, Skv]: `visible`, repeated for every token of a slot."""
        graph, sizes = self.graph, self.sizes
        groups, slots = frames // sizes.frames_per_block, sizes.slots + sizes.frames_per_block
        name = f"mask.{groups}"
        if name in self._masks:
            return name
        self._masks.add(name)
        visible = "visible" if groups == 2 else graph.split("visible", 2, axis=0)[1]
        mask = graph.reshape(visible, groups, 1, slots, 1)
        mask = graph.expand(
            mask, groups, sizes.frames_per_block * sizes.tokens_per_frame, slots, sizes.tokens_per_frame
        )
        return graph.reshape(mask, 1, 1, frames * sizes.tokens_per_frame, slots * sizes.tokens_per_frame, name=name)

    def after_attention(self, x: str, y: str, layer: TransformerBlock, frames: int, rows: list[str], index: int) -> str:
        """The rest of a block: add self-attention y to x, then cross-attention and the feed-forward."""
        graph = self.graph
        _, _, gate1, shift2, factor2, gate2 = rows
        x = self.add_gated(x, y, gate1)
        if layer.cross_attn is not None:
            cross, name = layer.cross_attn, f"{graph.scope}.cross_attn"
            affine = [
                graph.weight(f"{graph.scope}.norm3.{part}", getattr(layer.norm3, part), "float32")
                for part in ("weight", "bias")
            ]
            normed = graph.cast(self.layer_norm(x, *affine), self.sizes.dtype)
            q = self.normed(self.linear(normed, cross.q, f"{name}.q"), cross.norm_q, f"{name}.norm_q")
            q = self.split_heads(graph.cast(q, self.sizes.dtype), frames * self.sizes.tokens_per_frame)
            text = text_names(self.net.config.num_layers)[2 * index :]
            y = graph.op("Attention", q, text[0], text[1], name=f"{name}.Attention")
            x = graph.op("Add", x, self.linear(self.join_heads(y, frames), cross.o, f"{name}.o"))
        y = self.linear(self.modulate(x, shift2, factor2), layer.ffn[0], f"{graph.scope}.ffn.0")
        y = self.linear(graph.op("Gelu", y, approximate="tanh"), layer.ffn[2], f"{graph.scope}.ffn.2")
        return self.add_gated(x, y, gate2)


def _cross(layer: TransformerBlock) -> CrossAttention:
    assert layer.cross_attn is not None
    return layer.cross_attn
