"""What measure finds of a quantized model, its gate, and its place in the pipeline."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import yaml
from forked import fork_stage
from tiny import assert_refused, make_project

from conftest import REPO, init_project
from stages.gates import OF_EVALUATE, OF_MEASURE
from stages.params import Gates
from tasks import bridge, overrides

FIGURES = "metrics/quantized/text.json"
GATE = "gates.max_quantized_perplexity_ratio"


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, quantized and measured without a gate."""
    folder = make_project(
        tmp_path_factory.mktemp("measure"),
        **{"quantize.algorithm": "rtn", GATE: None, "evaluate.text_tokens": 300},
    )
    for stage in ("quantize", "measure"):
        done = fork_stage(folder, stage)
        assert done.returncode == 0, done.stderr
    return folder


def figures(project: Path) -> dict[str, dict[str, float]]:
    return json.loads((project / FIGURES).read_text())


def test_it_is_the_perplexity_of_the_cross_entropy_under_an_adapter_that_is_off(
    project: Path, tmp_path: Path
) -> None:
    """To the last digit what comes out where an adapter is loaded and switched off again."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from passes.lora import load_adapted
    from stages.rows import read_halves
    from stages.scoring import excerpts, score, torch_logits

    base = AutoModelForCausalLM.from_pretrained(project / "models/base", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(project / "models/base")
    texts = read_halves(project / "data/everyday.jsonl", tokenizer)
    examples = excerpts(tokenizer, texts, 300, 256)  # the tiny model takes 256 tokens
    found = figures(project)["text_perplexity"]
    assert found["base"] == score(examples, torch_logits(base.eval(), examples))["perplexity"]

    losses, tokens = 0.0, 0
    for example in examples:
        labels = torch.tensor([[-100] * example.start + example.ids[example.start :]])
        with torch.inference_mode():
            loss = base(input_ids=torch.tensor([example.ids]), labels=labels).loss
        losses += float(loss) * len(example.targets)
        tokens += len(example.targets)
    assert tokens == 299  # of 300: the last that is left could not follow another
    assert found["base"] == pytest.approx(torch.tensor(losses / tokens).exp().item(), rel=1e-4)

    config = LoraConfig(r=4, target_modules=["qkv_proj"], init_lora_weights=False)
    get_peft_model(base, config).save_pretrained(str(tmp_path))
    adapted = load_adapted(project / "models/quantized", tmp_path)
    on = score(examples, torch_logits(adapted, examples))["perplexity"]
    with adapted.disable_adapter():
        off = score(examples, torch_logits(adapted, examples))["perplexity"]
    assert found["quantized"] == off != on
    assert found["quantized"] != found["base"]


def test_sizes_are_of_whole_folders(project: Path) -> None:
    for name, size in figures(project)["size_mb"].items():
        files = [p for p in (project / "models" / name).rglob("*") if p.is_file()]
        assert size == pytest.approx(sum(p.stat().st_size for p in files) / 1e6, abs=1e-3)


def test_a_gate_that_is_not_met_names_figure_limit_and_stage(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "project"))
    found = figures(copy)["text_perplexity"]
    for folder in ("metrics", "models/lineage"):
        shutil.rmtree(copy / folder)
    limit = round(found["quantized"] / found["base"], 4) - 0.01
    overrides.apply(copy, {GATE: limit})
    done = fork_stage(copy, "measure")
    shown = f"measure: {GATE}: {found['quantized'] / found['base']:.4f}, and at most {limit} is"
    assert_refused(copy, done, shown, "wanted; look at quantize")
    assert done.stderr.count("gates.") == 1
    assert figures(copy) == figures(project)
    assert not (copy / "models/lineage/measure.json").exists()

    overrides.apply(copy, {GATE: limit + 0.02})
    assert fork_stage(copy, "measure").returncode == 0
    assert json.loads((copy / "models/lineage/measure.json").read_text())["stage"] == "measure"


def test_no_finite_number_is_null_and_meets_no_gate(project: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    copy = Path(shutil.copytree(project, tmp_path / "project"))
    path = copy / "models/quantized/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"] * float("nan")
    save_file(weights, path, {"format": "pt"})
    overrides.apply(copy, {GATE: 1.05})
    assert_refused(copy, fork_stage(copy, "measure"), f"{GATE}: no finite number, and at most 1.05")
    assert figures(copy)["text_perplexity"]["quantized"] is None


def test_a_text_without_two_tokens_is_named(project: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(project, tmp_path / "project"))
    (copy / "data/everyday.jsonl").write_text('{"text": "a"}\n')
    message = "data/everyday.jsonl: no text of two tokens or more; see evaluate.text"
    assert_refused(copy, fork_stage(copy, "measure"), message)


def test_once_for_all_adapters_and_nothing_is_taught_later_for_it(tmp_path: Path) -> None:
    folder = init_project(tmp_path / "project")
    shutil.copy(REPO / "dvc.yaml", folder)
    overrides.apply(folder, {"adapters.food.data": "data/food.jsonl"})
    graph = bridge.graph(folder)
    order = list(graph)
    assert [name for name in graph if name.startswith("measure")] == ["measure"]
    assert graph["measure"] == {"quantize"}
    for adapter in ("travel", "food"):
        assert "measure" in graph[f"evaluate@{adapter}"]
        assert "measure" not in graph[f"finetune@{adapter}"]
        assert order.index("measure") < order.index(f"finetune@{adapter}")


def test_each_gate_is_checked_by_the_stage_that_has_it_among_its_parameters() -> None:
    stages = yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]
    named = {
        name: [key for key in entry.get("do", entry).get("params", []) if key.startswith("gates")]
        for name, entry in stages.items()
    }
    assert {name: keys for name, keys in named.items() if keys} == {
        "measure": [f"gates.{gate}" for gate in OF_MEASURE],
        "evaluate": [f"gates.{gate}" for gate in OF_EVALUATE],
    }
    assert {*OF_MEASURE, *OF_EVALUATE} == set(Gates.model_fields)
