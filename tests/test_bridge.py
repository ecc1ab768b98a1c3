"""The bridge against real DVC: decisions, reasons, keys, streams, limits and failures."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from conftest import BIN, REPO, sh
from stages.errors import UserError
from tasks import bridge, command, integrity, overrides


def run(root: Path, name: str = "first", limit: float = 60, **env: str) -> bridge.Outcome:
    return bridge.reproduce(root, name, lambda line: None, limit, env)


def need(root: Path, name: str = "first") -> bridge.Need:
    return bridge.status(root)[name]


def actions(root: Path) -> dict[str, str]:
    return {name: need.action for name, need in bridge.status(root).items()}


def test_graph_is_that_of_dvc_yaml(toy: Path) -> None:
    assert bridge.graph(toy) == {"first": set(), "each@travel": {"first"}}


def test_graph_of_the_project_orders_upstream_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    graph = bridge.graph(REPO)
    order = list(graph)
    assert all(order.index(up) < order.index(stage) for stage in graph for up in graph[stage])
    assert graph["export"] == graph["measure"] == {"quantize"}  # never an adapter
    assert graph["finetune@travel"] == {"quantize", "prepare@travel"}  # and never what is measured
    assert graph["evaluate@travel"] == {"measure", "convert@travel"}
    assert graph["convert@travel"] == {"finetune@travel", "export"}
    assert graph["package"] == {"evaluate@travel"}


def test_run_then_unchanged_then_restored(toy: Path) -> None:
    first = run(toy)
    assert (first.action, first.reasons, first.outs) == ("run", ["never run"], ["out/first"])
    assert run(toy).action == "unchanged"
    (toy / "out/first").unlink()
    again = run(toy)
    assert (again.action, again.reasons) == ("restore", ["out/first missing"])
    assert (toy / "out/first").read_text() == "hello\n"
    assert again.key == first.key


NEVER_THE_SAME = """
import os, time
os.makedirs("out", exist_ok=True)
open("out/first", "w").write(str(time.time_ns()))
"""


def test_a_stage_that_makes_other_bytes_of_the_same_is_told(toy: Path) -> None:
    def made_again() -> list[str]:
        (toy / "out/first").unlink()
        shutil.rmtree(toy / ".dvc/cache")
        again = run(toy)
        assert again.action == "run"
        return again.reasons

    run(toy)
    assert made_again() == ["out/first not cached"]
    (toy / "first.py").write_text(NEVER_THE_SAME)
    assert run(toy).reasons == ["first.py modified"]
    told = "out/first: the same inputs now make other bytes"
    assert made_again() == [told, "out/first not cached"]
    overrides.apply(toy, {"quantize.bits": 8})
    assert run(toy).reasons == ["params quantize.bits 4 → 8"]


def test_a_parameter_that_goes_back_restores_the_first_bytes(toy: Path) -> None:
    (toy / "first.py").write_text(
        "import time; open('out/first', 'w').write(str(time.time_ns()))".replace(
            "open", "__import__('os').makedirs('out', exist_ok=True); open"
        )
    )
    key, bytes_ = run(toy).key, (toy / "out/first").read_bytes()
    overrides.apply(toy, {"quantize.bits": 8})
    assert need(toy).reasons == ["params quantize.bits 4 → 8"]
    other = run(toy)
    assert other.action == "run" and other.key != key
    overrides.apply(toy, {"quantize.bits": 4})
    assert need(toy).action == "restore"
    back = run(toy)
    assert (back.action, back.key) == ("restore", key)
    assert (toy / "out/first").read_bytes() == bytes_


def test_restore_is_not_promised_for_inputs_never_seen(toy: Path) -> None:
    """Once said restorable when the lock's outputs were cached, whatever the inputs were now."""
    run(toy)
    (toy / "in.txt").write_text("something new\n")
    assert need(toy) == bridge.Need("run", ["in.txt modified"])


def test_status_says_why_and_what_waits(toy: Path) -> None:
    assert actions(toy) == {"first": "run", "each@travel": "run"}
    run(toy)
    run(toy, "each@travel")
    assert actions(toy) == {"first": "unchanged", "each@travel": "unchanged"}
    overrides.apply(toy, {"quantize.bits": 8})
    needs = bridge.status(toy)
    assert needs["first"].reasons == ["params quantize.bits 4 → 8"]
    assert needs["each@travel"].reasons == ["waits for first"]


def test_an_output_changed_by_hand_is_noticed_and_mended(toy: Path) -> None:
    run(toy)
    (toy / "out/first").write_text("tampered")
    assert need(toy).reasons == ["out/first was changed since"]
    assert run(toy).action == "restore"
    assert (toy / "out/first").read_text() == "hello\n"


def test_dvc_repro_and_the_bridge_agree(toy: Path) -> None:
    sh("dvc", "repro", cwd=toy)
    assert actions(toy) == {"first": "unchanged", "each@travel": "unchanged"}
    (toy / "in.txt").write_text("new\n")
    assert run(toy).action == "run"
    assert run(toy, "each@travel").action == "run"
    assert "up to date" in sh("dvc", "status", cwd=toy).stdout


def test_what_others_change_between_two_looks_is_seen(toy: Path) -> None:
    """The bridge reads DVC's files again only when one has changed."""
    run(toy)
    run(toy, "each@travel")
    assert run(toy).action == "unchanged"
    (toy / "in.txt").write_text("new\n")
    sh("dvc", "repro", cwd=toy)  # writes dvc.lock
    assert run(toy).action == run(toy, "each@travel").action == "unchanged"
    text = (toy / "dvc.yaml").read_text()
    (toy / "dvc.yaml").write_text(text.replace("python first.py", "python -B first.py"))
    assert run(toy).reasons == ["command or outputs changed"]
    values = (toy / "params.yaml").read_text()
    assert "  travel:" in values
    (toy / "params.yaml").write_text(values.replace("  travel:", "  food:"))
    assert run(toy, "each@food").action == "run"


def test_key_is_the_name_of_dvcs_own_run_cache_entry(toy: Path) -> None:
    key = run(toy).key
    assert key is not None and len(key) == 64
    assert (toy / ".dvc/cache/runs" / key[:2] / key).is_dir()


def test_key_is_sha256_of_what_the_stage_depends_on(toy: Path) -> None:
    key = run(toy).key
    entry = yaml.safe_load((toy / "dvc.lock").read_text())["stages"]["first"]
    for dep in entry["deps"]:
        del dep["size"]
    entry["outs"] = [out["path"] for out in entry["outs"]]
    text = json.dumps(entry, sort_keys=True).encode()
    assert hashlib.sha256(text).hexdigest() == key


def test_lines_stream_while_the_stage_runs(toy: Path) -> None:
    (toy / "first.py").write_text(
        "import time, os\nprint('early')\ntime.sleep(1.5)\nos.makedirs('out')\n"
        "open('out/first', 'w').write('x')\nprint('late')\n"
    )
    seen: dict[str, float] = {}
    bridge.reproduce(toy, "first", lambda line: seen.setdefault(line, time.monotonic()), 60)
    assert seen["late"] - seen["early"] > 1


def test_environment_reaches_the_stage(toy: Path) -> None:
    (toy / "first.py").write_text(
        "import os, sys\nos.makedirs('out')\n"
        "open('out/first', 'w').write(os.environ['OLIVEPRESS_RUN_ID'] + sys.executable)\n"
    )
    run(toy, OLIVEPRESS_RUN_ID="run-7 ")
    assert (toy / "out/first").read_text() == f"run-7 {BIN / 'python'}"


def test_failure_carries_the_last_words_and_puts_outputs_back(toy: Path) -> None:
    run(toy)
    (toy / "first.py").write_text(
        "import sys\nprint('noise')\nsys.exit('first: row 3 is bad\\ndo this instead')\n"
    )
    with pytest.raises(bridge.StageFailed, match=r"^first: row 3 is bad\ndo this instead$"):
        run(toy)
    assert (toy / "out/first").read_text() == "hello\n"
    assert need(toy).action == "run"  # a failure is never cached


def test_failure_without_a_message_says_how_it_ended(toy: Path) -> None:
    (toy / "first.py").write_text("import os\nprint('so far so good')\nos.kill(os.getpid(), 9)\n")
    with pytest.raises(
        bridge.StageFailed, match=r"first: so far so good \((killed by SIGKILL|exit)"
    ):
        run(toy)


def test_a_stage_that_makes_no_output_fails(toy: Path) -> None:
    (toy / "first.py").write_text("print('done')\n")
    with pytest.raises(bridge.StageFailed, match="out/first"):
        run(toy)


def test_time_limit_kills_the_whole_process_group(toy: Path) -> None:
    (toy / "first.py").write_text(
        "import subprocess, os, time\n"
        "child = subprocess.Popen(['sleep', '600'])\n"
        "open('pids', 'w').write(f'{os.getpid()} {child.pid}')\ntime.sleep(600)\n"
    )
    with pytest.raises(bridge.StageFailed, match=r"stopped after its time limit of 0\.05 minutes"):
        run(toy, limit=3)
    for pid in (toy / "pids").read_text().split():
        assert not _alive(int(pid))


def test_stages_end_when_their_caller_is_stopped(toy: Path) -> None:
    (toy / "first.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    errors: list[BaseException] = []

    def work() -> None:
        try:
            run(toy)
        except BaseException as error:
            errors.append(error)

    with pytest.raises(KeyboardInterrupt), command.stages_end_with_caller():
        thread = threading.Thread(target=work)
        thread.start()
        _written(toy / "pid")
        raise KeyboardInterrupt
    thread.join(20)
    assert not thread.is_alive() and isinstance(errors[0], bridge.StageFailed)
    assert not _alive(int((toy / "pid").read_text()))


@pytest.mark.parametrize("shell", ["/bin/sh", "/bin/bash"])
@pytest.mark.parametrize("driver", ["bridge", "bridge with a shell", "dvc repro"])
def test_a_stage_dies_with_the_process_that_started_it(toy: Path, shell: str, driver: str) -> None:
    """SIGKILL leaves no chance to clean up: the stage itself is tied to its parent.

    Debian's sh stays between DVC and the stage; bash makes way. The bridge uses a shell only for a
    command that needs one.
    """
    if driver == "bridge with a shell":
        text = (toy / "dvc.yaml").read_text()
        (toy / "dvc.yaml").write_text(text.replace("python first.py", "python first.py && true"))
    (toy / "first.py").write_text(
        f"import sys\nsys.path.insert(0, {str(REPO)!r})\nimport os, time\n"
        "from stages.stage import die_with_parent\ndie_with_parent()\n"
        "open('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    path = f"{BIN}:{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(REPO), "SHELL": shell, "PATH": path}
    caller = subprocess.Popen(started(toy, driver), cwd=toy, env=env)
    pid = _written(toy / "pid")
    caller.kill()
    caller.wait()
    deadline = time.monotonic() + 10
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive(pid)


@pytest.mark.parametrize(("driver", "shell"), [("bridge", "/bin/sh"), ("dvc repro", "/bin/bash")])
def test_a_stage_outlives_the_shell_that_its_driver_was_started_from(
    toy: Path, driver: str, shell: str
) -> None:
    """As after `nohup olivepress run &` and a logout."""
    (toy / "first.py").write_text(
        f"import sys\nsys.path.insert(0, {str(REPO)!r})\nimport os, time\n"
        "from pathlib import Path\n"
        "from stages.stage import die_with_parent\ndie_with_parent()\n"
        "Path('pid').write_text(str(os.getpid()))\n"
        "while not Path('gone').exists(): time.sleep(0.1)\n"
        "time.sleep(1.2)\nPath('out').mkdir()\nPath('out/first').write_text('x')\n"
    )
    path = f"{BIN}:{os.environ['PATH']}"
    env = {**os.environ, "PYTHONPATH": str(REPO), "SHELL": shell, "PATH": path}
    start = f"import subprocess\nsubprocess.Popen({started(toy, driver)!r})\ninput()"
    login = subprocess.Popen(
        [sys.executable, "-c", start], cwd=toy, env=env, stdin=subprocess.PIPE, text=True
    )
    pid = _written(toy / "pid")
    login.communicate("\n", timeout=30)
    (toy / "gone").touch()
    deadline = time.monotonic() + 30
    while _alive(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (toy / "out/first").read_text() == "x"
    while not (toy / "dvc.lock").exists() and time.monotonic() < deadline:
        time.sleep(0.1)  # the driver's last act


def started(toy: Path, driver: str) -> list[str]:
    code = (
        "from pathlib import Path; from tasks import bridge; "
        f"bridge.reproduce(Path({str(toy)!r}), 'first', print, 600)"
    )
    if driver.startswith("bridge"):
        return [sys.executable, "-c", code]
    return [str(BIN / "dvc"), "repro", "first"]


def test_two_stages_at_once_in_threads(toy: Path) -> None:
    overrides.apply(toy, {"adapters.food.data": "data/travel.jsonl"})
    run(toy)
    outcomes: list[bridge.Outcome] = []
    threads = [
        threading.Thread(target=lambda n=name: outcomes.append(run(toy, n)))
        for name in ("each@travel", "each@food")
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(o.stage for o in outcomes) == ["each@food", "each@travel"]
    assert set(actions(toy).values()) == {"unchanged"}


def test_toolchain_runs_again_when_a_library_changed(toy: Path) -> None:
    root = toy
    (root / "dvc.yaml").write_text(
        "stages:\n  toolchain:\n    cmd: python -m stages.toolchain\n"
        "    deps: [lock]\n    outs: [models/toolchain.json]\n"
    )
    (root / "lock").write_text("")
    run(root, "toolchain", PYTHONPATH=str(REPO))
    assert run(root, "toolchain").action == "unchanged"
    path = root / "models/toolchain.json"
    path.write_text(path.read_text().replace("olive-ai", "olive-ai-old"))
    sh("dvc", "commit", "--force", cwd=root)
    assert "up to date" in sh("dvc", "status", cwd=root).stdout  # DVC alone cannot know
    assert need(root, "toolchain").reasons == ["installed libraries changed"]
    assert run(root, "toolchain", PYTHONPATH=str(REPO)).action == "run"
    assert "olive-ai-old" not in path.read_text()

    path.write_text(path.read_text().replace("olive-ai", "olive-ai-old"))
    sh("dvc", "commit", "--force", cwd=root)
    path.unlink()  # as in a clone after dvc pull: the cache has it, the folder does not
    again = run(root, "toolchain", PYTHONPATH=str(REPO))
    assert again.action == "run" and again.reasons[0] == "installed libraries changed"
    assert "olive-ai-old" not in path.read_text()


@pytest.mark.parametrize(
    ("line", "step"),
    [("progress 3/8 layers", (3, 8, "layers")), ("progress 3/8", (3, 8, "")), ("progress", None)],
)
def test_progress_lines(line: str, step: tuple[int, int, str] | None) -> None:
    assert command.parse_progress(line) == step


def test_outside_a_project_the_error_says_so(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no folder upwards holds \.dvc"):
        bridge.find_root(tmp_path)


@pytest.mark.parametrize("name", ["model", "data/model", "/nonexistent/model"])
def test_an_input_that_is_not_there_is_named_with_its_parameter(toy: Path, name: str) -> None:
    """DVC says `[Errno 2] No such file or directory` of some, and no name of a parameter."""
    project = (toy / "dvc.yaml").read_text().replace("quantize.bits]", "quantize.bits, base]")
    (toy / "dvc.yaml").write_text(project.replace("in.txt,", '"${base.path}",'))
    overrides.apply(toy, {"base.path": name})
    for _ in range(2):
        with pytest.raises(bridge.StageFailed) as failed:
            run(toy)
        assert str(failed.value) == f"first: base.path: {name}: not found"
    (toy / "first.py").unlink()
    overrides.apply(toy, {"base.path": "in.txt"})
    with pytest.raises(bridge.StageFailed, match=r"^first: first\.py: not found$"):
        run(toy)


def test_an_error_without_words_is_named(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """DVC asserts much; what it says of a stage that it could not run would be just that."""

    def asserts(*args: object) -> None:
        raise AssertionError

    monkeypatch.setattr(integrity, "check_inputs", asserts)
    with pytest.raises(bridge.StageFailed, match="failed to reproduce 'first': AssertionError"):
        bridge.reproduce(toy, "first", lambda line: None, 60)


def test_a_broken_dvc_yaml_is_a_message(toy: Path) -> None:
    (toy / "dvc.yaml").write_text("stages: [")
    with pytest.raises(UserError, match=r"dvc\.yaml"):
        bridge.graph(toy)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    return state != "Z"


def _written(path: Path) -> int:
    """The number in a file that another process is about to write."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if path.exists() and path.read_text():
            return int(path.read_text())
        time.sleep(0.05)
    pytest.fail(f"{path} was not written")


def test_threads_leave_the_umask_alone(toy: Path) -> None:
    """DVC sets it to 0 for a moment; two threads at once left it there, for every later file."""
    os.umask(before := os.umask(0))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(bridge.settings, [toy] * 40))
    finally:
        sys.setswitchinterval(interval)
        os.umask(after := os.umask(before))
    assert after == before
