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
from forked import fork_stage
from packaging.requirements import Requirement
from tiny import REPO, assert_refused, make_project, questions, run_stage, write_rows

from stages import card
from stages.errors import UserError
from stages.evaluate import speed
from stages.generation import Session
from stages.stage import versions

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


def lock(elsewhere: Path) -> dict:
    """dvc.lock as DVC would have left it, with a stage of an adapter that is gone.

    The base model and the data of `other` are outside the project, in `elsewhere`.
    """
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
    fetch = {
        "cmd": "python -m stages.fetch",
        "deps": [{"path": str(elsewhere / "tiny"), "hash": "md5", "md5": "56" * 16 + ".dir"}],
        "params": {"params.yaml": {"base.path": str(elsewhere / "tiny")}},
        "outs": [{"path": "models/base", "hash": "md5", "md5": "78" * 16 + ".dir"}],
    }
    other = prepare | {
        "deps": [{"path": str(elsewhere / "other.jsonl"), "hash": "md5", "md5": "9a" * 16}],
        "params": {"params.yaml": {"adapters.other": {"data": str(elsewhere / "other.jsonl")}}},
    }
    stages |= {"fetch": fetch, "prepare@other": other}
    return {"schema": "2.0", "stages": stages}


@pytest.fixture(scope="module")
def project(tmp_path_factory) -> Path:
    """Everything that comes before package."""
    from stages.export import export
    from stages.params import load

    project = make_project(tmp_path_factory.mktemp("package"))
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    data = {"travel": Path("data/travel.jsonl"), "other": elsewhere / "other.jsonl"}
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    values["base"]["path"] = str(elsewhere / "tiny")
    values["adapters"] = {name: {"data": str(path)} for name, path in data.items()}
    values["gates"] = dict.fromkeys(values["gates"])
    values["evaluate"] |= {"max_rows": 8, "max_new_tokens": 8, "speed_tokens": 8}
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    shutil.copy(REPO / "requirements.lock", project)
    (project / "models/base/LICENSE").write_text("MIT\n")
    shutil.copytree(project / "models/base", project / "models/quantized")
    assert fork_stage(project, "measure").returncode == 0
    params = load(project / "params.yaml")
    export(
        project / "models/quantized",
        project / "models/onnx",
        params.export,
        ["qkv_proj", "down_proj"],
    )
    for seed, name in enumerate(ADAPTERS):
        write_rows(project / data[name], questions(40))
        add_adapter(project, name, seed)
        assert run_stage(project, "prepare", "--adapter", name).returncode == 0
        done = fork_stage(project, "evaluate", "--adapter", name)
        assert done.returncode == 0, done.stderr
    (project / "dvc.lock").write_text(yaml.safe_dump(lock(elsewhere)), "utf-8")
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
    text = metrics["text_perplexity"]
    assert text["base"] == text["quantized"] == pytest.approx(text["onnx_off"], rel=1e-3)
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


def test_evaluate_takes_over_what_measure_found_and_leaves_its_gate_to_it(project, tmp_path):
    copy = Path(shutil.copytree(project, tmp_path / "project"))
    values = yaml.safe_load((copy / "params.yaml").read_text("utf-8"))
    values["gates"]["max_quantized_perplexity_ratio"] = 1.05
    values["evaluate"] |= {"max_rows": 4, "max_new_tokens": 4}
    (copy / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    found = {
        "text_perplexity": {"base": 1.25, "quantized": None},
        "size_mb": {"base": 400.0, "quantized": 100.0},
    }
    (copy / "metrics/quantized/text.json").write_text(json.dumps(found))
    done = fork_stage(copy, "evaluate", "--adapter", "travel")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((copy / "metrics/travel.json").read_text("utf-8"))
    before = json.loads((project / "metrics/travel.json").read_text("utf-8"))
    assert list(metrics) == list(before)
    for part, more in (("text_perplexity", ["onnx_off"]), ("size_mb", ["onnx", "adapter"])):
        assert metrics[part] == found[part] | {name: before[part][name] for name in more}


def test_failed_gate_leaves_the_figures(project):
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    strict = values | {"gates": values["gates"] | {"min_exact_answer_rate": 1.0}}
    (project / "params.yaml").write_text(yaml.safe_dump(strict), "utf-8")
    (project / "metrics/travel.json").rename(project / "metrics/before")
    done = fork_stage(project, "evaluate", "--adapter", "travel")
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


def test_foundry_local_finds_name_and_prompt(package):
    found = json.loads((package / "inference_model.json").read_text("utf-8"))
    assert found["Name"] == "tiny-olivepress-cpu"
    prompt = found["PromptTemplate"]["prompt"]
    assert prompt.replace("{Content}", "Hi") == Session(package).render("Hi")
    materials = json.loads((package / "bom.cdx.json").read_text("utf-8"))
    assert "inference_model.json" in [one["name"] for one in materials["components"]]


def test_lineage_has_what_dvc_knows_and_what_the_stages_recorded(package):
    lineage = json.loads((package / "lineage.json").read_text("utf-8"))
    assert sorted(lineage) == ["fetch", "package", "prepare@other", "prepare@travel", "quantize"]
    prepare = lineage["prepare@travel"]
    assert prepare["deps"] == {"data/travel.jsonl": f"md5:{'12' * 16}"}
    assert prepare["params"] == {"prepare.eval_percent": 10}
    assert prepare["record"]["stage"] == "prepare@travel"
    assert lineage["package"]["record"]["versions"]["onnxruntime"]


def test_no_folder_of_the_user_is_in_the_package(project, package):
    base = yaml.safe_load((project / "params.yaml").read_text("utf-8"))["base"]
    elsewhere = str(Path(base["path"]).parent)
    for path in package.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert elsewhere.encode() not in content, path.name
            assert str(project).encode() not in content, path.name
    manifest = json.loads((package / "olivepress.json").read_text("utf-8"))
    assert manifest["base"]["id"] == "tiny"
    assert manifest["base"]["content"] == f"md5:{'78' * 16}.dir"
    lineage = json.loads((package / "lineage.json").read_text("utf-8"))
    assert lineage["fetch"]["deps"] == {"tiny": f"md5:{'56' * 16}.dir"}
    assert lineage["fetch"]["params"] == {"base.path": "tiny"}
    assert lineage["prepare@other"]["params"] == {"adapters.other": {"data": "other.jsonl"}}
    assert f"`other.jsonl` (md5:{'9a' * 16})" in (package / "README.md").read_text("utf-8")


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


def test_a_model_that_asks_for_sampling_is_timed_without(package, tmp_path):
    """Each try then takes the same tokens; drawn at this temperature they would differ."""

    class Watched(Session):
        def _generator(self, *args, **options):
            generators.append(super()._generator(*args, **options))
            return generators[-1]

    generators: list = []
    shutil.copytree(package, tmp_path / "package")
    path = tmp_path / "package/genai_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["search"] |= {"do_sample": True, "temperature": 50.0, "top_k": 0, "top_p": 1.0}
    path.write_text(json.dumps(config), "utf-8")
    Watched(tmp_path / "package").speed("Hi", None, 12)
    taken = {tuple(generator.get_sequence(0)) for generator in generators}
    assert len(generators) == 4 and len(taken) == 1


def test_any_prompt_is_timed(project, monkeypatch):
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    figures = speed("-h a\0b\r\n\u2028", Path("models/adapters/travel.onnx_adapter"), 2)
    assert figures["adapter_on"]["tokens_per_second"] > 0


def test_a_prompt_too_long_to_time_is_a_message(project, monkeypatch):
    """Longer than a command's argument may be, which is 128 KiB."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    with pytest.raises(UserError, match=r"does not run: the prompt has 150000 tokens and"):
        speed("a" * 150_000, Path("models/adapters/travel.onnx_adapter"), 2)


def test_a_model_for_another_machine_is_packaged_untried(project, tmp_path, monkeypatch, capsys):
    from stages import convert, evaluate, export, package
    from stages.params import load

    copy = Path(shutil.copytree(project, tmp_path / "project"))
    monkeypatch.chdir(copy)
    monkeypatch.setenv("PYTHONPATH", str(REPO))
    values = yaml.safe_load(Path("params.yaml").read_text("utf-8"))
    values["export"] |= {"device": "gpu", "provider": "dml"}
    values["adapters"] = {"travel": values["adapters"]["travel"]}
    Path("params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    params = load()
    shutil.rmtree("models/onnx")
    targets = ["qkv_proj", "down_proj"]
    export.export(Path("models/quantized"), Path("models/onnx"), params.export, targets)
    convert.main(params, "travel")

    evaluate.main(params, "travel")
    metrics = json.loads(Path("metrics/travel.json").read_text("utf-8"))
    assert metrics["not_measured"].startswith("models/onnx is for dml, and does not load on this")
    assert metrics["onnx_on"] is metrics["onnx_off"] is metrics["agreement"] is None
    assert metrics["speed"] is None
    assert metrics["quantized_lora"]["perplexity"] > 1
    assert Path("plots/perplexity/travel.csv").read_text().count("\n") == 4

    package.main(params)
    assert "not tried: models/package is for dml" in capsys.readouterr().out
    card = Path("models/package/README.md").read_text("utf-8")
    assert "| **this package, adapter on** | not measured | not measured |" in card
    assert "The ONNX model was not run where it was made" in card
    assert "pip install onnxruntime-genai-directml==" in card


def test_a_card_names_the_onnxruntime_that_genai_for_cuda_goes_with() -> None:
    """pip would take the newest, built for another CUDA."""
    made = importlib.metadata.version("onnxruntime-genai")
    assert made == "0.14.1"  # with which the other was tried on a GPU; for the next, try again
    lineage = {"package": {"record": {"versions": {"onnxruntime-genai": made}}}}
    assert card.genai("cpu", lineage) == "onnxruntime-genai==0.14.1"
    found = card.genai("cuda", lineage)
    assert found == "onnxruntime-genai-cuda==0.14.1 onnxruntime-gpu==1.26.0"


@pytest.mark.parametrize(
    ("gpu", "plain"),
    [
        ("onnxruntime-genai-cuda", "onnxruntime-genai"),
        ("onnxruntime-genai-directml", "onnxruntime-genai"),
        ("onnxruntime-gpu", "onnxruntime"),
    ],
)
def test_editions_for_a_gpu_are_taken(monkeypatch, gpu, plain):
    real = importlib.metadata.version

    def version(name: str) -> str:
        if name == plain:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3" if name == gpu else real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    found = versions()
    assert found[gpu] == "1.2.3" and plain not in found
    monkeypatch.setattr(importlib.metadata, "version", lambda n: version(n if n != gpu else plain))
    with pytest.raises(UserError, match=rf"{plain} or .*{gpu}.* is not installed; run make"):
        versions()


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
