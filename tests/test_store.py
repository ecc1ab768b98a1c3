"""What the bridge keeps true of DVC's files: dvc.lock whole, outputs as recorded, no leftovers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.dvcfile import ProjectFile

from conftest import REPO, init_project, sh
from tasks import bridge, locks, overrides
from tasks.content import listing, md5_of, object_path

# Writes dvc.lock over and over, as often as it can, until there is a file `enough`.
WRITER = """
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from dvc.dvcfile import Lockfile
from dvc.repo import Repo
repo = Repo(".")
stages = list(repo.index.stages)
while not Path("enough").exists():
    Lockfile(repo, "dvc.lock").dump_stages(stages)
    Path("writing").touch()
"""
FOLDER = """
import os
os.makedirs("out/first", exist_ok=True)
open("out/first/a", "w").write("hello ")
open("out/first/b", "w").write("there")
open("runs", "a").write("x")
"""
FIGURES = """
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
for name in ("out", "figures"):
    Path(name).mkdir(exist_ok=True)
text = Path("in.txt").read_text().strip()
Path("figures/one.json").write_text('{"a": "%s"}' % text)
Path("figures/one.csv").write_text(f"a,b\\n1,{text}\\n")
if text == "bad":
    sys.exit("first: not good enough")
Path("out/first").write_text(text)
"""
FIGURES_YAML = """
stages:
  first:
    cmd: python first.py
    deps: [in.txt, first.py]
    outs: [out/first]
    metrics: [figures/one.json]
    plots: [figures/one.csv]
"""
# As in the project: the last stage reads a whole folder, to which the others write.
SHARED = """
stages:
  each:
    foreach: ${adapters}
    do:
      cmd: mkdir -p out/all && echo ${key} > out/all/${key}
      deps: [in.txt]
      outs: ["out/all/${key}"]
  pack:
    cmd: ls -A out/all > pack
    deps: [out/all]
    params: [adapters]
    outs: [pack]
"""


def run(root: Path, name: str = "first") -> bridge.Outcome:
    return bridge.reproduce(root, name, lambda line: None, 60)


def run_all(root: Path) -> dict[str, bridge.Outcome]:
    """What the flow does, without its server."""
    graph, _ = bridge.begin(root)
    return {name: run(root, name) for name in graph}


def locked(root: Path) -> set[str]:
    return set(yaml.safe_load((root / "dvc.lock").read_text())["stages"])


@pytest.mark.parametrize("writer", ["the bridge", "dvc"])
def test_dvc_lock_is_read_while_it_is_written(toy: Path, writer: str) -> None:
    """Runs failed at random: DVC writes in place, and another stage's thread read half of it."""
    adapters = {f"adapters.a{i}.data": "x" for i in range(8)}
    overrides.apply(toy, adapters)
    run_all(toy)
    names = locked(toy)
    assert len(names) == 10
    code = WRITER if writer == "dvc" else f"import tasks.bridge\n{WRITER}"
    env = {**os.environ, "PYTHONPATH": str(REPO)}
    other = subprocess.Popen([sys.executable, "-c", code], cwd=toy, env=env)
    try:
        deadline = time.monotonic() + 60
        while not (toy / "writing").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        for _ in range(15):
            needs = bridge.status(toy)
            if writer == "the bridge":  # not even for a moment was any of it gone
                assert {need.action for need in needs.values()} == {"unchanged"}
                assert locked(toy) == names
    finally:
        (toy / "enough").touch()
        assert other.wait(60) == 0


def test_a_dvc_lock_that_stays_broken_is_a_message(toy: Path) -> None:
    (toy / "dvc.lock").write_text("<<<<<<< mine\n")
    with pytest.raises(bridge.UserError, match=r"dvc\.lock"):
        bridge.status(toy)


def objects(root: Path) -> dict[str, Path]:
    """Files of DVC's cache by the content that they should have: hello, there, or the listing."""
    cache = root / ".dvc/cache/files/md5"
    return {path.read_text()[:5]: path for path in cache.rglob("*") if path.is_file()}


def damage(path: Path, text: str) -> None:
    """Change an object as a failing disk would: mode and size stay."""
    path.chmod(0o644)
    path.write_text(text.ljust(path.stat().st_size)[: path.stat().st_size])
    path.chmod(0o444)


@pytest.mark.parametrize("what", ["a file in a folder", "the listing of a folder"])
def test_a_damaged_cache_is_noticed_and_mended(toy: Path, what: str) -> None:
    """DVC restored it, reported success, and called it up to date ever after."""
    (toy / "first.py").write_text(FOLDER)
    run(toy)
    damage(objects(toy)["hello" if what == "a file in a folder" else '[{"md'], "XX")
    shutil.rmtree(toy / "out")
    outcome = run(toy)
    assert outcome.action == "run"
    assert outcome.reasons[0] == "out/first is damaged in the cache"
    assert (toy / "out/first/a").read_text() == "hello "
    shutil.rmtree(toy / "out")
    assert run(toy).action == "restore"  # the cache is whole again
    assert (toy / "out/first/a").read_text() == "hello "
    assert (toy / "runs").read_text() == "xx"


def test_a_damaged_file_is_not_put_back_after_a_failure(toy: Path) -> None:
    run(toy)
    damage(objects(toy)["hello"], "XX")
    (toy / "out/first").write_text("no sound copy is left")
    (toy / "first.py").write_text("import sys\nsys.exit('first: no')\n")
    with pytest.raises(bridge.StageFailed, match="first: no"):
        run(toy)
    assert not (toy / "out/first").exists()


def test_a_failed_stage_leaves_its_figures(toy: Path) -> None:
    """A gate that fails is understood by the figures that failed it."""
    (toy / "dvc.yaml").write_text(FIGURES_YAML)
    (toy / "first.py").write_text(FIGURES)
    (toy / "in.txt").write_text("good")
    run(toy)
    (toy / "in.txt").write_text("bad")
    with pytest.raises(bridge.StageFailed, match="not good enough"):
        run(toy)
    assert "bad" in (toy / "figures/one.json").read_text()
    assert "bad" in (toy / "figures/one.csv").read_text()
    assert (toy / "out/first").read_text() == "good"
    (toy / "in.txt").write_text("good")
    assert run(toy).action == "restore"
    assert "good" in (toy / "figures/one.json").read_text()

    (toy / "in.txt").write_text("bad")
    (toy / "first.py").write_text("import sys\nsys.exit('first: before any figure')\n")
    with pytest.raises(bridge.StageFailed, match="before any figure"):
        run(toy)
    assert "good" in (toy / "figures/one.json").read_text()


def test_an_adapter_that_is_gone_takes_its_outputs_along(
    toy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two clones with equal parameters have equal keys, whatever was there before."""
    (toy / "dvc.yaml").write_text(SHARED)
    (toy / ".gitignore").write_text("/out/\n/pack\n")  # else DVC writes one into out/all
    overrides.apply(toy, {"adapters.food.data": "x"})
    run_all(toy)
    assert (toy / "pack").read_text() == "food\ntravel\n"
    shutil.copy(REPO / "params.yaml", toy)
    (toy / "out/all/mine").write_text("not of any stage")
    assert bridge.begin(toy)[1] == ["out/all/food"]
    assert (toy / "out/all/mine").exists()
    (toy / "out/all/mine").unlink()
    assert locked(toy) == {"each@travel", "pack"}
    outcomes = run_all(toy)

    fresh = init_project(tmp_path / "fresh")
    for name in ("dvc.yaml", "in.txt", ".gitignore"):
        shutil.copy(toy / name, fresh)
    monkeypatch.chdir(fresh)
    assert run_all(fresh)["pack"].key == outcomes["pack"].key

    monkeypatch.chdir(toy)
    overrides.apply(toy, {"adapters.food.data": "x"})
    again = run_all(toy)  # it was removed from the folder, and not from the cache
    assert {name: outcome.action for name, outcome in again.items()} == {
        "each@travel": "unchanged",
        "each@food": "restore",
        "pack": "restore",
    }


def test_what_git_tracks_or_a_stage_still_makes_is_not_removed(toy: Path) -> None:
    run_all(toy)
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(text.replace("  each:", "  every:"))  # same outputs, new name
    assert bridge.begin(toy)[1] == []
    assert (toy / "out/each-travel").exists()
    sh("git", "add", "--force", "out/first", cwd=toy)
    (toy / "dvc.yaml").write_text("stages:\n  other:\n    cmd: touch x\n    outs: [x]\n")
    assert bridge.begin(toy)[1] == []
    assert (toy / "out/first").exists()


def lock_stage(root: Path, *outs: str, md5: str = "1" * 32) -> None:
    """Have dvc.lock record a stage `old` that dvc.yaml does not have."""
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    made = [{"path": out, "hash": "md5", "md5": md5, "size": 1} for out in outs]
    lock["stages"]["old"] = {"cmd": "old", "outs": made}
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))


def test_what_no_stage_made_is_not_removed(toy: Path) -> None:
    """dvc.lock comes with a clone: it may name any path, and a content that the cache has."""
    text = "# of mine\n"
    (toy / "in.txt").write_text(text)
    run_all(toy)  # so the cache has it
    for root in (toy, toy.parent):
        (root / "notes/.git").mkdir(parents=True)
        for name in ("mine", ".git/config"):
            (root / "notes" / name).write_text(text)
    (toy / "up").symlink_to("..")
    (toy / ".dvc/config.local").write_text(text)
    md5 = md5_of(text.encode())
    listed = listing({"mine": md5})
    folder = object_path(toy / ".dvc/cache", f"{md5_of(listed)}.dir")
    folder.parent.mkdir(exist_ok=True)
    folder.write_bytes(listed)
    paths = [".", ".git", ".dvc/cache", ".dvc/config.local", "notes", "notes/.git"]
    paths += ["../notes", "up/notes", "notes/../.git", str(toy.parent / "notes")]
    bridge.begin(toy)
    before = set(toy.parent.rglob("*"))
    for its in (md5, f"{md5_of(listed)}.dir", "../" * 9, "1" * 32):
        lock = yaml.safe_load((toy / "dvc.lock").read_text())
        outs = [{"path": path, "hash": "md5", "md5": its, "size": 1} for path in paths]
        lock["stages"]["old"] = {"cmd": "old", "outs": outs}
        (toy / "dvc.lock").write_text(yaml.safe_dump(lock))
        assert bridge.begin(toy)[1] == []
        assert before <= set(toy.parent.rglob("*"))
    assert "old" not in locked(toy)


def test_an_edit_of_an_output_outlives_its_stage(toy: Path) -> None:
    run_all(toy)
    (toy / "out/each-travel").write_text("by hand")
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(text.partition("  each:")[0])
    assert bridge.begin(toy)[1] == []
    assert (toy / "out/each-travel").read_text() == "by hand"


def test_unfinished_outputs_of_killed_stages_are_removed(toy: Path) -> None:
    run_all(toy)
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = toy / f"out/.first.tmp-{dead.pid}"
    left.mkdir()
    (left / "half").touch()
    alive = toy / f"out/.first.tmp-{os.getpid()}"
    alive.touch()
    assert bridge.begin(toy)[1] == [f"out/{left.name}"]
    assert not left.exists() and alive.exists()


def test_unfinished_outputs_are_no_part_of_a_folder_that_is_read(toy: Path) -> None:
    (toy / "dvc.yaml").write_text(SHARED)
    run_all(toy)
    (toy / f"out/all/.food.tmp-{os.getpid()}").write_text("half")
    assert {need.action for need in bridge.status(toy).values()} == {"unchanged"}
    assert "up to date" in sh("dvc", "status", cwd=toy).stdout


@pytest.mark.parametrize("left", ["", '{"write": {"/x": {"pid"'], ids=["empty", "half"])
def test_a_list_of_locks_that_a_kill_left_unfinished_blocks_nobody(toy: Path, left: str) -> None:
    (toy / ".dvc/tmp").mkdir(exist_ok=True)
    (toy / ".dvc/tmp/rwlock").write_text(left)
    run_all(toy)
    assert "up to date" in sh("dvc", "status", cwd=toy).stdout


@contextlib.contextmanager
def listed(toy: Path, cmd: str, cwd: Path, written: float = 0) -> Iterator[dict[str, Any]]:
    """DVC's list of locks with a process that sleeps; when it was written, in seconds from now."""
    with subprocess.Popen(["sleep", "600"], cwd=cwd) as other:
        lock = {"pid": other.pid, "cmd": cmd}
        held = {"write": {str(toy / "out/first"): lock}, "read": {str(toy / "in.txt"): [lock]}}
        (toy / ".dvc/tmp").mkdir(exist_ok=True)
        (toy / ".dvc/tmp/rwlock").write_text(json.dumps(held))
        then = time.time() + written
        os.utime(toy / ".dvc/tmp/rwlock", (then, then))
        yield held
        other.kill()


@pytest.mark.parametrize(
    ("cmd", "written"), [("dvc repro", 0), ("sleep 600", -60)], ids=["another", "a later one"]
)
def test_a_lock_of_a_process_whose_number_another_has_now_blocks_nobody(
    toy: Path, cmd: str, written: float
) -> None:
    """As after a restart, in which numbers begin anew: also a shell in the project may have it."""
    with listed(toy, cmd, toy, written):
        assert run(toy).action == "run"
    with listed(toy, cmd, toy, written):
        assert locks.at_work(toy / ".dvc/tmp") == set()
        bridge.begin(toy)
        assert "pid" not in (toy / ".dvc/tmp/rwlock").read_text()


def test_a_lock_of_a_process_at_work_stays(toy: Path) -> None:
    with listed(toy, "sleep 600", Path("/")) as held:
        bridge.begin(toy)
        assert json.loads((toy / ".dvc/tmp/rwlock").read_text()) == held


@pytest.mark.parametrize(
    ("argv", "line", "same"),
    [
        ("/x/bin/dvc repro a", "/x/bin/python /x/bin/dvc repro a", True),
        ("/x/dvc/__main__.py repro a", "python -m dvc repro a", True),
        ("/x/prefect/engine.py", "/x/python -m prefect.engine", True),
        ("/x/dvc/__main__.py repro a", "python -m dvc repro b", False),
        ("/x/bin/dvc repro", "-bash", False),
    ],
)
def test_the_command_line_of_what_dvc_notes(argv: str, line: str, same: bool) -> None:
    assert locks._is_of(argv, line) is same


@pytest.mark.parametrize("left", [None, ".abc.tmp", "0" * 64], ids=["nothing", "part", "half"])
def test_a_record_of_a_run_that_was_not_finished_is_none(toy: Path, left: str | None) -> None:
    """DVC makes the folder of a record first, and took whatever is newest in it."""
    key = run(toy).key
    folder = toy / f".dvc/cache/runs/{(key or '')[:2]}/{key}"
    kept = next(folder.iterdir())
    kept.unlink()
    if left:
        (folder / left).write_text("cmd: python")
    (toy / "dvc.lock").unlink()
    assert run(toy).action == "run"
    (toy / "dvc.lock").unlink()
    if left and len(left) != 64:
        os.utime(folder / left)  # the newest
    assert run(toy).action == "restore"


def test_dvc_yaml_is_valid_in_every_thread(toy: Path) -> None:
    """DVC's own validation is not made for threads: it fails at random when two are in it."""
    data = yaml.safe_load((toy / "dvc.yaml").read_text())
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(lambda _: ProjectFile.validate(data), range(400)))
    finally:
        sys.setswitchinterval(interval)
