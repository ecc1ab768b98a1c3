"""Some cases for every reader of what others wrote; `python -m tests.fuzz` has any number.

What the long runs found has a test of its own in tests/test_hostile.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from stages.errors import UserError
from tests.fuzz import inputs
from tests.fuzz.harness import holds, run
from tests.fuzz.targets import TARGETS, Target, nothing

CASES = 15


@pytest.mark.parametrize("name", TARGETS)
def test_some_cases(name: str, tmp_path: Path) -> None:
    cases = max(4, round(CASES * TARGETS[name].share))
    assert run(name, TARGETS[name], tmp_path, cases) > cases / 2


@pytest.mark.parametrize("name", [name for name, target in TARGETS.items() if target.extremes])
def test_what_is_beyond_chance(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """100,000 levels, a header of 2^60 bytes, aliases without end, pickles."""
    folder, work = tmp_path / "in" / name, tmp_path / "work"
    folder.mkdir(parents=True)
    work.mkdir()
    TARGETS[name].prepare(folder)
    monkeypatch.chdir(work)
    for what, case in inputs.EXTREMES.items():
        try:
            holds(TARGETS[name], folder, case)
        except BaseException as error:
            error.add_note(what)
            raise


def fails(folder: Path, case: bytes) -> None:
    raise KeyError("a mistake of the reader")


def writes_outside(folder: Path, case: bytes) -> None:
    (folder.parent / "elsewhere").touch()


def does_not_say_where(folder: Path, case: bytes) -> None:
    raise UserError("wrong")


def never_ends(folder: Path, case: bytes) -> None:
    while True:
        pass


def takes_all_memory(folder: Path, case: bytes) -> None:
    bytes(1 << 36)


@pytest.mark.parametrize(
    "read", [fails, writes_outside, does_not_say_where, never_ends, takes_all_memory]
)
def test_a_reader_that_breaks_is_found(
    read, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.fuzz.harness.SECONDS", 0.2)
    target = Target(inputs.values.map(inputs.as_json), nothing, read, names=("file",))
    with pytest.raises(BaseException):  # noqa: B017 (each raises its own)
        run("broken", target, tmp_path, 3)
