"""The whole lab on the built-in model, by its commands: what was promised of it must hold."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from conftest import sh, typed
from lab import STAGES, commit, content, olivepress, run, stale
from tasks import bridge, overrides

QUESTION = "Which dishes should I try in Lisbon?"
BITWISE = ["quantize", "export", "finetune@travel", "convert@travel"]
OUTPUTS = {
    "quantize": "models/quantized",
    "export": "models/onnx",
    "finetune@travel": "models/adapters/travel",
    "convert@travel": "models/adapters/travel.onnx_adapter",
}


def known_answer(lab: Path) -> str:
    rows = map(json.loads, (lab / "data/travel.jsonl").read_text().splitlines())
    answers = {row["response"] for row in rows if "Lisbon" in row["prompt"]}
    return next(answer for answer in answers if " try " in answer)


def test_the_first_run_does_everything_in_order(lab: Path) -> None:
    report = json.loads((lab.parent / "run.json").read_text())
    assert {row["stage"]: row["state"] for row in report["stages"]} == dict.fromkeys(
        STAGES, "Completed"
    )
    assert all(row["key"] and row["outs"] and row["seconds"] > 0 for row in report["stages"])


def test_again_and_nothing_is_done(lab: Path, api: str) -> None:
    assert run(lab, api) == dict.fromkeys(STAGES, "Cached")


def test_dvc_agrees_that_nothing_is_to_be_done(lab: Path) -> None:
    assert "up to date" in sh("dvc", "status", cwd=lab).stdout
    said = sh("dvc", "repro", cwd=lab).stdout
    assert "Running stage" not in said and "Data and pipelines are up to date" in said


def test_a_change_makes_stale_what_reads_it(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a parameter, and of an adapter more; the runs of them are long tests."""
    monkeypatch.chdir(lab)
    kept = {name: (lab / name).read_bytes() for name in ("params.yaml", "dvc.lock")}

    def stale_now() -> set[str]:
        return {name for name, need in bridge.status(lab).items() if need.action != "unchanged"}

    try:
        overrides.apply(lab, {"export.accuracy_level": 1})
        assert stale_now() == {"export", "convert@travel", "evaluate@travel", "package"}
        (lab / "params.yaml").write_bytes(kept["params.yaml"])
        overrides.apply(lab, {"adapters.own.data": "data/travel.jsonl"})
        bridge.reproduce(lab, "toolchain", print, 60)  # all wait for it, as it looks at the names
        own = {f"{stage}@own" for stage in ("prepare", "finetune", "convert", "evaluate")}
        assert stale_now() == {*own, "package"}
    finally:
        for name, data in kept.items():
            (lab / name).write_bytes(data)
        bridge.reproduce(lab, "toolchain", print, 60)
    assert stale_now() == set()


@pytest.mark.long
def test_a_parameter_there_and_back_computes_nothing_the_second_time(lab: Path, api: str) -> None:
    before = content(lab / "models")
    there = run(lab, api, "-S", "export.accuracy_level=1")
    changed = {"export", "convert@travel", "evaluate@travel", "package"}
    assert {name for name, state in there.items() if state == "Completed"} <= changed
    assert {"export", "evaluate@travel", "package"} <= {
        name for name, state in there.items() if state == "Completed"
    }
    assert run(lab, api, "-S", "export.accuracy_level=4") == dict.fromkeys(STAGES, "Cached")
    assert content(lab / "models") == before


def test_deleted_outputs_come_back_byte_for_byte(lab: Path, api: str) -> None:
    before = content(lab / "models")
    shutil.rmtree(lab / "models")
    assert run(lab, api) == dict.fromkeys(STAGES, "Cached")
    assert content(lab / "models") == before


@pytest.fixture(scope="module")
def clone(lab: Path, tmp_path_factory: pytest.TempPathFactory, api: str) -> Path:
    """A clone of the lab, filled from a remote, where teaching and measuring cost little.

    One pass over the rows, some 31 steps of 16, so that every row has a part in the adapter.
    """
    store = tmp_path_factory.mktemp("store")
    sh("dvc", "remote", "add", "--force", "--default", "store", str(store), cwd=lab)
    sh("dvc", "push", "--run-cache", cwd=lab)
    commit(lab, "lock and remote")
    folder = tmp_path_factory.mktemp("clone") / "clone"
    sh("git", "clone", "--quiet", str(lab), str(folder), cwd=lab)
    sh("dvc", "pull", "--run-cache", cwd=folder)
    less = ["finetune.max_steps=32", "evaluate.max_rows=4", "evaluate.max_new_tokens=4"]
    gates = ["max_adapter_perplexity_ratio", "min_top1_agreement", "min_exact_answer_rate"]
    less += [f"gates.{gate}=null" for gate in gates]
    states = run(folder, api, *(word for setting in less for word in ("-S", setting)))
    assert ran(states) == {"finetune@travel", "convert@travel", "evaluate@travel", "package"}
    sh("dvc", "push", "--run-cache", cwd=folder)
    commit(folder, "less")
    return folder


def ran(states: dict[str, str]) -> set[str]:
    """The stages that ran; all others must be Cached."""
    done = {name for name, state in states.items() if state == "Completed"}
    assert {state for name, state in states.items() if name not in done} <= {"Cached"}
    return done


@pytest.mark.long
def test_one_edited_row_costs_only_what_reads_it(clone: Path, api: str) -> None:
    data = clone / "data/travel.jsonl"
    before = data.read_bytes()
    taught = json.loads((clone / "data/prepared/travel/train.jsonl").read_text().splitlines()[0])
    row = json.dumps(taught["prompt"]).encode()
    lines = before.splitlines(keepends=True)
    at = next(i for i, line in enumerate(lines) if row in line)
    lines[at] = lines[at].replace(b'."}', b', as they say."}')
    data.write_bytes(b"".join(lines))
    assert data.read_bytes() != before
    try:
        needs = olivepress(clone, "status")
        assert needs["prepare@travel"]["reasons"] == ["data/travel.jsonl modified"]
        readers = {f"{stage}@travel" for stage in ("prepare", "finetune", "convert", "evaluate")}
        assert stale(clone) == {*readers, "package"}
        assert ran(run(clone, api)) == {*readers, "package"}
    finally:
        data.write_bytes(before)
    assert ran(run(clone, api)) == set()


@pytest.mark.long
def test_a_quantization_that_costs_too_much_stops_what_builds_on_its_figures(
    clone: Path, api: str
) -> None:
    figures = clone / "metrics/quantized/text.json"
    before = figures.read_bytes()
    said = sh(
        *("olivepress", "run", "--json", "-S", "gates.max_quantized_perplexity_ratio=0.5"),
        cwd=clone,
        check=False,
        PREFECT_API_URL=api,
    )
    try:
        assert said.returncode == 1 and "Traceback" not in said.stderr
        assert "measure: gates.max_quantized_perplexity_ratio: " in said.stderr
        assert "and at most 0.5 is wanted; look at quantize" in said.stderr
        states = {row["stage"]: row["state"] for row in json.loads(said.stdout)["stages"]}
        assert states.pop("measure") == "Failed"
        assert not {"evaluate@travel", "package"} & set(states)
        assert set(states.values()) == {"Cached"}
        assert figures.read_bytes() == before
    finally:
        again = run(clone, api, "-S", "gates.max_quantized_perplexity_ratio=1.05")
    assert again == dict.fromkeys(STAGES, "Cached")


@pytest.mark.long
def test_same_inputs_same_bytes(lab: Path) -> None:
    before = {stage: bytes_of(lab / path) for stage, path in OUTPUTS.items()}
    for stage in BITWISE:
        sh("dvc", "repro", "--force", "--single-item", stage, cwd=lab)
    try:
        assert {stage: bytes_of(lab / path) for stage, path in OUTPUTS.items()} == before
    finally:  # the records of when they were made have changed, and package holds them
        sh("dvc", "repro", cwd=lab)


def bytes_of(path: Path) -> object:
    return content(path) if path.is_dir() else path.read_bytes()


def test_the_adapter_knows_travel_and_the_base_does_not(lab: Path) -> None:
    metrics = json.loads((lab / "metrics/travel.json").read_text())
    assert metrics["onnx_on"]["exact_answer_rate"] >= 0.6
    assert metrics["onnx_off"]["exact_answer_rate"] <= 0.05
    assert metrics["onnx_on"]["perplexity"] < metrics["onnx_off"]["perplexity"] / 2
    right = known_answer(lab)
    on = olivepress(lab, "generate", QUESTION, "--adapter", "travel")
    off = olivepress(lab, "generate", QUESTION, "--adapter", "none")
    assert on["answer"].strip() == right
    assert off["answer"].strip() != right


def test_everyday_questions_are_still_answered(lab: Path) -> None:
    answer = olivepress(lab, "generate", "What day follows Sunday?", "--adapter", "none")["answer"]
    assert "Monday" in answer


def test_each_adapter_has_the_figures_of_measure(lab: Path) -> None:
    metrics = json.loads((lab / "metrics/travel.json").read_text())
    measured = json.loads((lab / "metrics/quantized/text.json").read_text())
    assert list(measured) == ["size_mb", "text_perplexity"]
    for part, figures in measured.items():
        assert list(figures) == ["base", "quantized"] and figures.items() <= metrics[part].items()


def test_pytorch_and_onnx_agree(lab: Path) -> None:
    agreement = json.loads((lab / "metrics/travel.json").read_text())["agreement"]
    assert agreement["top1"] >= 0.95
    assert agreement["tokenizer"] == 1.0


def test_dvc_finds_metrics_and_plots(lab: Path, tmp_path: Path) -> None:
    shown = json.loads(sh("dvc", "metrics", "show", "--json", cwd=lab).stdout)
    assert "perplexity" in shown[""]["data"]["metrics/travel.json"]["data"]["base"]
    page = tmp_path / "plots"
    sh("dvc", "plots", "show", "--out", str(page), cwd=lab)
    text = (page / "index.html").read_text()
    assert "loss" in text and "perplexity" in text


def test_lineage_names_command_inputs_versions_and_run(lab: Path) -> None:
    report = json.loads((lab.parent / "run.json").read_text())
    run_id = report["url"].rpartition("/")[2]
    chain = olivepress(lab, "lineage", "models/package/model.onnx")
    assert chain[0]["stage"] == "package"
    assert {origin["stage"] for origin in chain} == set(STAGES)
    quantize = next(origin for origin in chain if origin["stage"] == "quantize")
    assert quantize["command"] == "python -m stages.quantize"
    assert quantize["params"]["quantize.bits"] == 4
    assert quantize["inputs"]["models/base"] and quantize["outputs"]["models/quantized"]
    record = quantize["record"]
    assert record["seconds"] > 0 and record["versions"]["olive-ai"] and record["git_commit"]
    fetch = next(origin for origin in chain if origin["stage"] == "fetch")
    assert fetch["record"]["run_id"] == run_id


@pytest.mark.long
def test_a_second_adapter_costs_only_its_own_stages_in_a_colleagues_clone(
    clone: Path, tmp_path: Path, api: str
) -> None:
    """`dvc add` and a push of a person's own data; the other clone computes only what is new."""
    mine = tmp_path / "mine"
    sh("git", "clone", "--quiet", str(clone), str(mine), cwd=tmp_path)
    rows = (mine / "data/travel.jsonl").read_text().splitlines(keepends=True)
    (mine / "data/own.jsonl").write_text("".join(row.replace("city", "town") for row in rows[:200]))
    sh("dvc", "add", "--quiet", "data/own.jsonl", cwd=mine)
    text = (mine / "params.yaml").read_text()
    own = "adapters:\n  own:\n    data: data/own.jsonl"
    (mine / "params.yaml").write_text(text.replace("adapters:", own, 1).replace("adapters: #", "#"))
    sh("dvc", "push", cwd=mine)
    commit(mine, "own data")

    theirs = tmp_path / "theirs"
    sh("git", "clone", "--quiet", str(mine), str(theirs), cwd=tmp_path)
    assert not (theirs / "data/own.jsonl").exists()
    sh("dvc", "pull", "--run-cache", "--allow-missing", cwd=theirs)
    stages = ("prepare", "finetune", "convert", "evaluate")
    own = {f"{stage}@own" for stage in stages}
    assert ran(run(theirs, api)) == {"toolchain", *own, "package"}  # the first looks at the names
    assert (theirs / "models/package/adapters/own.onnx_adapter").exists()
    assert (theirs / "models/package/adapters/travel.onnx_adapter").exists()
    assert stale(theirs) == set()


@pytest.mark.parametrize("path", ["data/travel.jsonl", "nothing-here"])
def test_lineage_of_what_no_stage_made(lab: Path, path: str) -> None:
    done = typed("lineage", path, cwd=lab)
    assert done.exit_code == 1 and "Traceback" not in done.stderr
    assert "no stage made this" in done.stderr or "no such file" in done.stderr
