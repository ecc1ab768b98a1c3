"""params.yaml: every mistake is named by its key, and changes by key keep the file as it was."""

from __future__ import annotations

import ast
import copy
from pathlib import Path
from typing import Any, cast

import pytest
import yaml
from pydantic import BaseModel

from conftest import REPO
from stages import params
from stages.errors import UserError
from tasks import bridge, overrides

GOOD: dict[str, Any] = yaml.safe_load((REPO / "params.yaml").read_text())


def with_(key: str, value: Any) -> dict[str, Any]:
    values = copy.deepcopy(GOOD)
    *parents, last = key.split(".")
    section = values
    for parent in parents:
        section = section.setdefault(parent, {})
    section[last] = value
    return values


def test_the_file_in_the_project_is_valid() -> None:
    assert params.load(REPO / "params.yaml").quantize.algorithm == "awq"


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("quantize.bitz", 4, r"quantize\.bitz: unknown parameter; did you mean quantize\.bits\?"),
        ("quantise", {}, r"quantise: unknown parameter; did you mean quantize\?"),
        ("adapters.travel.promt_column", "q", r"did you mean adapters\.NAME\.prompt_column\?"),
        ("quantize.bits", "4", r"quantize\.bits: must be 4 or 8, not '4'"),
        ("quantize.bits", 3, r"quantize\.bits: must be 4 or 8, not 3"),
        ("quantize.group_size", 48, r"quantize\.group_size: must be one of 16, 32, 64, 128"),
        ("quantize.symmetric", "yes", r"quantize\.symmetric: must be a valid boolean"),
        ("quantize.algorithm", "best!", r"quantize\.algorithm: must be 'best', 'awq', 'gptq'"),
        ("finetune.learning_rate", 5, r"finetune\.learning_rate: must be less than or equal to 1"),
        ("finetune.r", 0, r"finetune\.r: must be greater than or equal to 1, not 0"),
        ("finetune.target_modules", [], r"finetune\.target_modules"),
        ("adapters", {}, r"adapters"),
        ("adapters.a/b", {"data": "x"}, r"'a/b' cannot name an adapter"),
        ("adapters.", {"data": "x"}, r"'' cannot name an adapter"),
        ("adapters.none", {"data": "x"}, r"'none' cannot name an adapter"),
        ("adapters.-x", {"data": "x"}, r"'-x' cannot name an adapter: .* not beginning with -"),
        ("adapters." + "x" * 65, {"data": "x"}, r"cannot name an adapter"),
        ("adapters.x$(rm)", {"data": "x"}, r"cannot name an adapter"),
        ("adapters.food", {}, r"adapters\.food\.data: missing"),
        ("base.source", "s3", r"base\.source: must be 'builtin', 'hf', 'local' or 'azureml'"),
        ("export.provider", "cuda", r"export\.provider cuda cannot run on export\.device cpu"),
        ("prepare.template", "Q: {prompt}", r"prepare\.template: must be `chat` or hold"),
        ("prepare.template", "{response} {prompt}", r"must hold \{prompt\} before \{response\}"),
        ("gates.min_top1_agreement", 2, r"gates\.min_top1_agreement: must be less than"),
        ("gates.max_quantized_perplexity_ratio", float("inf"), r"must be a finite number"),
        ("gates.min_top1_agreement", float("nan"), r"gates\.min_top1_agreement: must be a finite"),
        ("gates.min_tokenizer_agreement", 1.5, r"gates\.min_tokenizer_agreement: must be less"),
        ("finetune.alpha", float("inf"), r"finetune\.alpha: must be a finite number"),
        ("finetune.warmup_steps", 300, r"warmup_steps 300 must be less than .*max_steps 300"),
        ("run.concurrency", 0, r"run\.concurrency"),
        ("run.retries", -1, r"run\.retries: must be greater than or equal to 0"),
        ("run.time_limit_minutes", float("inf"), r"run\.time_limit_minutes: must be a finite"),
        ("run.time_limit_minutes", 0, r"run\.time_limit_minutes: must be greater than 0"),
        ("run.time_limits.export", float("inf"), r"run\.time_limits\.export: must be a finite"),
        ("run.time_limits.export", -5, r"run\.time_limits\.export: must be greater than 0"),
        ("base.trust_remote_code", True, r"base\.trust_remote_code: unknown parameter"),
    ],
)
def test_mistakes(key: str, value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        params.check(with_(key, value))


@pytest.mark.parametrize("revision", ["main", "v1.0", "2FE19245", None, "g" * 40])
def test_hub_models_are_pinned_to_a_commit(revision: str | None) -> None:
    values = with_("base.revision", revision)
    values["base"]["source"] = "hf"
    with pytest.raises(UserError, match="40 hex digits"):
        params.check(values)


def test_all_mistakes_are_told_at_once() -> None:
    values = with_("quantize.bits", 3)
    del values["finetune"]["r"]
    with pytest.raises(UserError) as caught:
        params.check(values)
    assert str(caught.value).count("\n") == 1
    assert "finetune.r: missing" in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"base: \xff", "not UTF-8 at byte 6"),
        (b"base: [", "not valid YAML"),
        (b"- 1\n", "expected a mapping"),
        (b"", "expected a mapping"),
    ],
)
def test_unreadable_files(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        params.load(path)


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="not found"):
        params.load(tmp_path / "params.yaml")


def test_every_parameter_a_stage_reads_exists(monkeypatch: pytest.MonkeyPatch) -> None:
    """A key that dvc.yaml names and params.yaml lacks would stop the run."""
    monkeypatch.chdir(REPO)
    text = (REPO / "dvc.yaml").read_text()
    assert bridge.graph(REPO)
    known = set(params.known_keys())
    named = {
        word.strip('"[],- ')
        for line in text.splitlines()
        for word in line.replace("params:", " ").split()
        if word.strip('"[],- ').startswith(tuple(f"{s}." for s in GOOD if s != "adapters"))
    }
    assert named and named <= known


def sections() -> list[tuple[str, type[BaseModel]]]:
    """(section, its model) for each block of params.yaml but `compute`, whose keys are stages."""
    fields = [(n, f) for n, f in params.Params.model_fields.items() if n != "compute"]
    return [(n, params.Adapter if n == "adapters" else cast(Any, f.annotation)) for n, f in fields]


def test_defaults_that_shape_outputs_are_in_the_cache_key() -> None:
    """DVC sees what params.yaml says; what it leaves out must be seen through the code."""
    listed = yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]
    stages = {name: entry.get("do", entry) for name, entry in listed.items()}
    found = set()
    for section, model in sections():
        omitted = [key for key, field in model.model_fields.items() if not field.is_required()]
        if section in ("run", "azure") or not omitted:
            continue  # these say how and where, not what
        readers = {
            name
            for name, stage in stages.items()
            if name not in ("package", "toolchain")  # they take the adapters' names alone
            and any(key.split(".")[0] == section for key in stage.get("params", []))
        }
        assert readers, section
        for name in readers:
            assert "stages/params.py" in stages[name]["deps"], (section, omitted, name)
        found.add(section)
    assert found == {"adapters"}


def imported(path: Path) -> set[str]:
    """The project's files that a file names in imports, or in text as a module to import."""
    names: set[str] = set()
    tree = ast.parse(path.read_text())
    for node in tree.body:
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []  # imported for its types alone: never when a stage runs
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names.add(node.value)
    files = {name.replace(".", "/") + ".py" for name in names if name.count(".") == 1}
    return {file for file in files if file.startswith(("stages/", "passes/"))}


def test_a_stage_depends_on_the_code_that_shapes_its_outputs() -> None:
    # The start, names and records of stages, messages, what refuses and changes nothing, a look at
    # the free space, and transport.
    names = ("stage", "errors", "params", "reading", "fetch", "azure", "blobs", "redact")
    shapes_nothing = {f"stages/{name}.py" for name in names}
    listed = yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]
    for name, entry in listed.items():
        todo, used = [f"stages/{name}.py"], set()
        while todo:
            file = todo.pop()
            if file not in used and (REPO / file).exists():
                used.add(file)
                todo += imported(REPO / file) - shapes_nothing
        assert used <= set(entry.get("do", entry)["deps"]), name


def test_overrides_keep_comments_and_order(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    before = (REPO / "params.yaml").read_text()
    path.write_text(before)
    assert overrides.apply(tmp_path, {"quantize.bits": 8}) == ["quantize.bits 4 → 8"]
    assert path.read_text() == before.replace("bits: 4", "bits: 8")


def test_an_override_that_changes_nothing_writes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((REPO / "params.yaml").read_text())
    stamp = path.stat().st_mtime_ns
    assert overrides.apply(tmp_path, {"quantize.bits": 4}) == []
    assert path.stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "bad", [{"quantize.bitz": 8}, {"quantize": 3}, {"a.b.c": 1}, {"quantize.bits.x": 1}]
)
def test_a_bad_override_leaves_the_file_alone(tmp_path: Path, bad: dict[str, Any]) -> None:
    path = tmp_path / "params.yaml"
    path.write_text((REPO / "params.yaml").read_text())
    with pytest.raises(UserError):
        overrides.apply(tmp_path, bad)
    assert path.read_text() == (REPO / "params.yaml").read_text()


def test_an_adapter_can_be_added_by_an_override(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_text((REPO / "params.yaml").read_text())
    overrides.apply(tmp_path, {"adapters.food.data": "data/food.jsonl"})
    assert list(params.load(tmp_path / "params.yaml").adapters) == ["travel", "food"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("quantize.bits=8", 8),
        ("finetune.learning_rate=1e-3", 0.001),
        ("quantize.symmetric=true", True),
        ("gates.min_top1_agreement=null", None),
        ("finetune.target_modules=[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("base.id=a/b=c", "a/b=c"),
    ],
)
def test_values_on_the_command_line_are_yaml(text: str, value: Any) -> None:
    assert list(overrides.parse([text]).values()) == [value]


@pytest.mark.parametrize("text", ["quantize.bits", "=3", "quantize.bits=[", ""])
def test_bad_assignments(text: str) -> None:
    with pytest.raises(UserError, match="-S"):
        overrides.parse([text])
