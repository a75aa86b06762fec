"""Stores clips of the world as a folder of shards, from which the trajectories of stage ode are made.

python -m cfpp_rt.world.dataset --config configs/world.yaml --clips 1000 --out outputs/world/clips
"""

import argparse
import multiprocessing
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from cfpp_rt.distill.data.shards import Column, ShardWriter
from cfpp_rt.distill.settings import Settings
from cfpp_rt.errors import InputError
from cfpp_rt.world.codec import PatchCodec, fit_codec
from cfpp_rt.world.data_source import WorldDataSource

_BATCH = 4
_Rows = dict[str, NDArray[Any]]
_sources: list[WorldDataSource] = []  # the data source of a worker process


def write(config: Path, clips: int, out: Path, jobs: int = 1, codec: PatchCodec | None = None) -> None:
    """Write the first clips of a config's data source, in batches of 4: latents, actions and cell weights.

    clips: number of clips, a multiple of 4.
    out: a new folder.
    jobs: number of worker processes.
    codec: None = fit the codec of the config, which takes seconds.
    Raise InputError for another number of clips, or a config whose data source is not the world's.
    """
    if clips < _BATCH or clips % _BATCH:
        raise InputError(f"clips must be a multiple of {_BATCH}, got {clips}")
    if jobs < 1:
        raise InputError(f"jobs must be >= 1, got {jobs}")
    data = Settings.read(config).data
    if data["source"] != "cfpp_rt.world.data_source:open_data_source":
        raise InputError(f"{config}: data.source must be the world's, got {data['source']}")
    codec = codec or fit_codec(data["seed"])
    data_source = WorldDataSource(codec, data["seed"], _BATCH, data["frames"])

    kinds = {name: Column.of(torch.from_numpy(values[0])) for name, values in _rows(data_source, 0).items()}
    pool = multiprocessing.get_context("fork").Pool(jobs, _init_worker, (data_source,))
    with ShardWriter(out, kinds, rows_per_shard=256) as writer, pool:
        for rows in pool.imap(_worker_rows, range(clips // _BATCH), chunksize=16):
            for i in range(_BATCH):
                writer.add({name: torch.from_numpy(values[i]) for name, values in rows.items()})


def _init_worker(data_source: WorldDataSource) -> None:
    torch.set_num_threads(1)
    _sources.append(data_source)


def _worker_rows(position: int) -> _Rows:
    return _rows(_sources[0], position)


def _rows(data_source: WorldDataSource, position: int) -> _Rows:
    """Return a batch as arrays: unlike tensors, they need no file each to get to another process."""
    batch = data_source(position)
    columns = {"latents": batch.latents, "actions": batch.condition.actions, "weights": batch.weights}
    return {name: values.numpy() for name, values in columns.items() if values is not None}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="YAML")
    parser.add_argument("--clips", type=int, default=1000, help="default: %(default)s")
    parser.add_argument("--jobs", type=int, default=1, help="number of worker processes (default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="a new folder")
    arguments = parser.parse_args()
    try:
        write(arguments.config, arguments.clips, arguments.out, arguments.jobs)
    except InputError as error:
        parser.error(str(error))
    print(f"{arguments.out}: {arguments.clips} clips")


if __name__ == "__main__":
    main()
