"""Releases that are tried on top of the lock: the environment of each, and the page."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests import versions
from tests.versions import Row


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(versions, "FOLDER", tmp_path)
    monkeypatch.setattr(versions, "PAGE", tmp_path / "page.md")
    return tmp_path


def test_an_environment_has_its_own_over_those_below(folder: Path) -> None:
    bin = versions.environment("one")
    packages = next((bin.parent / "lib").glob("python*/site-packages"))
    (packages / "tabulate.py").write_text("HERE = True\n")
    versions.programs(bin)
    script = "import sys, yaml, tabulate, flows; print(sys.prefix, tabulate.HERE)"
    said = subprocess.check_output([bin / "python", "-c", script], text=True)
    assert said.split() == [str(bin.parent), "True"]
    assert subprocess.check_output([bin / "dvc", "--version"], text=True).startswith("3.")
    assert (bin / "olivepress").read_text().startswith(f"#!{bin / 'python'}\n")


def test_the_page_has_a_row_for_each_release_newest_first(folder: Path) -> None:
    versions.keep(Row("dvc", "3.9.1", "no", seen="a \\| b"))
    versions.keep(Row("dvc", "3.67.1", "yes", "fails", "1 failed", "why"))
    versions.keep(Row("olive-ai", "0.13.0", "yes", "passes", "9 passed"))
    versions.keep(Row("dvc", "3.67.1", "yes", "passes", "9 passed"))
    rows = [
        line
        for line in (folder / "page.md").read_text().splitlines()
        if "0.13" in line or "3." in line
    ]
    assert [row.split(" | ")[1] for row in rows if row.startswith("| ")] == [
        *("0.13.0", "3.67.1", "3.9.1")
    ]
    assert [row.passes for row in versions.known()] == [True, True, False]
    assert versions.known()[-1].seen == "a \\| b"
    assert not Row("dvc", "1.0", "yes", "passes", "1 passed, 1 failed").passes


def test_the_line_that_says_why() -> None:
    said = (
        "quantize: /a/b/c.json: not found\nERROR: failed to reproduce 'quantize': exited with 1\n"
    )
    assert versions._last(said, "rror") == "quantize: c.json: not found"
    assert versions._last("E  ModuleNotFoundError: a|b\nmore\n", "Error").endswith("a\\|b")
    assert versions._last("", "rror") == ""
