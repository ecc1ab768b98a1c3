"""Evaluate and package on a tiny model with two random adapters, and the package elsewhere."""

from __future__ import annotations

import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from tiny import assert_refused, make_project, questions, run_stage, write_rows

from stages.errors import UserError
from stages.generation import Session

ADAPTERS = ["travel", "other"]


def add_adapter(project: Path, name: str, seed: int) -> None:
    """A random LoRA over models/quantized, converted for models/onnx."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    from stages.convert import convert

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(project / "models/quantized", dtype=torch.float32)
    config = LoraConfig(
        r=4, lora_alpha=8, target_modules=["qkv_proj", "down_proj"], init_lora_weights=False
    )
    folder = project / "models/adapters" / name
    get_peft_model(model, config).save_pretrained(str(folder))
    convert(folder, project / "models/onnx", folder.with_name(f"{name}.onnx_adapter"))


def lock(project: Path) -> dict:
    """dvc.lock as DVC would have left it, with a stage of an adapter that is gone."""
    prepare = {
        "cmd": "python -m stages.prepare --adapter travel",
        "deps": [{"path": "data/travel.jsonl", "hash": "md5", "md5": "12" * 16, "size": 5}],
        "params": {"params.yaml": {"prepare.eval_percent": 10}},
        "outs": [{"path": "data/prepared/travel", "hash": "md5", "md5": "34" * 16 + ".dir"}],
    }
    quantize = {
        "cmd": "python -m stages.quantize",
        "params": {"params.yaml": {"quantize.algorithm": "awq", "quantize.bits": 4}},
    }
    stages = {"prepare@travel": prepare, "prepare@gone": prepare, "quantize": quantize}
    return {"schema": "2.0", "stages": stages}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Everything that comes before evaluate."""
    from stages.export import export
    from stages.params import load

    project = make_project(tmp_path_factory.mktemp("package"))
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    values["adapters"] = {name: {"data": f"data/{name}.jsonl"} for name in ADAPTERS}
    values["gates"] = dict.fromkeys(values["gates"])
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    (project / "models/base/LICENSE").write_text("MIT\n")
    shutil.copytree(project / "models/base", project / "models/quantized")
    params = load(project / "params.yaml")
    export(
        project / "models/quantized",
        project / "models/onnx",
        params.export,
        ["qkv_proj", "down_proj"],
    )
    for seed, name in enumerate(ADAPTERS):
        write_rows(project / f"data/{name}.jsonl", questions(40))
        add_adapter(project, name, seed)
        assert run_stage(project, "prepare", "--adapter", name).returncode == 0
        done = run_stage(project, "evaluate", "--adapter", name)
        assert done.returncode == 0, done.stderr
    (project / "dvc.lock").write_text(yaml.safe_dump(lock(project)), "utf-8")
    return project


@pytest.fixture(scope="module")
def package(project: Path) -> Path:
    done = run_stage(project, "package")
    assert done.returncode == 0, done.stderr
    return project / "models/package"


def test_evaluate_agrees_with_itself(project):
    """A float model, so that PyTorch and ONNX differ by rounding alone."""
    metrics = json.loads((project / "metrics/travel.json").read_text("utf-8"))
    assert metrics["agreement"]["top1"] == 1.0
    assert metrics["agreement"]["mean_kl"] < 1e-4
    assert metrics["agreement"]["tokenizer"] == 1.0
    assert metrics["base"] == metrics["quantized"]
    assert metrics["onnx_off"]["perplexity"] == pytest.approx(
        metrics["quantized"]["perplexity"], rel=1e-3
    )
    assert metrics["onnx_on"]["perplexity"] == pytest.approx(
        metrics["quantized_lora"]["perplexity"], rel=1e-3
    )
    assert metrics["onnx_on"]["perplexity"] != metrics["onnx_off"]["perplexity"]
    plot = (project / "plots/perplexity/travel.csv").read_text("utf-8").splitlines()
    assert plot[0] == "model,perplexity"
    assert len(plot) == 6


def test_failed_gate_leaves_the_figures(project):
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    strict = values | {"gates": {"min_exact_answer_rate": 1.0}}
    (project / "params.yaml").write_text(yaml.safe_dump(strict), "utf-8")
    (project / "metrics/travel.json").rename(project / "metrics/before")
    done = run_stage(project, "evaluate", "--adapter", "travel")
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    assert_refused(project, done, "gates.min_exact_answer_rate: 0.0000, and at least 1.0")
    (project / "metrics/before").unlink()
    assert (project / "metrics/travel.json").exists()


def test_sums_cover_every_file(package):
    subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=package, check=True)
    lines = (package / "SHA256SUMS").read_text().splitlines()
    names = [line[66:] for line in lines]
    files = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()}
    assert names == sorted(files - {"SHA256SUMS"})
    assert {"LICENSE", "genai_config.json", "adapters/other.onnx_adapter"} <= set(names)
    assert not any(path.is_symlink() for path in package.rglob("*"))


def test_lineage_has_what_dvc_knows_and_what_the_stages_recorded(package):
    lineage = json.loads((package / "lineage.json").read_text("utf-8"))
    assert sorted(lineage) == ["package", "prepare@travel", "quantize"]
    prepare = lineage["prepare@travel"]
    assert prepare["deps"] == {"data/travel.jsonl": f"md5:{'12' * 16}"}
    assert prepare["params"] == {"prepare.eval_percent": 10}
    assert prepare["record"]["stage"] == "prepare@travel"
    assert lineage["package"]["record"]["versions"]["onnxruntime"]


def test_card_is_what_the_hub_reads(package):
    _, front, body = (package / "README.md").read_text("utf-8").split("---\n", 2)
    assert yaml.safe_load(front) == {
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime-genai", "olive", "lora", "awq", "int4"],
    }
    for table in re.findall(r"(?:^\|.*\n)+", body, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    assert f"md5:{'12' * 16}" in body


def test_adapters_change_the_answer_and_can_be_switched_off(package):
    session = Session(package)
    assert session.adapters == sorted(ADAPTERS)
    ids = session.encode(session.render("How far is it?"))
    off, travel, other, again = (
        session.logits(ids, name).tolist() for name in (None, "travel", "other", None)
    )
    assert off == again
    assert off != travel != other != off
    answers = {name: "".join(session.stream("Hi", name, 8)) for name in ADAPTERS}
    assert answers["travel"] != answers["other"]
    drawn = ["".join(session.stream("Hi", None, 8, temperature=5.0, seed=s)) for s in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]


def test_session_says_what_it_cannot_do(package, tmp_path):
    session = Session(package)
    with pytest.raises(UserError, match="no adapter nope; it has other, travel"):
        next(session.stream("Hi", "nope"))
    with pytest.raises(UserError, match="the model takes 256"):
        next(session.stream("a" * 300))
    with pytest.raises(UserError, match="expected a model"):
        Session(tmp_path)
    with pytest.raises(UserError, match=r"x\.onnx_adapter: cannot be loaded"):
        Session(package, {"x": tmp_path / "x.onnx_adapter"})


def test_runs_where_only_genai_is_installed(package, tmp_path):
    """The card's own code, in an environment with onnxruntime-genai and what it requires."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    site = next((tmp_path / "bare").glob("lib/python*/site-packages"))
    for name in requirements("onnxruntime-genai"):
        for file in importlib.metadata.files(name) or []:
            top = file.parts[0]
            if top != ".." and not (site / top).exists():
                (site / top).symlink_to(str(file.locate())[: -len(str(file))] + top)
    code = re.search(r"```python\n(.*?)```", (package / "README.md").read_text("utf-8"), re.DOTALL)
    assert code is not None
    done = subprocess.run(
        [tmp_path / "bare/bin/python", "-I", "-c", code[1] + "import sys; print(*sys.modules)"],
        cwd=package,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    modules = done.stdout.splitlines()[-1].split()
    assert "onnxruntime_genai" in modules
    assert not {"torch", "transformers", "stages"} & set(modules)


def requirements(name: str) -> set[str]:
    """A distribution and all that it requires, extras aside."""
    found, todo = set(), [name]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            needs = map(Requirement, importlib.metadata.requires(name) or [])
            todo += [n.name for n in needs if n.marker is None or n.marker.evaluate()]
    return found


def test_package_needs_a_lock_and_leaves_the_old_one(project, package):
    (project / "dvc.lock").rename(project / "kept")
    done = run_stage(project, "package")
    (project / "kept").rename(project / "dvc.lock")
    assert_refused(project, done, "dvc.lock is missing")
    assert (package / "SHA256SUMS").exists()
