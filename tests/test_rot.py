"""Bytes that rot: named by `olivepress verify`, brought back by `--repair`, never used by a run."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo

from benchmarks.rot import FAULTS, content, files, flip, trial, written
from conftest import BIN, init_project, typed
from lab import commit
from stages.errors import UserError
from tasks import bridge, integrity, overrides, remote
from tasks.content import md5_of, object_path
from tasks.repair import repair
from tasks.turn import turn
from tasks.verify import check

FIRST = """
import os, time
from pathlib import Path
os.makedirs("out/first", exist_ok=True)
Path("out/record").write_text(str(time.time_ns()))
text = Path("in.txt").read_text()
for name in ("a", "b", "c"):
    Path(f"out/first/{name}").write_text(f"{name}: {text}")
Path("runs").open("a").write("1")
"""
EACH = """
import sys
from pathlib import Path
inner = "".join(path.read_text() for path in sorted(Path("out/first").iterdir()))
Path(f"out/each-{sys.argv[1]}").write_text(inner * 2)
Path("runs").open("a").write("2")
"""
DATA = """
stages:
  first:
    cmd: cp data/rows.jsonl copy
    deps: [data/rows.jsonl]
    outs: [copy]
"""


def run(root: Path, name: str = "first") -> bridge.Outcome:
    return bridge.reproduce(root, name, lambda line: None, 60)


@pytest.fixture
def made(toy: Path) -> Path:
    """The toy with a stage that makes a folder and one that reads it, run and committed.

    As in the project, the first also records when it ran. Each run leaves a digit in `runs`.
    """
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(
        text.replace("outs: [out/first]", "outs: [out/first, out/record]")
    )
    (toy / "first.py").write_text(FIRST)
    (toy / "each.py").write_text(EACH)
    (toy / ".gitignore").write_text("/out/\n/runs\n/remote/\n")
    both(toy)
    commit(toy, "made")
    return toy


def both(root: Path) -> list[str]:
    """Bring both stages up to date, and say what was done with each."""
    return [run(root, name).action for name in ("first", "each@travel")]


def object_of(root: Path, path: str) -> Path:
    """The object of the cache with what a file of the workspace should hold."""
    lock = yaml.safe_load((root / "dvc.lock").read_text())["stages"]
    outs = {out["path"]: out["md5"] for entry in lock.values() for out in entry["outs"]}
    cache = root / ".dvc/cache/files/md5"
    if path in outs:
        return cache / outs[path][:2] / outs[path][2:]
    folder, _, name = path.rpartition("/")
    listed = json.loads(object_of(root, folder).read_text())
    md5 = next(entry["md5"] for entry in listed if entry["relpath"] == name)
    return cache / md5[:2] / md5[2:]


def record_of(root: Path, stage: str) -> Path:
    key = next(made.key for made in bridge.made(root) if made.stage == stage)
    return next((root / ".dvc/cache/runs" / str(key)[:2] / str(key)).iterdir())


def store(root: Path) -> None:
    """A DVC remote in the project's folder `remote`."""
    (root / ".dvc/config.local").write_text(
        f"[core]\n    remote = store\n['remote \"store\"']\n    url = {root / 'remote'}\n"
    )


def rot(path: Path) -> None:
    flip(path, random.Random(0))


def found(root: Path) -> list[tuple[str, str]]:
    return [(one.path, one.what) for one in check(root).findings]


# What verify says and does.


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_every_file_is_named_and_brought_back(made: Path, fault: str) -> None:
    assert check(made).sound
    tried = 0
    for kind, paths in files(made).items():
        if kind != "input" or fault == "flip":
            for path in paths:
                if not (fault == "delete" and kind == "record"):  # as if it had never been there
                    assert trial(made, path, FAULTS[fault], path.name) == "", path
                    tried += 1
    assert tried >= 9
    assert (made / "runs").read_text() == "12"


def test_a_name_of_a_file_writes_no_verdict(made: Path) -> None:
    for name in ("n\nall sound", "\x1b[2J"):
        (made / "out/first" / name).touch()
    done = typed("verify", cwd=made)
    assert done.exit_code == 1 and "n\\nall sound" in done.output and "\\x1b[2J" in done.output
    assert "\nall sound" not in done.output and "\x1b" not in done.output


def test_random_files_of_the_lab(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the real pipeline: its package, its models, its cache."""
    monkeypatch.chdir(lab)
    before, chance = content(lab), random.Random(7)
    kinds = files(lab)
    package = [path for path in kinds["output"] if path.is_relative_to(lab / "models/package")]
    del kinds["record"]  # that of an earlier run, which other tests may have made, is nowhere else
    chosen = [chance.choice(paths) for paths in (package, *kinds.values())]
    for path in chosen:
        flip(path, chance)
    done = typed("verify", "--json", cwd=lab)
    names = sorted({path.relative_to(lab).as_posix() for path in chosen})
    assert done.exit_code == 1
    assert sorted(one["path"] for one in json.loads(done.stdout)["findings"]) == names
    done = typed("verify", "--repair", cwd=lab)
    assert done.exit_code == 0 and "all sound" in done.stdout, done.stdout
    assert content(lab) == before


def test_what_is_said_of_each(made: Path) -> None:
    first = made / "out/first"
    (first / "a").write_text("my own words, longer than before")
    written(first / "b", (first / "c").read_bytes())
    written(object_of(made, "out/first/c"), b"c")
    (first / "new").touch()
    (made / "each.py").write_text(EACH + "# edited\n")
    report = check(made)
    said = {one.path.removeprefix("out/first/"): one for one in report.findings}
    assert said["a"].what == "changed" and said["a"].of == ["first"]
    assert said["b"].what == "swapped" and said["b"].note == (
        "has the content of out/first/c (first)"
    )
    assert said["new"].what == "extra"
    (one,) = (one for one in report.findings if one.kind == "object")
    assert one.what == "truncated" and one.of == ["out/first/c (first)"]
    assert one.note == "1 of 9 bytes"
    assert report.stale == ["each.py"] and len(report.findings) == 4


@pytest.mark.parametrize("where", ["out/first", "data"])
def test_files_of_a_kind_that_no_stage_makes(made: Path, where: str) -> None:
    """A pipe was waited for without end, and a name in Latin-1 ended in a traceback."""
    if where == "data":
        text = (made / "dvc.yaml").read_text()
        (made / "dvc.yaml").write_text(text.replace("deps: [in.txt,", "deps: [data, in.txt,"))
        (made / "data").mkdir()
        (made / "data/rows").write_text("1")
        run(made)
    name = os.fsdecode(b"caf\xe9")
    (made / where / name).write_text("latin")
    os.mkfifo(made / where / "pipe")
    done = typed("verify", "--json", cwd=made)
    said = {one["path"]: one["what"] for one in json.loads(done.stdout)["findings"]}
    if where == "data":
        assert said == {"data/pipe": "unreadable"}
        (made / "data/pipe").unlink()
        with pytest.raises(UserError, match=r"name is not UTF-8: .*data/caf\\xe9"):
            bridge.status(made)
        return
    assert said == {f"out/first/{name}": "extra", "out/first/pipe": "extra"}
    shown = typed("verify", cwd=made)
    assert "extra      out/first/caf\\udce9 (first)" in shown.stdout
    done = typed("verify", "--repair", cwd=made)
    assert done.exit_code == 0 and "all sound" in done.stdout
    aside = {path.name for path in (made / ".dvc/tmp/damaged").rglob("*") if not path.is_dir()}
    assert aside == {name, "pipe"}


def test_an_edit_is_no_damage(made: Path) -> None:
    (made / "in.txt").write_text("other\n")
    done = typed("verify", cwd=made)
    assert done.exit_code == 0
    assert "edited     in.txt" in done.stdout and "all sound" in done.stdout


def test_an_edit_that_rots_is_not_undone(made: Path) -> None:
    """What Git has of it is older than the edit."""
    (made / "in.txt").write_text("edited\n")
    assert bridge.status(made)["first"].action == "run"  # so DVC knows the edit
    written(made / "in.txt", b"edjted\n")
    mending = repair(made)
    assert [(one.path, one.what) for one in mending.after.findings] == [("in.txt", "damaged")]
    assert (made / "in.txt").read_text() == "edjted\n"
    assert any(not one.mended and "touch it" in one.how for one in mending.done)


@pytest.mark.parametrize("what", ["in.txt", "listing", "record"])
def test_a_disk_that_is_full_leaves_no_half_of_a_file(
    made: Path, what: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half a source file counted as an edit, and was sound."""
    (made / "in.txt").write_text("hello there\n")
    both(made)
    commit(made, "again")
    paths = {"in.txt": made / "in.txt", "listing": object_of(made, "out/first")}
    path = paths.get(what) or record_of(made, "first")
    rot(path)
    bad, write = path.read_bytes(), Path.write_bytes

    def half(to: Path, data: bytes) -> None:
        full = path.name in to.name
        write(to, data[: len(data) // 2] if full else data)
        if full:
            raise OSError(errno.ENOSPC, "No space left on device", str(to))

    with monkeypatch.context() as full:
        full.setattr(Path, "write_bytes", half)
        mending = repair(made)
    if what == "listing":  # brought back by the stage that makes it
        assert mending.after.sound
        return
    assert path.read_bytes() == bad
    assert [one.path for one in mending.after.findings] == [path.relative_to(made).as_posix()]
    assert any(not one.mended and "disk full" in one.how for one in mending.done)
    assert repair(made).after.sound


def test_what_somebody_wrote_is_moved_and_kept(made: Path) -> None:
    (made / "out/first/a").write_text("by hand")
    (made / "out/first/new").write_text("also by hand")
    assert repair(made).after.sound
    aside = (path for path in (made / ".dvc/tmp/damaged").rglob("*") if path.is_file())
    kept = {path.name: path.read_text() for path in aside}
    assert kept == {"a": "by hand", "new": "also by hand"}
    assert (made / "out/first/a").read_text() == "a: hello\n"


def test_both_copies_are_bad_so_it_is_computed(made: Path) -> None:
    """All is as it was afterwards, with nothing below that would have to run."""
    before = content(made)
    for path in (made / "out/first/b", object_of(made, "out/first/b")):
        rot(path)
    mending = repair(made)
    assert mending.after.sound
    assert any("made again by first: the same bytes" in one.how for one in mending.done)
    after = content(made)
    before.pop("runs"), after.pop("runs")
    assert {name for name in before if after.get(name) != before[name]} == set()
    assert (made / "runs").read_text() == "121" and both(made) == ["unchanged", "unchanged"]


def test_what_now_comes_out_differently_is_said(made: Path) -> None:
    (made / "first.py").write_text(FIRST.replace("{name}:", "{__import__('time').time_ns()}:"))
    both(made)
    for path in (made / "out/first/b", object_of(made, "out/first/b")):
        rot(path)
    mending = repair(made)
    assert mending.after.sound and any("other bytes" in one.how for one in mending.done)
    assert both(made) == ["unchanged", "run"]


def test_a_stage_whose_inputs_changed_is_not_run_for_it(made: Path) -> None:
    (made / "in.txt").write_text("other\n")
    for path in (made / "out/first/b", object_of(made, "out/first/b")):
        rot(path)
    mending = repair(made)
    assert not mending.after.sound
    assert any("would now make something else: in.txt modified" in one.how for one in mending.done)
    assert (made / "runs").read_text() == "12" and (made / "out/first/a").exists()


def test_from_the_remote(made: Path) -> None:
    store(made)
    remote.push(made)
    before = content(made)
    listing = object_of(made, "out/first")
    for path in (made / "out/first/b", object_of(made, "out/first/b"), listing):
        rot(path)
    rot(record_of(made, "first"))
    mending = repair(made)
    assert mending.after.sound and "fetched from the remote" in {one.how for one in mending.done}
    assert content(made) == before and (made / "runs").read_text() == "12"


@pytest.fixture
def tracked(toy: Path) -> Path:
    """A stage that copies data of a `.dvc` file, not run yet; the path of the data."""
    (toy / "dvc.yaml").write_text(DATA)
    (toy / "data").mkdir()
    (toy / "data/rows.jsonl").write_text("1\n2\n")
    with contextlib.closing(Repo(str(toy))) as repo:
        repo.add("data/rows.jsonl")
    return toy / "data/rows.jsonl"


def object_of_data(root: Path) -> Path:
    md5 = yaml.safe_load((root / "data/rows.jsonl.dvc").read_text())["outs"][0]["md5"]
    return root / ".dvc/cache/files/md5" / md5[:2] / md5[2:]


def test_data_that_nothing_can_bring_back_is_left(toy: Path, tracked: Path) -> None:
    run(toy)
    (toy / "copy").unlink()
    rot(object_of_data(toy))
    rot(tracked)
    bad = tracked.read_bytes()
    mending = repair(toy)
    assert not mending.after.sound and tracked.read_bytes() == bad
    assert any(not one.mended and one.path == "data/rows.jsonl" for one in mending.done)
    for _ in range(2):
        with pytest.raises(bridge.StageFailed, match=r"rows\.jsonl: damaged, and the cache has no"):
            run(toy)


def test_data_that_was_edited_is_no_damage(toy: Path, tracked: Path) -> None:
    run(toy)
    tracked.write_text("1\n")
    report = repair(toy).after
    assert report.sound and report.stale == ["data/rows.jsonl"] and tracked.read_text() == "1\n"
    rot(object_of_data(toy))  # of which a copy that the stage made is sound
    assert repair(toy).after.sound and tracked.read_text() == "1\n"


def test_of_a_folder_of_data_only_what_rots_is_put_back(toy: Path) -> None:
    (toy / "dvc.yaml").write_text(DATA.replace("cp data", "cp -r data").replace(".jsonl", ""))
    (toy / "data/rows").mkdir(parents=True)
    for name in "abc":
        (toy / "data/rows" / name).write_text(name * 9)
    with contextlib.closing(Repo(str(toy))) as repo:
        repo.add("data/rows")
    run(toy)
    (toy / "data/rows/a").write_text("edited")
    (toy / "data/rows/new").write_text("new")
    rot(toy / "data/rows/b")
    mending = repair(toy)
    assert [one.path for one in mending.before.findings] == ["data/rows/b"]
    assert mending.after.sound and mending.after.stale == ["data/rows"]
    now = {path.name: path.read_text() for path in (toy / "data/rows").iterdir()}
    assert now == {"a": "edited", "b": "b" * 9, "c": "c" * 9, "new": "new"}


def test_dvc_lock_itself(made: Path) -> None:
    """A wrong hash in it: what it is of is named, and the right one comes back."""
    before, lock = content(made), made / "dvc.lock"
    md5 = yaml.safe_load(lock.read_text())["stages"]["each@travel"]["outs"][0]["md5"]
    written(lock, lock.read_bytes().replace(md5.encode(), b"a" * 32))
    (path, _), (missing, _) = found(made)
    assert path == "out/each-travel" and missing.endswith("a" * 30)
    assert repair(made).after.sound
    assert content(made) | {"runs": ""} == before | {"runs": ""}  # for the stage was run
    written(lock, b"\xff" + lock.read_bytes())
    assert "dvc.lock" in typed("verify", cwd=made).stderr
    lock.unlink()
    done = typed("verify", cwd=made)
    assert done.exit_code == 1 and "dvc.lock is not there: olivepress run writes it" in done.stderr


def test_a_wrong_size_in_dvc_lock(made: Path) -> None:
    """A size is in no hash: what was measured counts, and no record is changed for it."""
    before, lock = content(made), made / "dvc.lock"
    size = str((made / "out/each-travel").stat().st_size)
    text = lock.read_text()
    assert text.count(f"size: {size}\n") == 1
    lock.write_text(text.replace(f"size: {size}\n", "size: 99\n"))
    (one,) = check(made).findings
    assert (one.path, one.what, one.of) == ("dvc.lock", "damaged", ["each@travel"])
    assert one.note == "says a wrong size of out/each-travel"
    lock.write_text(text.replace("nfiles: 3\n", "nfiles: 5\n"))
    assert found(made) == [("dvc.lock", "damaged")]
    assert repair(made).after.sound
    assert content(made) == before


def test_a_wrong_size_in_both(made: Path) -> None:
    before, size = content(made), (made / "out/each-travel").stat().st_size
    record = record_of(made, "each@travel")
    for path in (made / "dvc.lock", record):
        path.write_text(path.read_text().replace(f"size: {size}\n", "size: 99\n"))
    assert {path for path, _ in found(made)} == {"dvc.lock", record.relative_to(made).as_posix()}
    assert repair(made).after.sound
    assert content(made) == before


def test_nothing_is_repaired_while_a_run_writes(made: Path) -> None:
    """What a stage is writing is not damaged."""
    (made / "each.py").write_text(f"print('on', flush=True)\ninput()\n{EACH}")
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    env = {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}"}
    with subprocess.Popen([BIN / "dvc", "repro"], cwd=made, env=env, **pipes) as other:
        assert any(line.strip() == "on" for line in other.stdout or ())
        with pytest.raises(UserError, match=f"process {other.pid} is at work: try again"):
            repair(made)
        other.communicate("go on\n", timeout=60)
    assert other.returncode == 0 and repair(made).after.sound


def test_nothing_is_repaired_while_a_run_waits_for_another_machine(made: Path) -> None:
    """Then it holds no file."""
    with turn(made, print):
        done = typed("verify", "--repair", cwd=made)
    assert done.exit_code == 1
    assert f"another run in this clone, process {os.getpid()} since" in done.stderr
    assert typed("verify", "--repair", cwd=made).exit_code == 0


# What a run does.


def test_a_rotten_input_is_restored_before_it_is_read(made: Path) -> None:
    """DVC's database says that it is unchanged, as time and size are."""
    rot(made / "out/first/b")
    (made / "each.py").write_text(EACH + "# new\n")
    assert run(made).action == "unchanged"  # nothing is read, so nothing is looked at
    outcome = run(made, "each@travel")
    assert outcome.action == "run"
    assert "out/first/b was damaged: restored" in outcome.reasons
    assert (made / "out/each-travel").read_text() == "a: hello\nb: hello\nc: hello\n" * 2
    assert check(made).sound and (made / "runs").read_text() == "122"


def test_a_rotten_input_without_a_sound_copy_is_made_again(made: Path) -> None:
    rot(made / "out/first/b")
    rot(object_of(made, "out/first/b"))
    (made / "each.py").write_text(EACH + "# new\n")
    outcome = run(made, "each@travel")
    assert "out/first/b was damaged: made again" in outcome.reasons
    assert (made / "out/each-travel").read_text() == "a: hello\nb: hello\nc: hello\n" * 2
    assert check(made).sound and (made / "runs").read_text() == "1212"


def test_a_rotten_source_file_stops_the_stage(made: Path) -> None:
    before = (made / "out/first/a").read_text()
    overrides.apply(made, {"quantize.bits": 8})
    written(made / "in.txt", b"hallo\n")
    for _ in range(2):
        with pytest.raises(bridge.StageFailed, match=r"in\.txt: damaged: the bytes were changed"):
            run(made)
    assert (made / "out/first/a").read_text() == before and (made / "runs").read_text() == "12"
    os.utime(made / "in.txt")  # so it was meant
    assert run(made).action == "run"


@pytest.mark.parametrize("how", ["absolute", "relative"])
@pytest.mark.parametrize("what", ["file", "folder"])
def test_an_input_outside_of_the_project(toy: Path, tmp_path: Path, how: str, what: str) -> None:
    """As a model in a folder of the user's: it is read, watched, and nothing here can mend it."""
    text = tmp_path / "elsewhere/text"
    text.parent.mkdir()
    text.write_text("hello\n")
    path = text if what == "file" else text.parent
    name = str(path) if how == "absolute" else os.path.relpath(path, toy)
    stage = DATA.replace("cp data/rows.jsonl", f"cp {os.path.relpath(text, toy)}")
    (toy / "dvc.yaml").write_text(stage.replace("data/rows.jsonl", name))
    assert run(toy).action == "run"
    assert run(toy).action == "unchanged"
    assert check(toy).sound
    rot(text)
    assert [what for _, what in found(toy)] == ["damaged"]
    (toy / "copy").unlink()
    shutil.rmtree(toy / ".dvc/cache")
    with pytest.raises(bridge.StageFailed, match="elsewhere/text: damaged: the bytes were changed"):
        run(toy)
    os.utime(text)
    assert run(toy).action == "run"
    assert (toy / "copy").read_bytes() == text.read_bytes()


def test_an_input_of_the_repository_around_the_project(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is damaged is moved to where no file of the project is."""
    root, text = init_project(tmp_path / "a/b/c/toy"), tmp_path / "text"
    shutil.move(root / ".git", tmp_path)
    text.write_text("hello\n")
    name = os.path.relpath(text, root)
    (root / "dvc.yaml").write_text(DATA.replace("data/rows.jsonl", name))
    (root / "text").write_text("another\n")
    monkeypatch.chdir(root)
    assert run(root).action == "run"
    commit(tmp_path, "all")
    rot(text)
    assert repair(root).after.sound
    assert text.read_text() == "hello\n" and (root / "text").read_text() == "another\n"


def test_rotten_data_is_restored_before_it_is_read(toy: Path, tracked: Path) -> None:
    rot(tracked)
    outcome = run(toy)
    assert "data/rows.jsonl was damaged: restored" in outcome.reasons
    assert (toy / "copy").read_text() == "1\n2\n"


def test_a_new_output_is_not_replaced_by_a_rotten_object(made: Path) -> None:
    """DVC left the bad object where it was, and linked it over what the stage had just written."""
    old, text = object_of(made, "out/each-travel"), (made / "out/each-travel").read_text()
    (made / "in.txt").write_text("other\n")
    assert both(made) == ["run", "run"]
    rot(old)
    (made / "in.txt").write_text("hello\n")
    (made / "each.py").write_text(EACH + "# the same output, by another way\n")
    assert both(made) == ["restore", "run"]
    assert (made / "out/each-travel").read_text() == text
    assert check(made).sound


@pytest.mark.parametrize("what", ["a file", "the listing", "the listing, in half"])
def test_a_bad_object_costs_no_run_while_the_output_is_sound(made: Path, what: str) -> None:
    """Without its listing in the cache, DVC ran the stage, and never wrote the listing again."""
    bad = object_of(made, "out/first/b" if what == "a file" else "out/first")
    if what == "the listing, in half":
        written(bad, bad.read_bytes()[:20])
    else:
        bad.unlink()
    outcome = run(made)
    word = "damaged" if what == "the listing, in half" else "missing"
    assert outcome.action == "restore"
    assert outcome.reasons == [f"out/first was {word} in the cache, and is sound here"]
    assert check(made).sound and both(made) == ["unchanged", "unchanged"]
    assert (made / "runs").read_text() == "12"


def test_the_last_sound_copy_is_kept_when_the_stage_fails(made: Path) -> None:
    """DVC removes outputs before it runs a stage, and put rotten ones back when it failed."""
    rot(object_of(made, "out/first/b"))
    (made / "first.py").write_text("raise SystemExit('first: no')\n")
    with pytest.raises(bridge.StageFailed, match="first: no"):
        run(made)
    assert (made / "out/first/b").read_text() == "b: hello\n"


@pytest.mark.parametrize("how", ["another's", "rotten", "no text"])
def test_a_bad_record_of_the_run_cache_restores_nothing(made: Path, how: str) -> None:
    """One that named another's output was believed: dvc.lock then recorded the wrong bytes."""
    other = record_of(made, "first")
    (made / "in.txt").write_text("other\n")
    run(made)
    theirs = record_of(made, "first")
    if how == "another's":
        written(theirs, other.read_bytes())
    elif how == "rotten":
        rot(theirs)
    else:
        written(theirs, b"\xff" * 100)
    (made / "in.txt").write_text("hello\n")
    assert run(made).action == "restore"
    (made / "in.txt").write_text("other\n")
    assert run(made).action == "run"
    assert (made / "out/first/a").read_text() == "a: other\n"


# What is sent and what arrives.


def test_a_rotten_object_is_not_sent(made: Path) -> None:
    store(made)
    bad = object_of(made, "out/first/b")
    rot(bad)
    with pytest.raises(UserError, match=rf"{bad.name} \(out/first/b .*verify --repair"):
        remote.push(made)
    assert not (made / "remote").exists() or not list((made / "remote").rglob(bad.name))
    assert remote.push(made, ["each@travel"]).files == 1  # which does not need it
    assert repair(made).after.sound


def test_what_arrives_rotten_is_refused(made: Path) -> None:
    store(made)
    remote.push(made)
    bad = object_of(made, "out/first/b")
    record = record_of(made, "first")
    for path in (bad, record):
        rot(next((made / "remote").rglob(path.name)))
    shutil.rmtree(made / ".dvc/cache")
    shutil.rmtree(made / "out")
    moved = remote.pull(made)
    assert sorted(Path(name).name for name in moved.damaged) == sorted((bad.name, record.name))
    assert not bad.exists() and not record.exists()
    assert both(made) == ["run", "unchanged"]
    assert check(made).sound


# A cache that lies.


def relabel(root: Path, name: str, *, md5: str = "") -> None:
    """Have the only record of `first` and dvc.lock say that its folder has a file of this name.

    All hashes are right; the listing, an object like others, arrives with a pull.
    """
    old = yaml.safe_load((root / "dvc.lock").read_text())["stages"]["first"]["outs"][0]["md5"]
    entries = json.loads(object_of(root, "out/first").read_text())
    entries[0] = {"relpath": name, "md5": md5 or entries[0]["md5"]}
    listing = json.dumps(entries).encode()
    new = f"{md5_of(listing)}.dir"
    place = object_path(root / ".dvc/cache", new)
    place.parent.mkdir(exist_ok=True)
    place.write_bytes(listing)
    place.chmod(0o444)
    record = record_of(root, "first")
    lock = (root / "dvc.lock").read_text().replace(old, new)
    (root / "dvc.lock").write_text(lock)
    entry = yaml.safe_load(record.read_text().replace(old, new))
    record.unlink()
    record.with_name(integrity.run_name(entry)[1]).write_text(integrity.record_text(entry))


BAD_NAMES = ["../../../escaped", "{root}/../escaped", "b", "a//b", "./x", "..", "", "a\nb", "b/c"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_listing_names_files_of_its_folder(made: Path, name: str) -> None:
    relabel(made, name.format(root=made))
    shutil.rmtree(made / "out")
    assert any(one.kind == "object" and "lists" in one.note for one in check(made).findings)
    assert both(made) == ["run", "restore"]
    assert sorted(path.name for path in (made / "out/first").iterdir()) == ["a", "b", "c"]
    assert not list(made.parent.rglob("escaped"))


def test_what_arrives_with_names_of_elsewhere_is_refused(made: Path) -> None:
    store(made)
    relabel(made, "../../../escaped")
    shutil.copytree(made / ".dvc/cache", made / "remote")
    shutil.rmtree(made / ".dvc/cache")
    shutil.rmtree(made / "out")
    with pytest.raises(UserError, match=r"listing of a folder is not sound: .*escaped"):
        remote.pull(made)
    assert not list(made.parent.rglob("escaped"))
    assert both(made) == ["run", "run"]


def test_a_hash_that_is_a_path_is_no_object(made: Path) -> None:
    store(made)
    victim = made.parent / "victim"
    victim.write_text("mine")
    text = (made / "dvc.lock").read_text()
    md5 = yaml.safe_load(text)["stages"]["each@travel"]["outs"][0]["md5"]
    bad = "../" * 5 + victim.name  # from .dvc/cache/files/md5
    (made / "dvc.lock").write_text(text.replace(md5, bad))
    for act in (check, repair, remote.push, remote.pull):
        with contextlib.suppress(UserError):
            act(made)
        assert victim.read_text() == "mine"
    (made / "dvc.lock").write_text(text.replace(md5, bad))
    (made / "out/each-travel").unlink()
    assert both(made) == ["unchanged", "run"]
    assert victim.read_text() == "mine"
    relabel(made, "a", md5=bad)
    assert both(made)[0] == "run"
    assert victim.read_text() == "mine"
