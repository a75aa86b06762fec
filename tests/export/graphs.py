"""Small ONNX graphs with a cache, made by hand: sound ones, and ones with a planted fault."""

from pathlib import Path

import numpy as np

from cfpp_rt.export.contract import GraphSpec, TensorSpec

B, H, S, C, D, L = 1, 2, 8, 32, 16, 2
DIM = H * D


def cached_attention(path: Path, dtype: str = "float16", fault: str = "", external: bool = False) -> Path:
    """L layers of projection, rotation, cache update, attention over the valid part of the cache, projection.

    fault: "no length", "no update", "circular", "two updates", "shared cache", "decomposed", "unused input",
    "keys as values", "past keys" or none.
    external: weights in a file beside the graph.
    """
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    kind = {"float32": TensorProto.FLOAT, "float16": TensorProto.FLOAT16, "bfloat16": TensorProto.BFLOAT16}[dtype]
    nodes, constants = [], []
    inputs = {"x": [B, S, DIM], "cos": [B, S, D // 2], "sin": [B, S, D // 2]}
    outputs = {"y": [B, S, DIM]}

    def node(op, args, out, **attributes):
        nodes.append(helper.make_node(op, args, [out], name=f"{op}_{out}", **attributes))
        return out

    def integers(name, values):
        constants.append(helper.make_tensor(name, TensorProto.INT64, [len(values)], values))
        return name

    def project(x, name):
        values = [((37 * i + 11 * len(constants)) % 101 - 50) / (50 * DIM**0.5) for i in range(DIM * DIM)]
        array = np.array(values).reshape(DIM, DIM).astype(helper.tensor_dtype_to_np_dtype(kind))
        constants.append(numpy_helper.from_array(array, f"weight_{name}"))
        return node("MatMul", [x, f"weight_{name}"], name)

    def split(x):
        return node("Transpose", [node("Reshape", [x, heads], f"{x}_split")], f"{x}_heads", perm=[0, 2, 1, 3])

    def rotate(x):
        return node("RotaryEmbedding", [x, "cos", "sin"], f"{x}_rotated", interleaved=1)

    def update(layer, name, new):
        cache = f"{name}_{layer}"
        inputs[cache] = [B, H, C, D]
        if fault == "no update" and layer == 1 and name == "values":
            outputs[f"{cache}_out"] = [B, H, C, D]
            rest = node("Slice", [cache, integers("from", [S]), integers("to", [C]), integers("axis", [2])], "rest")
            return node("Concat", [rest, new], f"{cache}_out", axis=2)
        outputs[f"{cache}_out"] = [B, H, C, D]
        mode = "circular" if fault == "circular" else "linear"
        return node("TensorScatter", [cache, new, "slot"], f"{cache}_out", axis=-2, mode=mode)

    heads, flat = integers("heads", [0, 0, H, D]), integers("flat", [0, 0, -1])
    x = "x"
    for layer in range(L):
        q, k, v = (split(project(x, f"{name}{layer}")) for name in "qkv")
        keys, values = update(layer, "keys", rotate(k)), update(layer, "values", v)
        if fault == "two updates" and layer == 0:
            outputs["again"] = [B, H, C, D]
            node("TensorScatter", ["keys_0", v, "slot"], "again", axis=-2)
        if fault == "shared cache" and layer == 1:
            keys, values = "keys_0_out", "values_0_out"
        if fault == "keys as values" and layer == 1:
            values = keys
        if fault == "decomposed" and layer == 1:
            scores = node("MatMul", [rotate(q), node("Transpose", [keys], "turned", perm=[0, 1, 3, 2])], "scores")
            y = node("MatMul", [node("Softmax", [scores], "weights", axis=-1), values], "a1")
        else:
            length = [] if fault == "no length" else ["", "", "", "length"]
            y = node("Attention", [rotate(q), keys, values, *length], f"a{layer}")
            if fault == "past keys" and layer == 1:
                del nodes[-1].input[3:]
                nodes[-1].input.extend(["", "keys_0", "values_0"])
                nodes[-1].output.extend(["present_keys", "present_values"])
        y = node("Reshape", [node("Transpose", [y], f"{y}_turned", perm=[0, 2, 1, 3]), flat], f"{y}_flat")
        x = node("Add", [x, project(y, f"o{layer}")], "y" if layer == L - 1 else f"x{layer + 1}")
    ports = [helper.make_tensor_value_info(name, kind, shape) for name, shape in inputs.items()]
    ports += [helper.make_tensor_value_info(name, TensorProto.INT64, [B]) for name in ("slot", "length")]
    if fault == "unused input":
        ports.append(helper.make_tensor_value_info("action", TensorProto.INT64, [B]))
    results = [helper.make_tensor_value_info(name, kind, shape) for name, shape in outputs.items()]
    graph = helper.make_graph(nodes, "cached_attention", ports, results, constants)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 24)], ir_version=10)
    onnx.checker.check_model(model)
    onnx.save_model(model, path, save_as_external_data=external, location=f"{path.name}.data", size_threshold=64)
    return path


def contract(dtype: str = "float16") -> GraphSpec:
    """The contract of the sound graph."""
    caches = [f"{name}_{layer}" for layer in range(L) for name in ("keys", "values")]
    x, turn, index = (B, S, DIM), (B, S, D // 2), (B,)
    inputs = [TensorSpec("x", x, dtype), TensorSpec("cos", turn, dtype), TensorSpec("sin", turn, dtype)]
    inputs += [TensorSpec("slot", index, "int64", 0, C - S), TensorSpec("length", index, "int64", S, C)]
    inputs += [TensorSpec(name, (B, H, C, D), dtype) for name in caches]
    outputs = [TensorSpec("y", x, dtype)]
    outputs += [TensorSpec(f"{name}_out", (B, H, C, D), dtype, updates=name) for name in caches]
    return GraphSpec("cached_attention", tuple(inputs), tuple(outputs))
