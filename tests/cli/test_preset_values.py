"""Every preset's effective values, held against a committed table: a change of a field's default must not move them."""

import json
from pathlib import Path

import pytest

from kvlock_fast.config import PRESETS, LockConfig

TABLE = json.loads((Path(__file__).parent / "preset_values.json").read_text())


def test_the_table_has_every_preset():
    assert set(TABLE) == set(PRESETS)


@pytest.mark.parametrize("name", PRESETS)
def test_values_of_a_preset(name):
    assert json.loads(json.dumps(LockConfig.preset(name).as_dict())) == TABLE[name]
