import argparse

import pytest
import torch

from cfpp_rt.bench import subject


@pytest.fixture
def world() -> subject.Subject:
    """A world-sized student of random weights and a request of 8 pictures."""
    parser = argparse.ArgumentParser()
    subject.add_arguments(parser)
    threads = torch.get_num_threads()
    yield subject.build(parser.parse_args(["--random-weights", "--model", "world", "--frames", "8"]))
    torch.set_num_threads(threads)
