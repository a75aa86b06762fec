"""Stored clips of the world are those that training is fed with."""

from pathlib import Path

import pytest
import torch

from cfpp_rt.distill.data.data_source import open_data_source as open_shards
from cfpp_rt.distill.settings import Settings
from cfpp_rt.errors import InputError
from cfpp_rt.world.data_source import open_data_source
from cfpp_rt.world.dataset import write

CONFIG = Path(__file__).parents[2] / "configs" / "world.yaml"


def test_stored_clips_equal_those_made_while_training(tmp_path):
    data = {key: value for key, value in Settings.read(CONFIG).data.items() if key != "source"}
    data_source = open_data_source(batch=4, **data)
    write(CONFIG, 8, tmp_path / "clips", jobs=2, codec=data_source.codec)
    made = [data_source(position) for position in range(2)]
    stored = open_shards(batch=8, folder=str(tmp_path / "clips"))(0)  # shuffled
    for name in ("latents", "weights"):
        wanted = torch.cat([getattr(batch, name) for batch in made])
        assert torch.equal(wanted.unique(dim=0), getattr(stored, name).unique(dim=0)), name
    actions = torch.cat([batch.condition.actions for batch in made])
    assert torch.equal(actions.unique(dim=0), stored.condition.actions.unique(dim=0))


def test_a_number_of_clips_that_makes_no_batches_is_refused(tmp_path):
    with pytest.raises(InputError, match="clips must be a multiple of 4, got 6"):
        write(CONFIG, 6, tmp_path / "clips")
    assert not list(tmp_path.iterdir())
