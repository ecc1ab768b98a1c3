"""What a sweep begins from and what it leaves: its plan, its results, its DVC experiments."""

from __future__ import annotations

import json
import shutil
from hashlib import md5
from pathlib import Path
from typing import Any

import pytest
import yaml
from sweeping import GRID, make

from conftest import sh, typed
from lab import commit
from stages.errors import UserError
from tasks import overrides
from tasks.pool.workspace import cache_of
from tasks.sweep import experiments, plan, results, spec
from tasks.sweep.results import FAILED, MET, OVER, Candidate, Result


def of(**changes: Any) -> spec.Spec:
    return spec.check(GRID | changes, "sweep.yaml")


def result_of(*found: tuple[str, float | None, float | None], **changes: Any) -> Result:
    """A sweep whose candidates ended in these states, with perplexity and size."""
    made = [
        Candidate(number, {"quantize.bits": 8}, state, figures={"perplexity": one, "size_mb": two})
        for number, (state, one, two) in enumerate(found, 1)
    ]
    return Result(of(**changes), "0" * 40, {}, {}, "run", made)


@pytest.mark.parametrize(
    ("found", "best", "front"),
    [
        ([(MET, 2, 5), (MET, 1, 9), (MET, 3, 1)], 2, [1, 2, 3]),
        ([(MET, 2, 5), (MET, 2, 6), (MET, 3, 5)], 1, [1]),  # dominated, by one figure each
        ([(MET, 2, 5), (MET, 2, 5), (MET, 2, 4)], 3, [3]),  # the second objective decides
        ([(MET, 2, 5), (MET, 2, 5)], 1, [1, 2]),  # the same: the first
        ([(MET, 1, None), (MET, 2, 5)], 2, [2]),
        ([(OVER, 1, 1), (FAILED, 1, 1), (MET, 2, 5)], 3, [3]),
        ([(OVER, 1, 1), (FAILED, None, None)], None, []),
        ([(MET, 0, 0)], 1, [1]),
        ([], None, []),
    ],
)
def test_best_and_front(found: Any, best: int | None, front: list[int]) -> None:
    result = result_of(*found).as_json()
    assert (result["best"], result["front"]) == (best, front)


def test_what_is_wanted_large_is_best_when_it_is() -> None:
    wanted = {"perplexity": "maximize", "size_mb": "minimize"}
    result = result_of((MET, 1, 1), (MET, 2, 2), (MET, 1, 2), objectives=wanted)
    assert (result.as_json()["best"], result.as_json()["front"]) == (2, [1, 2])


def test_executed_counts_what_was_computed_and_not_what_was_restored() -> None:
    result = result_of((MET, 1, 1), (FAILED, None, None))
    states = [[("a", "Completed"), ("b", "Cached")], [("a", "Completed"), ("c", "Failed")]]
    for one, rows in zip(result.candidates, states, strict=True):
        one.stages = [{"stage": stage, "state": state} for stage, state in rows]
    assert result.as_json()["executed"] == {"a": 2, "b": 0, "c": 0}


@pytest.mark.parametrize(
    ("name", "number", "said"),
    [
        ("other", None, "sweeps/other/result.json is not there: .*; there is grid"),
        ("grid", 3, "sweep grid: no candidate 3; it has 2"),
        ("grid", None, "sweep grid: no candidate meets all limits; name one by its number"),
    ],
)
def test_a_candidate_that_cannot_be_adopted(
    toy: Path, name: str, number: int | None, said: str
) -> None:
    results.write(toy, result_of((OVER, 1, 1), (FAILED, None, None)))
    before = (toy / "params.yaml").read_bytes()
    with pytest.raises(UserError, match=f"^{said}$"):
        results.kept(toy, name, number)
    told = typed("adopt", name, *([str(number)] if number else []), cwd=toy)
    assert told.exit_code == 1 and said[:20] in told.stderr and "\n" not in told.stderr.strip()
    assert (toy / "params.yaml").read_bytes() == before


def test_a_candidate_that_failed_is_adopted_by_its_number(toy: Path) -> None:
    results.write(toy, result_of((OVER, 1, 1), (FAILED, None, None)))
    told = json.loads(typed("adopt", "grid", "2", "--json", cwd=toy).stdout)
    assert told == {"candidate": 2, "changes": ["quantize.bits 4 → 8"]}
    assert yaml.safe_load((toy / "params.yaml").read_text())["quantize"]["bits"] == 8


@pytest.fixture
def project(tmp_path: Path) -> Path:
    return make(tmp_path / "project")


def refused(project: Path, said: str, **changes: Any) -> None:
    with pytest.raises(UserError, match=said) as error:
        plan.begin(project, of(**changes), "run")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("staged", [False, True])
def test_changed_code_is_refused_by_name(project: Path, staged: bool) -> None:
    for name in ("in.txt", "stage.py"):
        (project / name).write_text((project / name).read_text() + "\n")
    if staged:
        sh("git", "add", "in.txt", "stage.py", cwd=project)
    refused(project, r"^in.txt, stage.py: changed since the last commit.*commit first$")


def test_a_folder_without_a_commit_is_refused(project: Path) -> None:
    shutil.rmtree(project / ".git")
    refused(project, "a sweep needs a Git commit")
    sh("git", "init", "--quiet", cwd=project)
    refused(project, "a sweep needs a Git commit")


def test_what_params_yaml_says_otherwise_goes_with_all_candidates(project: Path) -> None:
    assert plan.begin(project, of(), "run").base == {}
    changes = {"quantize.group_size": 64, "finetune.target_modules": ["o_proj"]}
    adapter = {"data": "data/everyday.jsonl", "prompt_column": "p", "response_column": "r"}
    overrides.apply(project, changes | {"adapters.daily": adapter})
    (project / "dvc.lock").write_text("schema: '2.0'\n")
    (project / "notes.txt").write_text("not in Git, so no candidate's\n")
    begun = plan.begin(project, of(objectives={"daily.onnx_on.perplexity": "minimize"}), "run")
    assert begun.base == changes | {"adapters.daily": adapter}
    assert begun.commit == sh("git", "rev-parse", "HEAD", cwd=project).stdout.strip()


def test_a_key_that_was_taken_out_is_refused_by_name(project: Path) -> None:
    overrides.apply(project, {"run.time_limits": {"quantize": 5}})
    commit(project, "a limit")
    overrides.apply(project, {"run.time_limits": {}})
    refused(project, r"params.yaml: run.time_limits.quantize was taken out since the last commit")


def test_a_model_that_candidates_would_not_find_is_refused_by_name(project: Path) -> None:
    overrides.apply(project, {"base.source": "local", "base.path": "../theirs"})
    refused(project, r"^\.\./theirs is outside of the project, .*: write the whole path")
    overrides.apply(project, {"base.path": "mine"})
    refused(project, r"^mine is not in Git, so other machines do not have it")
    overrides.apply(project, {"base.path": "/theirs"})
    assert plan.begin(project, of(), "run").base["base.path"] == "/theirs"


def test_data_that_other_machines_do_not_have_is_refused_by_name(project: Path) -> None:
    shutil.copy(project / "data/travel.jsonl", project / "data/mine.jsonl")
    overrides.apply(project, {"adapters.travel.data": "data/mine.jsonl"})
    refused(project, r"^data/mine.jsonl is not in Git, so other machines do not have it")
    sh("dvc", "add", "data/mine.jsonl", cwd=project)
    commit(project, "kept by DVC")
    assert plan.begin(project, of(), "run").base == {}


def test_data_in_a_folder_that_dvc_keeps_is_there(project: Path) -> None:
    (project / "rows").mkdir()
    shutil.copy(project / "data/travel.jsonl", project / "rows")
    sh("dvc", "add", "rows", cwd=project)
    overrides.apply(project, {"adapters.travel.data": "rows/travel.jsonl"})
    commit(project, "kept by DVC")
    assert plan.begin(project, of(), "run").base == {}


@pytest.mark.parametrize(
    ("space", "said"),
    [
        ({"run.concurrency": [1, 2]}, "space.run.concurrency: changes where and how"),
        ({"azure.cluster": ["a", "b"]}, "space.azure.cluster: changes where and how"),
        ({"quantize.bits": [4, 8, 5]}, "quantize.bits"),
        ({"quantize.bit": [4, 8]}, "quantize.bit"),
        ({"finetune.learning_rate": {"low": 0.5, "high": 1.5, "step": 0.5}}, "learning_rate"),
    ],
)
def test_a_value_that_params_yaml_cannot_have_is_refused(
    project: Path, space: dict[str, Any], said: str
) -> None:
    before = (project / "params.yaml").read_bytes()
    refused(project, said, space=space)
    assert (project / "params.yaml").read_bytes() == before


@pytest.mark.parametrize(
    "changes", [{"objectives": {"trvel.a": "minimize"}}, {"limits": ["trvel.a.b <= 1"]}]
)
def test_a_figure_of_an_adapter_that_is_not_there_is_refused(
    project: Path, changes: dict[str, Any]
) -> None:
    refused(project, "params.yaml has no adapter trvel$", **changes)


@pytest.mark.parametrize("own", [{}, {"gpu": True, "memory_gb": 3.5}, {"gpu": False}])
def test_needs_are_estimated_but_for_what_the_file_says(project: Path, own: dict[str, Any]) -> None:
    begun = plan.begin(project, of(needs=own), "run")
    found = plan.needs(project, begun, {"export.device": "gpu", "export.provider": "cuda"})
    assert found.gpus == own.get("gpu", True) and found.disk_gb > 0
    assert found.memory_gb == own.get("memory_gb", found.memory_gb) > 0


def sent(project: Path, bits: int, score: float, honest: bool = True) -> dict[str, Any]:
    """What a candidate sends; its lock names other bytes than the metric's if it is not honest."""
    text = json.dumps({"score": score})
    data = text.encode() if honest else b"other"
    out = {"path": "metrics/travel.json", "hash": "md5", "size": len(data)}
    entry = {"cmd": "x", "outs": [out | {"md5": md5(data).hexdigest()}]}
    lock = {"schema": "2.0", "stages": {"evaluate@travel": entry}}
    params = (project / "params.yaml").read_text().replace("bits: 4", f"bits: {bits}")
    files = {"metrics/travel.json": text}
    return {"params": params, "lock": yaml.safe_dump(lock), "metrics": files}


def shown(project: Path) -> dict[str, Any]:
    """Experiments of `dvc exp show`: bits and score by name."""
    said = json.loads(sh("dvc", "exp", "show", "--json", cwd=project).stdout)
    found = {}
    for row in next(one for one in said if one["rev"] != "workspace")["experiments"] or []:
        data = row["revs"][0]["data"]
        params = next(iter(data["params"].values()))["data"]
        metrics = data["metrics"].get("metrics/travel.json", {}).get("data", {})
        found[row["revs"][0]["name"]] = params["quantize"]["bits"], metrics.get("score")
    return found


def test_experiments_are_listed_with_their_metrics_and_replaced(project: Path) -> None:
    at = sh("git", "rev-parse", "HEAD", cwd=project).stdout.strip()
    for name, bits, score in (("one", 4, 0.25), ("two", 4, 0.5), ("two", 8, 0.75)):
        experiments.save(project, at, name, sent(project, bits, score))
    assert shown(project) == {"one": (4, 0.25), "two": (8, 0.75)}
    made = experiments.files(project, at, "two")
    assert {"params.yaml": sent(project, 8, 0.75)["params"]} | made == made
    assert made["dvc.lock"] == sent(project, 8, 0.75)["lock"]
    assert experiments.files(project, at, None) == {}
    assert not sh("git", "status", "--porcelain", cwd=project).stdout
    with pytest.raises(UserError, match="git show"):
        experiments.files(project, at, "three")


def test_a_metric_that_is_not_the_locks_is_kept_out_of_the_cache(project: Path) -> None:
    at = sh("git", "rev-parse", "HEAD", cwd=project).stdout.strip()
    experiments.save(project, at, "one", sent(project, 8, 0.75, honest=False))
    assert not [path for path in cache_of(project).rglob("*") if path.is_file()]
    experiments.save(project, at, "one", sent(project, 8, 0.75))
    kept = [path for path in cache_of(project).rglob("*") if path.is_file()]
    assert [path.read_text() for path in kept] == ['{"score": 0.75}']
