"""How many threads a command takes, and that its OpenMP threads sleep while they wait."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cfpp_rt.config import MODELS, PRESETS
from cfpp_rt.device.threads import SMALL_PRODUCT, largest_product, set_thread_count, thread_count
from cfpp_rt.pipeline import choose_threads
from cfpp_rt.world.student import load_world_pipeline

ROOT = Path(__file__).parent.parent
NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "GOMP_SPINCOUNT")


@pytest.fixture
def threads(monkeypatch):
    """Four threads, without a choice of the user; what the test sets is undone."""
    before = torch.get_num_threads()
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_the_largest_product():
    assert largest_product(MODELS["wan-1.3b"], 1560) == 2 * 1560 * 1536 * 8960


def test_a_small_product_takes_one_thread(threads):
    assert thread_count(SMALL_PRODUCT - 1) == 1 and thread_count(SMALL_PRODUCT) is None
    set_thread_count(SMALL_PRODUCT)
    assert torch.get_num_threads() == 4
    set_thread_count(SMALL_PRODUCT - 1)
    assert torch.get_num_threads() == 1


@pytest.mark.parametrize(("value", "count"), [("3", 3), ("3,2", 3), ("", 1), ("many", 1)])
def test_the_users_number_wins(threads, monkeypatch, value, count):
    monkeypatch.setenv("OMP_NUM_THREADS", value)
    assert thread_count(1) == count
    assert thread_count(SMALL_PRODUCT) == (count if count > 1 else None)


def test_the_world_takes_one_thread_and_wan_all(threads):
    pipeline = load_world_pipeline()
    choose_threads(pipeline, pipeline.config, (480, 832), batch=8)
    assert torch.get_num_threads() == 4
    choose_threads(pipeline, pipeline.config, (48, 48))
    assert torch.get_num_threads() == 1
    for config in PRESETS.values():
        assert thread_count(largest_product(MODELS["wan-1.3b"], config.frames_per_block * 1560)) is None


def python(code, **environment):
    """Run code in a fresh process with only these of `NAMES` set, and return the JSON that it prints."""
    inherited = {name: value for name, value in os.environ.items() if name not in NAMES}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env={**inherited, **environment}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


COMMAND = """
import builtins, json, os, sys
from cfpp_rt.cli.main import main
plain, seen = builtins.__import__, []
def watching(name, *rest, **options):
    if name == "torch" and not seen:
        seen.append(os.environ.get("OMP_WAIT_POLICY"))
    return plain(name, *rest, **options)
builtins.__import__ = watching
main(["doctor"])
print(json.dumps([seen, os.environ.get("OMP_WAIT_POLICY"), os.environ.get("OMP_NUM_THREADS")]))
"""


def test_a_command_sets_the_wait_policy_before_it_imports_torch():
    (seen, policy, count), log = python(COMMAND, OMP_DISPLAY_ENV="verbose")
    assert seen == ["passive"] and policy == "passive" and count is None
    if "GOMP_SPINCOUNT" in log:  # GNU's OpenMP has read it
        assert "GOMP_SPINCOUNT = '0'" in log


def test_the_users_wait_policy_wins():
    (seen, policy, count), _ = python(COMMAND, OMP_WAIT_POLICY="active", OMP_NUM_THREADS="2")
    assert seen == ["active"] and policy == "active" and count == "2"


def test_importing_the_package_changes_nothing():
    code = "import json, os; before = dict(os.environ); import cfpp_rt.pipeline, cfpp_rt.device.threads, torch;"
    code += "count = torch.get_num_threads(); print(json.dumps([before == dict(os.environ), count]))"
    plain = "import json, torch; print(json.dumps(torch.get_num_threads()))"
    assert python(code)[0] == [True, python(plain)[0]]


def test_the_suite_runs_on_the_threads_of_its_environment():
    assert os.environ["OMP_NUM_THREADS"] and os.environ["OMP_WAIT_POLICY"]
