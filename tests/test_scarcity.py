"""Too little of something, or two at once: a message, nothing lost, and the next run mends."""

from __future__ import annotations

import contextlib
import os
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sweeping import wait_until
from tiny import small_disk

from conftest import BIN, REPO, sh, typed
from lab import commit
from stages.stage import versions, write_json
from tasks import bridge, overrides
from tasks.turn import turn

SLOW = """
import time
from pathlib import Path
Path("out").mkdir(exist_ok=True)
text = Path("in.txt").read_text()
with open("runs", "a") as file:
    file.write("x")
while not Path("go").exists():
    time.sleep(0.05)
Path("out/first").write_text(text)
"""
# What a person does in another terminal while the stage runs.
SWITCHING = """
import subprocess
from pathlib import Path
text = Path("in.txt").read_text()
for branch in {branches}:
    subprocess.run(["git", "checkout", "--quiet", branch], check=True)
Path("out").mkdir(exist_ok=True)
Path("out/first").write_text(text)
"""
LARGE = """
import os
from pathlib import Path
Path("out").mkdir(exist_ok=True)
Path("out/first").write_bytes(b"x" * 200_000)
"""


def run(root: Path, name: str = "first", said: list[str] | None = None) -> bridge.Outcome:
    return bridge.reproduce(root, name, (said if said is not None else []).append, 600)


def failed(root: Path, name: str = "first") -> str:
    """What a stage says that cannot be made."""
    with pytest.raises(bridge.StageFailed) as caught:
        run(root, name)
    text = str(caught.value)
    assert len(text.splitlines()) == 1, text
    return text


@contextlib.contextmanager
def in_background(*command: str, cwd: Path, **env: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        command, cwd=cwd, env={**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", **env},
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def test_a_second_run_in_a_clone_waits_and_says_for_whom(toy: Path, api: str) -> None:
    (toy / "first.py").write_text(SLOW)
    with in_background("olivepress", "run", cwd=toy, PREFECT_API_URL=api) as first:
        wait_until((toy / "runs").exists)
        with in_background("olivepress", "run", cwd=toy, PREFECT_API_URL=api) as second:
            assert second.stdout is not None
            line = second.stdout.readline()
            assert f"waits for another run in this clone, process {first.pid} since" in line
            (toy / "go").touch()
            said = second.communicate(timeout=60)[0]
            assert second.returncode == 0 and said.count("Cached") == 2, said
        assert first.wait(60) == 0
    assert (toy / "runs").read_text() == "x"


def test_a_pull_waits_for_a_run(toy: Path) -> None:
    with turn(toy, print), in_background("olivepress", "pull", cwd=toy) as pull:
        assert pull.stdout is not None
        line = pull.stdout.readline()
        assert line.startswith(f"waits for another run in this clone, process {os.getpid()}")
    assert "dvc.lock is not there" in typed("pull", cwd=toy).output


def test_a_run_and_dvc_repro_at_once_make_a_stage_once(toy: Path) -> None:
    (toy / "first.py").write_text(SLOW)
    said: list[str] = []
    with in_background("dvc", "repro", "first", cwd=toy) as repro:
        wait_until((toy / "runs").exists)
        outcomes: list[bridge.Outcome] = []
        waiting = threading.Thread(target=lambda: outcomes.append(run(toy, said=said)))
        waiting.start()
        wait_until(lambda: said)
        (toy / "go").touch()
        waiting.join(60)
        assert repro.wait(60) == 0
    assert len(said) == 1 and f"waits for (PID {repro.pid}): " in said[0]
    assert [outcome.action for outcome in outcomes] == ["restore"]
    assert (toy / "runs").read_text() == "x" and (toy / "out/first").read_text() == "hello\n"


@pytest.fixture
def branches(toy: Path) -> Path:
    """The toy on branch `mine`; on `other` its input and a parameter are different."""
    (toy / ".gitignore").write_text("/out/\n")
    sh("git", "checkout", "--quiet", "-b", "mine", cwd=toy)
    commit(toy, "mine")
    sh("git", "checkout", "--quiet", "-b", "other", cwd=toy)
    (toy / "in.txt").write_text("other\n")
    overrides.apply(toy, {"quantize.bits": 8})
    commit(toy, "other")
    sh("git", "checkout", "--quiet", "mine", cwd=toy)
    return toy


@pytest.mark.parametrize("there", [["other"], ["other", "mine"]], ids=["away", "away and back"])
def test_a_stage_under_which_a_branch_was_checked_out_is_not_recorded(
    branches: Path, there: list[str]
) -> None:
    """DVC hashes inputs when a stage has ended: the output of one branch was the other's."""
    plain = (branches / "first.py").read_text()
    switch = SWITCHING.format(branches=there)
    for branch in ("other", "mine"):
        sh("git", "checkout", "--quiet", branch, cwd=branches)
        (branches / "first.py").write_text(switch)
        commit(branches, "switching")
    said = failed(branches)
    assert said.startswith("first: in.txt") and "changed while it ran" in said
    assert "was another branch checked out?" in said
    assert not (branches / ".dvc/cache/runs").exists()
    (branches / "first.py").write_text(plain)
    assert run(branches).action == "run"
    expected = "hello\n" if there[-1] == "mine" else "other\n"
    assert (branches / "out/first").read_text() == expected


def test_a_run_that_ends_on_another_branch_says_what_is_stale(branches: Path, api: str) -> None:
    """Each stage was right for what it read, and the whole is of no branch."""
    (branches / "each.py").write_text(
        (branches / "each.py").read_text()
        + "import subprocess\nsubprocess.run(['git', 'checkout', '--quiet', 'other'], check=True)\n"
    )
    sh("git", "stash", "--quiet", cwd=branches)
    for branch in ("other", "mine"):
        sh("git", "checkout", "--quiet", branch, cwd=branches)
        sh("git", "stash", "apply", "--quiet", cwd=branches)
        commit(branches, "switching")
    done = typed("run", cwd=branches, PREFECT_API_URL=api)
    assert done.exit_code == 1
    said = done.output.splitlines()[2]
    assert said.startswith("olivepress: first: ") and "params quantize.bits 4 → 8" in said
    assert said.endswith("while this ran: run it again for what is there now")
    assert typed("run", cwd=branches, PREFECT_API_URL=api).exit_code == 0
    assert (branches / "out/each-travel").read_text() == "other\n" * 2


def test_a_stage_that_is_gone_from_dvc_yaml_is_a_message(toy: Path) -> None:
    bridge.begin(toy)
    (toy / "dvc.yaml").write_text("stages: {}\n")
    assert failed(toy).startswith("first: dvc.yaml has no such stage any more")


@contextlib.contextmanager
def full(disk: Path) -> Iterator[None]:
    """Fill a disk to its last byte until the end of the block."""
    filler = disk / ".filler"
    with contextlib.suppress(OSError), filler.open("wb", buffering=0) as file:
        while file.write(b"x" * 512):
            pass
    yield
    filler.unlink()


@pytest.mark.parametrize("where", ["everything", "outputs", "cache"])
def test_a_full_disk_is_one_line_and_the_next_run_mends(
    toy: Path, tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DVC was left with a list of locks of no bytes, a lock that its own process held, and a folder
    in its run-cache with no record in it: each would have ended all later runs.
    """
    (toy / "first.py").write_text(LARGE)
    folder = {"everything": "", "outputs": "out", "cache": ".dvc/cache"}[where]
    with small_disk(tmp_path / "disk", "1m") as disk:
        shutil.copytree(toy, disk, dirs_exist_ok=True)
        root = disk
        if folder:
            root = toy
            (toy / folder).mkdir(exist_ok=True)
            subprocess.run(["mount", "--bind", disk, toy / folder], check=True)
        monkeypatch.chdir(root)
        try:
            with full(disk):
                for _ in range(2):
                    said = failed(root)
                    assert said.startswith("first: ") and "space left on" in said
            bridge.begin(root)  # as every run does
            assert run(root).action == "run"
            assert (root / "out/first").read_bytes() == b"x" * 200_000
            assert run(root).action == "unchanged"
        finally:
            monkeypatch.chdir(tmp_path)
            if folder:
                subprocess.run(["umount", toy / folder], check=True)


@pytest.fixture
def read_only_cache(toy: Path) -> Iterator[Path]:
    """The toy's cache, made read-only as a mount is: root may write to what mode bits forbid."""
    cache = toy / ".dvc/cache"
    run(toy)
    try:
        subprocess.run(["mount", "--bind", cache, cache], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"nothing can be mounted here: {error}")
    subprocess.run(["mount", "-o", "remount,ro,bind", cache], check=True)
    yield cache
    subprocess.run(["umount", cache], check=False)


def test_a_read_only_cache_is_one_line_and_loses_nothing(toy: Path, read_only_cache: Path) -> None:
    assert run(toy).action == "unchanged"
    (toy / "in.txt").write_text("new\n")
    said = failed(toy)
    assert "the file system is read-only" in said and ".dvc/cache" in said, said
    subprocess.run(["umount", read_only_cache], check=True)
    assert run(toy).action == "run" and (toy / "out/first").read_text() == "new\n"
    (toy / "in.txt").write_text("hello\n")
    assert run(toy).action == "restore" and (toy / "out/first").read_text() == "hello\n"


HUNGRY = """
import resource, sys
sys.path.insert(0, {repo!r})
from stages import stage
def main(params):
    {eat}
stage.run(main, "quantize")
"""
EATERS = {
    "Python": "bytearray(10**13)",
    "NumPy": "import numpy; numpy.ones(10**13)",
    "PyTorch": "import torch; torch.ones(10**13)",
    "OpenBLAS": 'import os; print("OpenBLAS error: Memory allocation still failed after 10 '
    'retries, giving up."); os._exit(1)',
    "the loader": 'raise ImportError("libtorch_cpu.so: cannot map zero-fill pages")',
    "a thread": "import resource, threading; "
    "resource.setrlimit(resource.RLIMIT_AS, (1 << 28, 1 << 28)); threading.stack_size(1 << 29); "
    "threading.Thread(target=print).start()",
    "OpenMP": 'import os; os.write(2, b"libgomp: Thread creation failed: Resource temporarily '
    'unavailable\\n"); os._exit(1)',
    "C++": 'import os; os.write(2, b"what():  std::bad_alloc\\n"); os.abort()',
}


@pytest.mark.parametrize("eater", EATERS)
def test_out_of_memory_says_what_to_lower(toy: Path, eater: str) -> None:
    (toy / "dvc.yaml").write_text(
        "stages:\n  quantize:\n    cmd: python quantize.py\n    outs: [out/first]\n"
    )
    (toy / "models").mkdir()
    write_json(toy / "models/toolchain.json", versions())
    (toy / "quantize.py").write_text(HUNGRY.format(repo=str(REPO), eat=EATERS[eater]))
    said = failed(toy, "quantize")
    threads = ", or no more threads are allowed (ulimit -u)"
    ran_out = f"memory ran out{threads if eater in {'a thread', 'OpenMP'} else ''}"
    assert said.startswith(f"quantize: {ran_out}: lower quantize.calibration_samples"), said


@pytest.mark.parametrize("stage", ["quantize", "measure", "export", "finetune", "evaluate"])
def test_too_little_memory_for_the_libraries_is_said_before_they_are_loaded(stage: str) -> None:
    """SciPy's OpenBLAS asked for its buffer without end, where there was room for all but that."""
    adapter = ["--adapter", "travel"] if stage in ("finetune", "evaluate") else []
    done = subprocess.run(
        [BIN / "python", "-m", f"stages.{stage}", *adapter],
        cwd=REPO, capture_output=True, text=True, check=False, timeout=300,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_DATA, (350 << 20, 350 << 20)),
    )  # fmt: skip
    assert done.returncode == 1 and done.stderr.startswith(f"{stage}: memory ran out"), done.stderr


@pytest.fixture
def little_memory() -> Iterator[Path]:
    """A control group of 64 MB; its first version or its second, if this machine lends one."""
    first = Path("/sys/fs/cgroup/memory")
    group = (first if first.is_dir() else Path("/sys/fs/cgroup")) / f"olivepress-{os.getpid()}"
    limit = "memory.limit_in_bytes" if first.is_dir() else "memory.max"
    try:
        group.mkdir()
        (group / limit).write_text(str(64 << 20))
    except OSError as error:
        with contextlib.suppress(OSError):
            group.rmdir()
        pytest.skip(f"no control group can be made here: {error}")
    yield group
    with contextlib.suppress(OSError):
        group.rmdir()


def test_a_stage_that_the_kernel_kills_for_memory_says_so(toy: Path, little_memory: Path) -> None:
    (toy / "dvc.yaml").write_text(
        "stages:\n  finetune:\n    cmd: python first.py\n    outs: [out/first]\n"
    )
    (toy / "first.py").write_text(
        "import os\n"
        f"open({str(little_memory / 'cgroup.procs')!r}, 'w').write(str(os.getpid()))\n"
        "held = [bytearray(b'x' * (8 << 20)) for _ in range(64)]\n"
    )
    said = failed(toy, "finetune")
    assert said.startswith("finetune: memory ran out: lower finetune.batch_size"), said


def test_a_clock_that_goes_back_hides_no_change(toy: Path) -> None:
    """A file that is younger than now, and one that was changed before it was made."""
    future = time.time() + 10 * 86400
    os.utime(toy / "in.txt", (future, future))
    run(toy)
    os.utime(toy / "out/first", (future, future))
    assert run(toy).action == "unchanged"
    (toy / "in.txt").write_text("jello\n")  # of the same size, and by its time older
    os.utime(toy / "in.txt", (future - 20 * 86400, future - 20 * 86400))
    assert run(toy).action == "run" and (toy / "out/first").read_text() == "jello\n"


@pytest.mark.skipif(not shutil.which("faketime"), reason="faketime is not installed")
def test_a_run_completes_while_the_clock_is_two_days_back(toy: Path, api: str) -> None:
    done = typed("run", cwd=toy, PREFECT_API_URL=api)
    assert done.exit_code == 0
    (toy / "in.txt").write_text("jello\n")
    back = sh("faketime", "-f", "-2d", "olivepress", "run", cwd=toy, PREFECT_API_URL=api)
    assert back.stdout.count("Completed") == 2, back.stdout
    assert (toy / "out/first").read_text() == "jello\n"
    again = sh("olivepress", "run", cwd=toy, PREFECT_API_URL=api)
    assert again.stdout.count("Cached") == 2, again.stdout
