import argparse

import pytest
import torch

from cfpp_rt.bench.latency import workload


@pytest.fixture
def world() -> workload.Workload:
    """A world-sized student with random weights and a request of 8 frames."""
    parser = argparse.ArgumentParser()
    workload.add_arguments(parser)
    threads = torch.get_num_threads()
    yield workload.build(parser.parse_args(["--random-weights", "--model", "world", "--frames", "8"]))
    torch.set_num_threads(threads)
