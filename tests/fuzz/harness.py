"""What must be true of every reader, and running cases."""

from __future__ import annotations

import contextlib
from pathlib import Path
from random import Random
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings

from stages.errors import UserError, printable
from tests.bounded import bounded
from tests.fuzz.inputs import spoil
from tests.fuzz.targets import Target

SECONDS = 30.0  # for one case, on a machine that does other things too
MEGABYTES = 1024
LETTERS = 20_000  # of a message


def holds(target: Target, folder: Path, case: Any) -> None:
    """Have a reader read a case: it returns, or says what is wrong as a UserError.

    Whatever else it raises is raised; so is what it takes beyond SECONDS and MEGABYTES, and an
    AssertionError for a message that names nothing or could move a cursor, and for a file beside
    the folder or in the working directory.
    """
    with bounded(SECONDS, MEGABYTES):
        try:
            target.read(folder, case)
        except UserError as error:
            said = str(error)
            assert said.strip() and printable(said) == said and len(said) < LETTERS, said[:200]
            if target.names:
                assert any(name in said for name in target.names), said
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert not list(Path.cwd().iterdir()), list(Path.cwd().iterdir())


def run(
    name: str, target: Target, root: Path, cases: int, *, number: int | None = None, near: int = 0
) -> int:
    """Run some cases; how many were read.

    Args:
        name: of the reader.
        target: the reader.
        root: an empty folder to work in.
        cases: how many.
        number: a seed, for other cases than those that the suite has each time.
        near: neighbours of each case that is bytes, which are read too: Hypothesis takes ten times
            as long to think of a case as a reader to read it.

    Raises:
        Whatever a reader raised, with the case in its notes; a small one where near is 0.
    """
    folder, work = root / name / "in" / name, root / name / "work"
    folder.mkdir(parents=True)
    work.mkdir()
    target.prepare(folder)
    done = 0

    @settings(
        max_examples=-(-cases // (near + 1)) if target.extremes else cases,
        derandomize=number is None,
        database=None,
        deadline=None,
        # A case with neighbours is not made smaller: each step would read all of them.
        phases=[Phase.generate] if near else [Phase.generate, Phase.shrink],
        suppress_health_check=list(HealthCheck),
    )
    @given(case=target.cases)
    def read(case: Any) -> None:
        nonlocal done
        chance = Random(repr(case))
        for one in [case, *(spoil(chance, case) for _ in range(near if target.extremes else 0))]:
            done += 1
            try:
                holds(target, folder, one)
            except BaseException as error:
                error.add_note(f"read: {one!r}")
                raise

    with contextlib.chdir(work):
        (read if number is None else seed(number)(read))()
    return done
