"""The table of `cfpp doctor` and the extras of pyproject.toml name the same packages."""

import re
from pathlib import Path

import pytest

from cfpp_rt.cli.doctor import DISTRIBUTIONS, EXTRAS
from cfpp_rt.ops.attention_libraries import FLASH_MODULES

tomllib = pytest.importorskip("tomllib", reason="Python 3.11 or newer reads TOML")

ROOT = Path(__file__).parent.parent
DECLARED = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]


def distributions(extra: str) -> set[str]:
    """Names on PyPI that pyproject.toml lists for an extra, without those that come by way of another extra."""
    names = {re.split(r"[\s\[<>=;]", requirement, maxsplit=1)[0] for requirement in DECLARED[extra]}
    return names - {"cfpp-rt"}


def test_every_extra_but_dev_stands_in_the_table():
    assert set(EXTRAS) == set(DECLARED) - {"dev"}


@pytest.mark.parametrize("extra", EXTRAS)
def test_an_extra_brings_the_modules_of_its_row(extra: str):
    assert {DISTRIBUTIONS.get(module, module.replace("_", "-")) for module in EXTRAS[extra]} == distributions(extra)


def test_every_flash_attention_is_in_an_extra_or_built_from_source():
    named = {module for modules in EXTRAS.values() for module in modules}
    assert {module for _, module in FLASH_MODULES} - named == {"flash_attn_interface"}


def test_extras_that_others_include_exist():
    for requirements in DECLARED.values():
        for listed in re.findall(r"cfpp-rt\[([\w,-]+)\]", " ".join(requirements)):
            assert set(listed.split(",")) <= set(DECLARED)
