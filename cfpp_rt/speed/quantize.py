"""Matrix products of the blocks in 8 bits: weights are quantised once, tokens per call, without calibration data."""

from torch import nn

from cfpp_rt.errors import InputError
from cfpp_rt.model.transformer import CausalWanTransformer
from cfpp_rt.ops.adaln_modulate import adaln_modulate_quantized
from cfpp_rt.ops.gated_residual import gated_residual_quantized
from cfpp_rt.speed.float8 import Float8Linear, require_float8
from cfpp_rt.speed.fuse import fuse_qkv
from cfpp_rt.speed.int8 import Int8Linear, require_int8
from cfpp_rt.values import LINEAR_DTYPES


def quantize_linears(model: CausalWanTransformer, dtype: str, *, emulated: bool = False) -> CausalWanTransformer:
    """Compute the linear layers of the tokens of every block in 8 bits, in place; for inference, and approximate.

    dtype: "float8_e4m3" on a GPU (by torch._scaled_mm; the norms then quantise their output) or "int8" on a CPU (by
        oneDNN).
    emulated: compute float8 in float32 arithmetic, on any device and for any dtype of the model, to measure the loss
        of accuracy.

    The input projections of self-attention (packed, see `fuse_qkv`), the query projection of cross-attention, the
    output projections of both and the feed-forward are quantised. Layers that run once per prompt or step list, the
    patch embedding and the head are not.

    `state_dict` names and shapes change: load weights first. Raises InputError for another dtype, for a device without
    these products, and for a model that requires gradients or is quantised already.
    """
    if dtype not in LINEAR_DTYPES or (emulated and dtype != "float8_e4m3"):
        wanted = "'float8_e4m3' where emulated" if emulated else f"one of {', '.join(LINEAR_DTYPES)}"
        raise InputError(f"linear dtype must be {wanted}, got {dtype!r}")
    if model.patch_embedding.weight.requires_grad:
        raise InputError("quantize_linears: model must not require gradients; call model.requires_grad_(False)")
    if isinstance(model.blocks[0].ffn[2], Float8Linear | Int8Linear):
        raise InputError("quantize_linears: model must not be quantised already")
    if not emulated:
        (require_float8 if dtype == "float8_e4m3" else require_int8)(model.device, model.dtype)
    fuse_qkv(model)
    for block in model.blocks:
        attn, cross, ffn = block.self_attn, block.cross_attn, block.ffn
        linears: list[tuple[nn.Module, str]] = [(attn, "qkv"), (attn, "o")]
        linears += [] if attn.prope_o is None else [(attn, "prope_o")]
        linears += [] if cross is None else [(cross, "q"), (cross, "o")]
        for module, name in linears:
            linear = getattr(module, name)
            setattr(module, name, Float8Linear(linear, emulated=emulated) if dtype != "int8" else Int8Linear(linear))
        if dtype == "int8":
            ffn[0], ffn[1], ffn[2] = Int8Linear(ffn[0]), nn.GELU(approximate="tanh"), Int8Linear(ffn[2])
            continue
        ffn[0], ffn[1] = Float8Linear(ffn[0], emulated=emulated), nn.Identity()
        ffn[2] = Float8Linear(ffn[2], gelu=True, emulated=emulated)
        block.modulate, block.add_and_modulate = adaln_modulate_quantized, gated_residual_quantized
    return model
