"""The `olivepress` command as a person types it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path

import pytest
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from conftest import BIN, hears_ctrl_c, reproduce, sh, typed
from figures import MEASURED
from lab import olivepress
from stages.errors import UserError
from stages.params import load
from tasks import bridge, doctor, server

COMMANDS = [
    "run",
    "convert",
    "status",
    "report",
    "generate",
    "chat",
    "publish",
    "push",
    "pull",
    "lineage",
    "doctor",
    "ui",
    "down",
    "demo",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str, tmp_path: Path) -> None:
    said = typed(command, "--help", cwd=tmp_path).stdout
    assert "Usage: olivepress" in said and len(said) > 200


def test_outside_a_project(tmp_path: Path) -> None:
    done = typed("status", cwd=tmp_path)
    assert done.exit_code == 1
    assert "no folder upwards holds .dvc" in done.stderr and "Traceback" not in done.stderr


def test_run_prints_one_line_a_stage_and_no_colours_in_a_pipe(toy: Path, api: str) -> None:
    said = sh("olivepress", "run", cwd=toy, PREFECT_API_URL=api).stdout
    lines = said.splitlines()
    assert re.fullmatch(r"Completed first +\d+\.\d s  never run", lines[0])
    assert re.fullmatch(r"Completed each@travel +\d+\.\d s  never run", lines[1])
    assert "\x1b[" not in said
    assert re.search(r"This run: http://127\.0\.0\.1:\d+/runs/flow-run/[0-9a-f-]{36}", said)


def test_run_works_from_a_folder_below(toy: Path, api: str) -> None:
    (toy / "deep").mkdir()
    report = json.loads(typed("run", "--json", cwd=toy / "deep", PREFECT_API_URL=api).stdout)
    assert [row["state"] for row in report["stages"]] == ["Completed", "Completed"]


def test_status_in_words_and_as_json(toy: Path, api: str) -> None:
    assert typed("run", cwd=toy, PREFECT_API_URL=api).exit_code == 0
    assert typed("status", cwd=toy).stdout.split() == [
        *("up", "to", "date", "first", "up", "to", "date", "each@travel")
    ]
    params = toy / "params.yaml"
    params.write_text(params.read_text().replace("bits: 4", "bits: 8"))
    said = typed("status", cwd=toy).stdout
    assert "first: params quantize.bits 4 → 8" in said and "each@travel: waits for first" in said
    needs = json.loads(typed("status", "--json", cwd=toy).stdout)
    assert needs["first"]["action"] == "run"


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("quantize.bitz=8", "quantize.bitz: unknown parameter; did you mean quantize.bits?"),
        ("quantize.bits=nine", "quantize.bits: must be 4 or 8, not 'nine'"),
        ("quantize.bits", "write it as key=value"),
    ],
)
def test_run_with_a_bad_setting(toy: Path, api: str, setting: str, message: str) -> None:
    before = (toy / "params.yaml").read_text()
    done = typed("run", "-S", setting, cwd=toy, PREFECT_API_URL=api)
    assert done.exit_code == 1 and message in done.stderr
    assert (toy / "params.yaml").read_text() == before


def test_a_failed_stage_is_told_once_without_a_traceback(toy: Path, api: str) -> None:
    (toy / "first.py").write_text("import sys\nsys.exit('first: row 3 is bad')\n")
    done = typed("run", cwd=toy, PREFECT_API_URL=api)
    assert done.exit_code == 1 and done.stdout.startswith("Failed    first")
    assert "olivepress: first: row 3 is bad" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_ctrl_c_stops_the_stage_and_says_so(toy: Path, api: str) -> None:
    (toy / "first.py").write_text(
        "import os, time\nopen('pid', 'w').write(str(os.getpid()))\ntime.sleep(600)\n"
    )
    process = subprocess.Popen(
        [BIN / "olivepress", "run"],
        cwd=toy,
        env={**os.environ, "PREFECT_API_URL": api},
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hears_ctrl_c,  # noqa: PLW1509
    )
    deadline = time.monotonic() + 60
    while not ((toy / "pid").exists() and (toy / "pid").read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130 and "what was finished is kept" in said
    with pytest.raises(ProcessLookupError):
        os.kill(int((toy / "pid").read_text()), 0)


def test_a_server_that_does_not_answer(toy: Path) -> None:
    done = typed("run", cwd=toy, PREFECT_API_URL="http://127.0.0.1:9/api")
    assert done.exit_code == 1 and "nothing answers there" in done.stderr


def test_the_server_takes_the_next_port_when_one_is_in_use() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        first = taken.getsockname()[1]
        assert server.free_port(first) != first


def test_no_port_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "PORTS", 1)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(UserError, match="no free port"):
            server.free_port(taken.getsockname()[1])


def test_ui_and_down(toy: Path, api: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its own server: loopback, SQLite in the project, outlives a warning, stopped by `down`.

    Another server takes its port in the meantime; the clone once used that one, and its runs were
    in another's history.
    """
    taken = int(api.split(":")[2].partition("/")[0])
    free, asked = server.free_port, []
    monkeypatch.setattr(
        server, "free_port", lambda *first: taken if not asked.append(first) and len(asked) == 1
        else free(*first),
    )  # fmt: skip
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    monkeypatch.setenv("PREFECT_HOME", str(toy / "no-profile"))
    said = typed("ui", cwd=toy).stdout.strip()
    try:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+", said)
        assert f"{said}/api" != api and server.is_own(toy, f"{said}/api")
        assert (toy / ".prefect/prefect.db").exists()
        for _ in range(3):  # each leaves a warning in the server's log, which ended it once
            with connect(
                f"{said.replace('http', 'ws')}/api/events/out", subprotocols=["prefect"]
            ) as ws:
                ws.send('{"type": "not auth"}')
                with pytest.raises(ConnectionClosed):
                    ws.recv(timeout=10)
        assert server.answers(f"{said}/api")
        assert "Expected 'auth' message first" in (toy / ".prefect/server.log").read_text()
    finally:
        stopped = typed("down", cwd=toy).stdout
    assert stopped == "stopped\n" and not server.answers(f"{said}/api")
    assert not (toy / "prefect.toml").exists()


def test_run_shows_figures_that_are_not_finite_or_not_measured(toy: Path, api: str) -> None:
    """Either was a TypeError at the end of a run."""
    (toy / "metrics").mkdir()
    metrics = toy / "metrics/travel.json"
    base = {"perplexity": None, "exact_answer_rate": 0.0}
    agreement = MEASURED["agreement"] | {"mean_kl": None}
    metrics.write_text(json.dumps(MEASURED | {"base": base, "agreement": agreement}))
    said = typed("run", cwd=toy, PREFECT_API_URL=api).stdout
    assert re.search(r"base model +not finite +0\.0% +8\.0 MB", said)
    assert "mean KL not finite" in said and "1,000 tokens/s with the adapter" in said
    assert "200 of the float model in PyTorch" in said
    none = dict.fromkeys(["onnx_off", "onnx_on", "agreement", "speed"])
    metrics.write_text(json.dumps(MEASURED | none | {"not_measured": "no such provider"}))
    said = typed("run", cwd=toy, PREFECT_API_URL=api).stdout
    assert re.search(r"ONNX, adapter on +not measured +not measured +\+0\.5 MB", said)
    assert "travel: not measured on this machine: no such provider" in said


def test_generate_before_there_is_a_package(toy: Path) -> None:
    done = typed("generate", "hello", cwd=toy)
    assert done.exit_code == 1 and "olivepress run makes it" in done.stderr


def test_generate_streams_and_adapters_switch(lab: Path) -> None:
    done = typed("generate", "What day follows Sunday?", "--adapter", "none", cwd=lab)
    assert done.exit_code == 0 and "Monday" in done.stdout
    done = typed("generate", "x", "--adapter", "nope", cwd=lab)
    assert done.exit_code == 1 and "choose one of travel, none" in done.stderr


def test_an_adapter_from_elsewhere_is_converted_and_used(lab: Path, tmp_path: Path) -> None:
    """Plain PEFT over the float base; its B is 0 as PEFT starts it, so the base answers."""
    mine, file = tmp_path / "mine", tmp_path / "mine.onnx_adapter"
    targets = yaml.safe_load((lab / "params.yaml").read_text())["finetune"]["target_modules"]
    for modules in (targets[:1], targets):
        model = AutoModelForCausalLM.from_pretrained(lab / "models/base")
        config = LoraConfig(r=4, target_modules=modules, task_type="CAUSAL_LM")
        get_peft_model(model, config).save_pretrained(mine)
        done = typed("convert", str(mine), "--out", str(file), cwd=lab)
        if modules != targets:
            assert done.exit_code == 1 and "weight is missing; the ONNX model" in done.stderr
            assert not file.exists()
    assert done.exit_code == 0
    question = ("generate", "What day follows Sunday?", "--adapter")
    answers = [typed(*question, name, cwd=lab).stdout for name in (str(file), "none")]
    assert answers[0] == answers[1] and "Monday" in answers[0]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "adapter_config.json: not there; expected a folder that PEFT wrote"),
        (["adapter_config.json", "adapter_model.bin"], "a pickle is not read: save it as safe"),
        (["adapter_config.json", "adapter_model.safetensors"], "adapter_config.json: not JSON"),
    ],
)
def test_what_is_no_adapter_is_refused(
    toy: Path, tmp_path: Path, files: list[str], message: str
) -> None:
    (toy / "models/onnx").mkdir(parents=True)
    contract = {"dtype": "float32", "inputs": []}
    (toy / "models/onnx/adapter_inputs.json").write_text(json.dumps(contract))
    (tmp_path / "mine").mkdir()
    for name in files:
        (tmp_path / "mine" / name).write_text("?")
    done = typed("convert", str(tmp_path / "mine"), cwd=toy)
    assert done.exit_code == 1 and message in done.stderr


def test_chat_line_by_line(lab: Path) -> None:
    lines = "What day follows Sunday?\n/adapter none\nWhat day follows Sunday?\n/adapter x\n/what\n"
    done = subprocess.run(
        [BIN / "olivepress", "chat"], cwd=lab, input=lines, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    answers = done.stdout.splitlines()
    assert len(answers) == 2 and "Monday" in answers[1] and answers[0] != answers[1]
    assert "adapter: none" in done.stderr and "choose one of travel, none" in done.stderr
    assert "commands:" in done.stderr


def test_doctor_is_content_with_the_lock(lab: Path) -> None:
    checks = {check["name"]: check for check in olivepress(lab, "doctor")}
    assert checks["model"]["message"].startswith("built-in")
    assert {check["verdict"] for check in checks.values()} == {"ok"}


def test_doctor_knows_what_clashes(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.CLASHES, "pytest", ("<1", "it was another time"))
    problems = [c for c in doctor.check(toy) if c.verdict == "problem"]
    assert [check.name for check in problems] == ["pytest"]
    with pytest.raises(UserError, match=r"pytest .* is installed, <1 is needed: it was another"):
        doctor.check_or_raise(toy)


def test_doctor_warns_of_what_nobody_tried(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(doctor.TRIED, "pytest", ["==1.*"])
    (warning,) = (check for check in doctor.check(toy) if check.name == "pytest")
    assert warning.verdict == "warning" and "==1.* was tried" in warning.message
    doctor.check_or_raise(toy)


def test_doctor_sizes_a_local_model_by_its_headers(lab: Path, toy: Path) -> None:
    text = (toy / "params.yaml").read_text()
    text = text.replace("source: builtin", "source: local").replace(
        "path: data/everyday.jsonl", f"path: {lab / 'models/base'}"
    )
    (toy / "params.yaml").write_text(text)
    model = next(check for check in doctor.check(toy) if check.name == "model")
    assert model.message.endswith("2 M parameters")


def test_no_disk_is_told_before_anything_starts(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("usage", (), {"free": 1000})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"disk: 0\.0 GB free, about 0\.2 GB needed"):
        doctor.check_or_raise(toy)


GB = 10**9


@pytest.fixture
def big(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The toy with a stage that makes models/base, of 1,000 million weights as doctor sees it."""
    text = (toy / "dvc.yaml").read_text().replace("  first:", "  fetch:")
    (toy / "dvc.yaml").write_text(text.replace("out/first", "models/base"))
    (toy / "first.py").write_text(
        "import os\nos.makedirs('models/base', exist_ok=True)\nos.makedirs('out', exist_ok=True)\n"
        "open('models/base/x', 'w').write(open('in.txt').read())\n"
    )
    (toy / "each.py").write_text("import sys\nopen(f'out/each-{sys.argv[1]}', 'w')\n")
    monkeypatch.setattr(doctor, "parameters", lambda *args: GB)
    return toy


def needed(root: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """Gigabytes without which a run is refused."""
    usage = type("usage", (), {"free": -1})
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage)
    disk = next(check for check in doctor.check(root) if check.name == "disk")
    assert disk.verdict == "problem"
    return float(disk.message.split("about ")[1].split()[0])


def test_disk_is_asked_for_only_by_what_will_run(
    big: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with nothing to do was refused for the disk that its own outputs had taken."""
    assert needed(big, monkeypatch) == 4.2  # 2 bytes a weight, here and in the cache, and 0.2
    for stage in ("fetch", "each@travel"):
        bridge.reproduce(big, stage, print, 60)
    assert needed(big, monkeypatch) == 0
    (big / "in.txt").write_text("other")
    assert needed(big, monkeypatch) == 2.2  # the old one makes room
    (big / "in.txt").write_text("hello\n")
    shutil.rmtree(big / "models")
    assert needed(big, monkeypatch) == 2.2  # the cache has it


def test_disk_for_the_hubs_own_copy(
    big: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = big / "params.yaml"
    params.write_text(params.read_text().replace("source: builtin", "source: hf"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert needed(big, monkeypatch) == 6.2
    base = load(params).base
    name = f"models--{base.id.replace('/', '--')}"
    (tmp_path / "hub" / name / "snapshots" / str(base.revision)).mkdir(parents=True)
    assert needed(big, monkeypatch) == 4.2


def test_lineage_of_a_file_that_was_changed_says_so(toy: Path) -> None:
    reproduce(toy)
    assert "warning" not in typed("lineage", "out/first", cwd=toy).stdout
    (toy / "out/first").write_text("edited")
    said = typed("lineage", "out/each-travel", cwd=toy).stdout
    assert "warning   out/first: changed since: not what this stage made" in said
    chain = json.loads(typed("lineage", "out/first", "--json", cwd=toy).stdout)
    assert chain[0]["changed"] == ["out/first"]
    (toy / "out/first").unlink()
    said = typed("lineage", "out/each-travel", cwd=toy).stdout
    assert "warning   out/first: missing" in said


def test_lineage_names_the_files_of_a_folder_and_does_without_the_package(lab: Path) -> None:
    """The record of `package` is inside of it; a missing one was a traceback for every file."""
    config, package, aside = lab / "models/base/config.json", lab / "models/package", lab / "aside"
    before = config.read_bytes()
    package.rename(aside)
    config.write_bytes(before + b"\n")
    try:
        chain = olivepress(lab, "lineage", "models/onnx")
        changed = {origin["stage"]: origin["changed"] for origin in chain if origin["changed"]}
        assert changed == {"fetch": ["models/base/config.json"]}
    finally:
        config.write_bytes(before)
        aside.rename(package)


def test_doctor_shows_a_mistake_in_params(toy: Path) -> None:
    text = (toy / "params.yaml").read_text()
    (toy / "params.yaml").write_text(text.replace("bits: 4", "bits: 5"))
    done = typed("doctor", "--json", cwd=toy)
    assert done.exit_code == 1
    assert "quantize.bits: must be 4 or 8" in json.loads(done.stdout)[-1]["message"]
