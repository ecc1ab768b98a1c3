"""Try releases of the libraries that matter most, each on top of the lock, and write the page.

    python -m tests.versions                        # the two latest of each: docs/versions.md
    python -m tests.versions --only dvc==3.66.1     # one row
    python -m tests.versions --latest               # all of them new at once, for `make upgrade`

Each release gets an environment of its own in `.versions/`: the library and what pip says that it
needs, over the packages of the environment that runs this. Then the whole pipeline makes the
built-in model, whose gates compare the quantized model with the base and the exported one with
PyTorch, and the tests of what is built on that library run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
from dataclasses import asdict, dataclass
from pathlib import Path

REPO = Path(__file__).resolve().parents[1]
FOLDER = REPO / ".versions"
PAGE = REPO / "docs/versions.md"
MODELS = ["test_packed", "test_awq", "test_lora", "test_export"]
# What is built on each, and how the pipeline is run: `dvc repro` asks no doctor.
LIBRARIES = {
    "olive-ai": ("dvc repro", MODELS),
    "onnxruntime-genai": ("dvc repro", ["test_export", "test_harness"]),
    "transformers": ("dvc repro", [*MODELS, "test_scoring"]),
    "prefect": ("olivepress run", ["test_flow", "test_alive", "test_refresh"]),
    "dvc": ("olivepress run", ["test_bridge", "test_store", "test_remote"]),
}
HEAD = """\
# Versions

Which releases pass, each tried on top of the lock, everything else being as the lock has it but for
what pip says that the release needs. Made by `python -m tests.versions`, which takes the two latest
releases of each; a row is one real run of the whole pipeline on the built-in model, with its gates,
and of the tests of what is built on that library.

| library | release | installs | pipeline | tests | what was seen |
|---|---|---|---|---|---|
"""
FOOT = """
*installs* says whether pip finds a set of packages with it that go together. A release that does
not is not tried, and one that is not here was not yet. The
row of the release of Olive that the lock has is one of the lock as it is.
`make upgrade` resolves every library anew within the ranges of pyproject.toml, runs the same
pipeline and the tests of all five, and writes requirements.lock only if all pass.
"""


@dataclass(frozen=True)
class Row:
    """What became of a release."""

    library: str
    release: str
    installs: str
    pipeline: str = ""
    tests: str = ""
    seen: str = ""

    @property
    def passes(self) -> bool:
        return (self.installs, self.pipeline) == ("yes", "passes") and not re.search(
            "failed|error", self.tests
        )


def latest(library: str, number: int) -> list[str]:
    """The newest releases, no pre-releases, newest first."""
    said = _run([sys.executable, "-m", "pip", "index", "versions", library]).stdout
    return re.findall(r"[\d.]+", said.partition("Available versions:")[2])[:number]


def environment(name: str) -> Path:
    """A new virtual environment that sees the packages of this one; its folder of programs."""
    folder = FOLDER / name
    shutil.rmtree(folder, ignore_errors=True)
    # Without pip and its setuptools: those below are used.
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
    packages = Path(sysconfig.get_path("purelib", vars={"base": str(folder)}))
    below = sysconfig.get_path("purelib")
    (packages / "below.pth").write_text(f"import site; site.addsitedir({below!r})\n")
    return folder / "bin"


def programs(bin: Path) -> None:
    """The commands of the packages below, for the Python of this environment."""
    for entry in importlib.metadata.entry_points(group="console_scripts"):
        script = bin / entry.name
        if not script.exists():
            script.write_text(
                f"#!{bin / 'python'}\nimport sys\nfrom {entry.module} import "
                f"{entry.attr.partition('.')[0]}\nsys.exit({entry.attr}())\n"
            )
            script.chmod(0o755)


def install(bin: Path, wanted: list[str], held: list[str]) -> str:
    """Install over what is below; what does not go together, empty if all does."""
    constraints = bin.parent / "constraints.txt"
    constraints.write_text("".join(f"{name}=={_installed(name)}\n" for name in held))
    pip = [bin / "python", "-m", "pip", "--disable-pip-version-check"]
    done = _run([*pip, "install", "--quiet", "-c", constraints, *wanted])
    if done.returncode:
        return _last(done.stdout, "ERROR")
    said = _run([*pip, "check"]).stdout.splitlines()
    # The ranges of this project are what is to be found out.
    return "; ".join(
        line for line in said if " has requirement " in line and "olivepress" not in line
    )


def _installed(name: str) -> str:
    return importlib.metadata.version(name).partition("+")[0]


def _run(
    command: list, cwd: Path = REPO, bin: Path | None = None
) -> subprocess.CompletedProcess[str]:
    env = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    if bin:
        env |= {"PATH": f"{bin}:{env['PATH']}", "VIRTUAL_ENV": str(bin.parent)}
    return subprocess.run(
        command,
        cwd=cwd,
        env=env | {"DVC_NO_ANALYTICS": "1", "DO_NOT_TRACK": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _last(text: str, word: str) -> str:
    """The last line with a word, else the last line; short, and fit for a cell of a table."""
    # DVC's own last line, below the reason, and pip's first of a traceback, above it.
    known = ("ERROR: failed to reproduce", "ERROR: Exception:")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(known)]
    chosen = [line for line in lines if word in line] or lines or [""]
    return re.sub(r"\S*/(?=[\w.-]+)", "", chosen[-1]).replace("|", "\\|").strip()[:160]


def pipeline(bin: Path, command: str) -> tuple[str, str]:
    """Whether the pipeline makes the built-in model, and what it said if not."""
    root = bin.parent / "project"
    _run(["git", "clone", "--quiet", REPO, root])
    # One for all: a stage is run again where what it depends on, its libraries among it, differs.
    _run([bin / "dvc", "cache", "dir", "--local", FOLDER / "cache"], root, bin)
    if command == "dvc repro":  # which does not see that libraries changed
        _run([bin / "dvc", "repro", "--force", "toolchain"], root, bin)
    done = _run([bin / "python", *f"{bin}/{command}".split()], root, bin)
    (bin.parent / "pipeline.log").write_text(done.stdout)
    _run([bin / "olivepress", "down"], root, bin)
    return ("fails", _last(done.stdout, "rror")) if done.returncode else ("passes", "")


def tests(bin: Path, names: list[str]) -> tuple[str, str]:
    files = [f"tests/{name}.py" for name in names]
    done = _run([bin / "python", "-m", "pytest", "-q", "-p", "no:cacheprovider", *files], REPO, bin)
    (bin.parent / "tests.log").write_text(done.stdout)
    count = re.findall(r"\d+ (?:passed|failed|errors?)", done.stdout)
    ended = ", ".join(count)
    if done.returncode and not re.search("failed|error", ended):
        ended = f"{ended or 'none'}, then an error"
    return ended, _last(done.stdout, "FAILED") if done.returncode else ""


def tried(library: str, release: str) -> Row:
    command, names = LIBRARIES[library]
    bin = environment(f"{library}-{release}")
    held = [name for name in (*LIBRARIES, "torch") if name != library]
    if wrong := install(bin, [f"{library}=={release}"], held):
        return Row(library, release, "no", seen=wrong)
    programs(bin)
    made, why = pipeline(bin, command)
    passed, failure = tests(bin, names)
    return Row(library, release, "yes", made, passed, why or failure)


def known() -> list[Row]:
    """The rows that the page has."""
    lines = PAGE.read_text().splitlines() if PAGE.exists() else []
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines if line.startswith("| ")]
    return [Row(*(cell.strip() for cell in row)) for row in cells[1:]]  # the first is the head


def keep(row: Row) -> None:
    """Add a row to the page, in place of what was known of its release."""
    order = list(LIBRARIES)
    rows = [one for one in known() if (one.library, one.release) != (row.library, row.release)]
    rows = sorted(
        [*rows, row],
        key=lambda one: (-order.index(one.library), [int(n) for n in one.release.split(".")]),
        reverse=True,
    )
    lines = [f"| {' | '.join(str(cell) for cell in asdict(one).values())} |\n" for one in rows]
    PAGE.write_text(HEAD + "".join(lines) + FOOT)


def upgrade() -> int:
    """Resolve everything anew, run all that the rows run, and write the lock if it passes."""
    bin = FOLDER / "latest/bin"
    shutil.rmtree(bin.parent, ignore_errors=True)
    subprocess.run([sys.executable, "-m", "venv", bin.parent], check=True)
    # The pip that comes with Python 3.11 ends in InconsistentCandidate.
    subprocess.run([bin / "pip", "install", "--quiet", "--upgrade", "pip"], check=True)
    if wrong := install(bin, ["setuptools", "-e", ".[dev]"], []):
        sys.exit(f"does not install: {wrong}")
    made, why = pipeline(bin, "olivepress run")
    names = sorted({name for _, names in LIBRARIES.values() for name in names})
    passed, failure = tests(bin, names)
    print(f"pipeline {made}, tests: {passed} {why or failure}")
    if made != "passes" or failure:
        print(f"requirements.lock is as it was; the logs are in {bin.parent}")
        return 1
    if (done := _run(["make", "lock", f"BIN={bin}"])).returncode:
        sys.exit(done.stdout)
    print("requirements.lock is written; make install")
    return 0


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("versions", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--only", nargs="*", metavar="LIBRARY[==RELEASE]", default=list(LIBRARIES))
    parser.add_argument("--number", type=int, default=2, help="of releases of each (default: 2)")
    parser.add_argument("--latest", action="store_true", help="all at once, and write the lock")
    args = parser.parse_args(argv)
    FOLDER.mkdir(exist_ok=True)
    if args.latest:
        return upgrade()
    for wanted in args.only:
        library, _, release = wanted.partition("==")
        for one in [release] if release else latest(library, args.number):
            started = time.monotonic()
            row = tried(library, one)
            keep(row)
            took = time.monotonic() - started
            print(f"{library} {one}: {'passes' if row.passes else 'fails'} in {took:.0f} s", row)
            shutil.rmtree(FOLDER / f"{library}-{one}/project", ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
