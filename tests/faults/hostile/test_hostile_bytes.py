"""1 MiB of hostile bytes at every door costs time in proportion to its length, and no more."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from faults.hostile.doors import DOORS, MIB, shapes


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.defect("F63")
def test_a_door_takes_or_refuses_every_hostile_shape_in_linear_time(door: str) -> None:
    """All shapes within 30 seconds of processor time: what is quadratic would take hours."""
    answer = subprocess.run(
        [sys.executable, "-m", "faults.hostile.doors", door],
        env=dict(os.environ) | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (0, "") == (answer.returncode, answer.stderr[-3_000:])


def test_the_shapes_are_as_large_as_they_are_meant_to_be() -> None:
    """Not one is far below a mebibyte, and no two are the same."""
    found = list(shapes())
    assert [] == [name for name, given in found if len(given) < MIB // 2]
    assert len(found) == len({given for _, given in found})
