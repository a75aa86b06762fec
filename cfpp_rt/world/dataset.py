"""Clips of the world as a folder of training data, for what has to be stored: the trajectories of stage ode.

python -m cfpp_rt.world.dataset --config configs/world.yaml --clips 1000 --out outputs/world/clips
"""

import argparse
from pathlib import Path

from cfpp_rt.distill.data.shards import Column, ShardWriter
from cfpp_rt.distill.settings import Settings
from cfpp_rt.errors import InputError
from cfpp_rt.world.feed import open_feed

_BATCH = 4


def write(config: Path, clips: int, out: Path) -> None:
    """The first clips that training of this config is fed with: latents, actions and cell weights.

    clips: a multiple of 4. Raises InputError for another number, or a config whose data is not the world's.
    """
    if clips < _BATCH or clips % _BATCH:
        raise InputError(f"clips must be a multiple of {_BATCH}, got {clips}")
    data = Settings.read(config).data
    if data["source"] != "cfpp_rt.world.feed:open_feed":
        raise InputError(f"{config}: data.source must be the world's, got {data['source']}")
    feed = open_feed(batch=_BATCH, **{name: value for name, value in data.items() if name != "source"})

    def columns(position: int) -> dict:
        batch = feed(position)
        return {"latents": batch.latents, "actions": batch.condition.actions, "weights": batch.weights}

    kinds = {name: Column.of(values[0]) for name, values in columns(0).items()}
    with ShardWriter(out, kinds, rows_per_shard=256) as writer:
        for position in range(clips // _BATCH):
            rows = columns(position)
            for i in range(_BATCH):
                writer.add({name: values[i] for name, values in rows.items()})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="YAML")
    parser.add_argument("--clips", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    arguments = parser.parse_args()
    try:
        write(arguments.config, arguments.clips, arguments.out)
    except InputError as error:
        parser.error(str(error))
    print(f"{arguments.out}: {arguments.clips} clips")


if __name__ == "__main__":
    main()
