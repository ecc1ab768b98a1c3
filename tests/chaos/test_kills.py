"""A few kills of each sort; `python -m tests.chaos` makes a hundred, also of the real stages."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.chaos import kills
from tests.chaos.clone import Clone

WHICH = [
    pytest.param("run", "flow", marks=pytest.mark.long),
    ("run", "all"),
    pytest.param("repro", "dvc", marks=pytest.mark.long),
    ("worker", "flow"),
]


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Clone]:
    made = Clone(tmp_path_factory.mktemp("chaos") / "clone", "quick")
    yield made
    made.close()


@pytest.mark.parametrize(("driver", "victim"), WHICH)
def test_one_plain_run_mends_a_kill(clone: Clone, driver: str, victim: str) -> None:
    """Outputs are those of an undisturbed run, nothing goes on, and no run is left Running."""
    one = kills.kill(clone, 7, len(driver), (driver, victim), within=0.6)
    assert one.found and one.wrong == []
