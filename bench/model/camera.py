"""Time the camera branch of one transformer layer.

One block of Wan-1.3B's width at 480x832 (1560 tokens per latent frame) with random weights: a pass of `--block` frames
over `--visible` frames of a full cache, without and with cameras, timed interleaved. Camera attention has a KV cache of
its own, so attention is computed twice, and there is one more output projection. "matrices" is the remaining part: the
4 x 4 matrix per frame that is applied to queries, keys, values and the attention output.

    python -m cfpp_rt.bench.model.camera [--device cpu] [--dtype bfloat16] [--block 4] [--visible 4 20] [--json PATH]
"""

import dataclasses
from collections.abc import Callable

import torch

from cfpp_rt.bench import harness
from cfpp_rt.cache import CacheShape, KVCache
from cfpp_rt.config import MODELS
from cfpp_rt.core.camera import Cameras, parse_trajectory
from cfpp_rt.core.frame_ring import FrameRing
from cfpp_rt.model.attention import AttentionMetadata, CameraMetadata, per_frame
from cfpp_rt.model.projections import Projections
from cfpp_rt.model.transformer import CausalWanTransformer, random_model
from cfpp_rt.values import DTYPES


def attention_metadata(
    model: CausalWanTransformer, block: int, visible: int, cameras: Projections
) -> tuple[KVCache, AttentionMetadata]:
    """Return a full cache of `visible` latent frames, and the metadata of a pass that rewrites its last block."""
    tokens = model.config.tokens_per_frame(*harness.LATENT_480P)
    ring = FrameRing(0, visible, block)
    shape = CacheShape.of(model.config, 1, visible, tokens, camera=True)
    cache = KVCache(shape, ring, model.dtype, model.device)
    for data in (cache.data, cache.camera_data):
        if data is not None:
            data.normal_()
    for start in range(0, visible, block):
        ring.write(start)
    own, tables = range(visible - block, visible), model.rotary_tables(*harness.LATENT_480P)
    return cache, AttentionMetadata(
        write_index=torch.tensor([[own.start * tokens]], dtype=torch.int32, device=model.device),
        ranges=cache.token_ranges([ring.visible(visible, None)]),
        rope_time=tables.time(own)[None],
        rope_rows=tables.rows,
        rope_columns=tables.columns,
        camera=CameraMetadata(cameras, torch.tensor(list(own), device=model.device)),
    )


@torch.inference_mode()
def main() -> None:
    parser = harness.parser(__doc__, device=True, json=True)
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--block", type=int, default=4, help="latent frames of the pass (default: %(default)s)")
    parser.add_argument(
        "--visible", type=int, nargs="+", default=[4, 20], help="visible latent frames, multiples of the block"
    )
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    device, dtype, block = torch.device(arguments.device), DTYPES[arguments.dtype], arguments.block

    config = dataclasses.replace(MODELS["wan-1.3b-camera"], num_layers=1)
    model = random_model(config, seed=0, dtype=dtype, device=str(device))
    x = torch.randn(1, block * config.tokens_per_frame(*harness.LATENT_480P), config.dim).to(device, dtype)
    time = model.embed_time(torch.full((block,), 1000.0)).blocks[0]
    text = model.embed_text(torch.randn(1, config.text_len, config.text_dim))[0]
    cameras = Projections.of(Cameras.of(parse_trajectory(f"w*{block}")[1:]), device)

    def layer(cache: KVCache, attn: AttentionMetadata) -> Callable[[], object]:
        return lambda: model.blocks[0](x, time, text, cache.layers[0], attn, 1)

    def matrices() -> None:
        for part in (cameras.matrices, cameras.inverses.mT, cameras.inverses.mT, cameras.matrices.mT):
            per_frame(x, part)

    rows = []
    print(f"{'visible':>8} {'without, ms':>12} {'with, ms':>10} {'ratio':>6} {'matrices, ms':>13}")
    for visible in arguments.visible:
        cache, attn = attention_metadata(model, block, visible, cameras)
        without = layer(cache, dataclasses.replace(attn, camera=None))
        calls = {"without": without, "with": layer(cache, attn), "matrices": matrices}
        times = harness.measure_interleaved(calls, device, rounds=arguments.rounds)
        ratio = times["with"].median_ms / times["without"].median_ms
        print(
            f"{visible:>8} {times['without'].median_ms:>12.1f} {times['with'].median_ms:>10.1f} {ratio:>6.2f}"
            f" {times['matrices'].median_ms:>13.1f}"
        )
        for name, measured in times.items():
            rows.append(
                {
                    "bench": "camera",
                    "contender": name,
                    "dtype": arguments.dtype,
                    "block": block,
                    "visible_frames": visible,
                    **dataclasses.asdict(measured),
                }
            )
    harness.record(rows, arguments.json, device)


if __name__ == "__main__":
    main()
