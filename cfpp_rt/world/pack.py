"""Packs a finished training run as a student that `load_world_pipeline` reads.

python -m cfpp_rt.world.pack --config configs/world.yaml --run outputs/world/dmd --out cfpp_rt/world/weights
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import save_file

from cfpp_rt.distill.settings import Settings
from cfpp_rt.errors import InputError
from cfpp_rt.io.atomic import write_atomically
from cfpp_rt.world.codec import PatchCodec, fit_codec
from cfpp_rt.world.student import load_world_pipeline


def pack(
    config: Path, run: Path, out: Path, steps: Sequence[int] | None = None, codec: PatchCodec | None = None
) -> None:
    """Write the student of a run and its codec to a folder.

    config: the config of the run.
    steps: timesteps of the student's rollouts; None = those of the run.
    codec: None = fit the codec of the config again, which takes seconds.
    Raise InputError for a run that is not finished, CheckpointError for a run of another kind of student.
    """
    settings = Settings.read(config)
    out.mkdir(parents=True, exist_ok=True)
    for name in ("student.safetensors", "student.json"):
        if not (run / name).is_file():
            raise InputError(f"--run {run}: wanted a finished run, found no {name}")
    with write_atomically(out / "student.safetensors") as temporary:
        shutil.copyfile(run / "student.safetensors", temporary)
    metadata = json.loads((run / "student.json").read_text(encoding="utf-8"))
    if steps is not None:
        metadata["rollout"]["steps"] = list(steps)
    with write_atomically(out / "student.json") as temporary:
        temporary.write_text(json.dumps(metadata, indent=1) + "\n", encoding="utf-8")
    with write_atomically(out / "codec.safetensors") as temporary:
        save_file((codec or fit_codec(settings.data["seed"])).state_dict(), temporary)
    load_world_pipeline(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, type=Path, metavar="YAML", help="config of the run")
    parser.add_argument(
        "--run", required=True, type=Path, metavar="DIR", help="folder of the run, --out of cfpp distill"
    )
    parser.add_argument("--steps", type=int, nargs="+", help="timesteps of the rollouts (default: those of the run)")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR")
    arguments = parser.parse_args()
    try:
        pack(arguments.config, arguments.run, arguments.out, arguments.steps)
    except InputError as error:
        parser.error(str(error))
    print(f"{arguments.out}: {sum(path.stat().st_size for path in arguments.out.iterdir()) / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
