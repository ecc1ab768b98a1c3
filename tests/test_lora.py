"""LoRA over quantized linears: the right function, the right loss, the same bytes."""

import json
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from olive.common.quant.nn import QuantLinear
from peft import LoraConfig
from tiny import make_project, small_disk, write_rows
from torch import nn

from passes import lora
from passes.lora import LoraQuantLinear, load_adapted
from stages import export as stage_export
from stages import finetune as stage_finetune
from stages import quantize as stage_quantize
from stages import stage
from stages.errors import UserError
from stages.params import Export, Finetune, Quantize
from tests.models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")

ROWS = [
    {
        "prompt": f"What follows {i}?",
        "response": str(i + 1),
        "text_prompt": f"<|user|>What follows {i}?<|end|><|assistant|>",
        "text_response": f"{i + 1}<|end|>",
    }
    for i in range(24)
]
TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "llama": ["q_proj", "v_proj", "down_proj"],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Holds phi3 and llama, quantized; llama-float; and the rows."""
    folder = tmp_path_factory.mktemp("lora")
    for name in TARGETS:
        base = save_model(folder / f"{name}-float", name)
        quantized = Quantize(
            algorithm="rtn",
            bits=4,
            group_size=32,
            symmetric=False,
            calibration_data="unread.jsonl",
            calibration_samples=1,
            calibration_seq_len=8,
        )
        stage_quantize.quantize(base, Path(), folder / name, quantized)
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return folder


def settings(model: str, **changes) -> Finetune:
    values = {
        "r": 4,
        "alpha": 8.0,
        "dropout": 0.0,
        "target_modules": TARGETS[model.partition("-")[0]],
        "max_steps": 6,
        "learning_rate": 0.01,
        "lr_scheduler": "cosine",
        "warmup_steps": 2,
        "batch_size": 8,
        "max_seq_len": 64,
        "gradient_checkpointing": False,
        "seed": 7,
    }
    return Finetune(**{**values, **changes})


def train(folder: Path, model: str, name: str, **changes) -> tuple[Path, list[list[float]]]:
    out, plot = folder / "adapters" / name, folder / f"{name}.csv"
    rows = folder / "train.jsonl"
    stage_finetune.finetune(folder / model, rows, out, plot, settings(model, **changes))
    lines = plot.read_text().splitlines()
    assert lines[0] == "step,loss,learning_rate"
    return out, [[float(x) for x in line.split(",")] for line in lines[1:]]


def test_layer_is_the_quantized_linear_plus_the_update():
    torch.manual_seed(0)
    base = QuantLinear.from_module(nn.Linear(64, 48), group_size=32, symmetric=False)
    config = LoraConfig(r=4, lora_alpha=8)
    layer = LoraQuantLinear(base, "default", config=config, r=4, lora_alpha=8)
    nn.init.normal_(layer.lora_B["default"].weight)
    x = torch.randn(5, 64, requires_grad=True)
    w = base.unpack_and_dequantize(base.qweight, base.scales, base.qzeros)
    w = w + 2 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    y = layer(x)
    torch.testing.assert_close(y, x @ w.T + base.bias)
    (gradient,) = torch.autograd.grad(y.sum(), x)
    torch.testing.assert_close(gradient, w.sum(0).expand(5, -1))
    packed = layer(x)
    layer.unpack()
    assert torch.equal(layer(x), packed), "unpacking once must not change a bit"


@pytest.mark.parametrize("model", ["phi3", "llama", "llama-float"])
def test_adapter_learns_and_loads(folder, model):
    out, losses = train(folder, model, f"learn-{model}", max_steps=20, learning_rate=0.02)
    assert sorted(p.name for p in out.iterdir()) == sorted(lora.ADAPTER_FILES)
    assert losses[-1][1] < 0.8 * losses[0][1]
    ids = torch.arange(4, 40)[None]
    with torch.inference_mode():
        off, on = (load_adapted(folder / model, a) for a in (None, out))
        assert next(on.parameters()).dtype == torch.float32
        assert not on.training
        assert not torch.allclose(off(input_ids=ids).logits, on(input_ids=ids).logits)
        with on.disable_adapter():
            assert torch.equal(off(input_ids=ids).logits, on(input_ids=ids).logits)


def test_same_seed_gives_same_bytes(folder):
    (one, losses), (two, _) = (
        train(folder, "phi3", name, dropout=0.1) for name in ("first", "second")
    )
    for name in lora.ADAPTER_FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes()
    other, _ = train(folder, "phi3", "other-seed", dropout=0.1, seed=8)
    assert (one / lora.ADAPTER_FILES[1]).read_bytes() != (
        other / lora.ADAPTER_FILES[1]
    ).read_bytes()
    assert [step for step, _, _ in losses] == [1, 2, 3, 4, 5, 6]
    config = (one / "adapter_config.json").read_text()
    assert str(folder) not in config
    assert json.loads(config)["target_modules"] == sorted(TARGETS["phi3"])
    assert json.loads(config)["base_model_name_or_path"] == "models/quantized"


def test_gradient_checkpointing_changes_nothing_but_memory(folder):
    _, plain = train(folder, "phi3", "plain")
    _, checkpointed = train(folder, "phi3", "checkpointed", gradient_checkpointing=True)
    assert [x[1] for x in checkpointed] == pytest.approx([x[1] for x in plain], abs=1e-5)


def test_loss_is_of_the_response_alone(folder):
    model = load_adapted(folder / "phi3", None)
    ids = torch.tensor([[10, 11, 12, 13, 14], [20, 21, 22, 0, 0]])
    mask = (ids > 0).long()
    labels = torch.tensor([[-100, -100, 12, 13, 14], [-100, 21, 22, -100, -100]])
    with torch.no_grad():
        found = lora.response_loss(model, ids, mask, labels)
        losses = []
        for row, wanted in ((ids[:1], [2, 3, 4]), (ids[1:, :3], [1, 2])):
            likely = model(input_ids=row).logits.log_softmax(-1)[0]
            losses += [-likely[i - 1, row[0, i]].item() for i in wanted]
    assert found.item() == pytest.approx(sum(losses) / 5, rel=1e-5)


def test_every_pass_over_the_rows_takes_each_once():
    one = {"attention_mask": torch.tensor([1])}
    rows = [({"input_ids": torch.tensor([i]), **one}, torch.tensor([i])) for i in range(20)]
    seen = [ids.flatten().tolist() for ids, _, _ in lora.batches(rows, 8, 6, seed=0)]
    for epoch in (seen[:3], seen[3:]):
        assert sorted(i for batch in epoch for i in batch) == list(range(20))
    assert seen[:3] != seen[3:]


@pytest.mark.parametrize(
    ("kind", "last"), [("cosine", 0.0381), ("linear", 0.125), ("constant", 1.0)]
)
def test_learning_rate(kind, last):
    rates = [lora.rate_factor(step, 10, 2, kind) for step in range(10)]
    assert rates[:3] == pytest.approx([1 / 3, 2 / 3, 1])
    assert rates[-1] == pytest.approx(last, abs=1e-3)


def test_long_row_is_named(folder):
    with pytest.raises(UserError) as error:
        train(folder, "phi3", "long", max_seq_len=20)
    assert str(error.value) == (
        f"{folder}/train.jsonl:10: 21 tokens, and finetune.max_seq_len is 20; "
        "raise it or shorten the row"
    )


def test_unknown_target_lists_the_layers(folder):
    with pytest.raises(
        UserError, match=r"q_proj is no linear layer.* it has down_proj, gate_up_proj"
    ):
        train(folder, "phi3", "unknown", target_modules=["q_proj"])
    with pytest.raises(UserError, match="lm_head is no linear layer"):
        train(folder, "phi3", "head", target_modules=["lm_head"])


def test_target_is_the_last_part_of_a_name_alone(folder, tmp_path):
    """One rule for finetune and export, before either does any work."""
    target = "self_attn.qkv_proj"
    with pytest.raises(UserError) as refused:
        train(folder, "phi3", "path", target_modules=[target])
    export = Export(device="cpu", provider="cpu", lm_head="float", accuracy_level=4)
    with pytest.raises(UserError) as also:
        stage_export.export(folder / "phi3", tmp_path / "onnx", export, [target])
    assert str(refused.value) == str(also.value)
    assert str(refused.value) == (
        "params.yaml: finetune.target_modules: self_attn.qkv_proj is no linear layer of the "
        "model; it has down_proj, gate_up_proj, o_proj, qkv_proj"
    )
    assert not (tmp_path / "onnx").exists() and not (folder / "adapters/path").exists()


def test_a_fault_in_training_is_not_called_the_users(folder, monkeypatch):
    def batches(*args):
        raise ValueError("shapes do not match")

    monkeypatch.setattr(lora, "batches", batches)
    with pytest.raises(ValueError, match="shapes do not match"):
        train(folder, "phi3", "fault")


def test_a_full_disk_is_said_and_leaves_nothing(tmp_path, monkeypatch):
    """safetensors raises an error of its own, which is no OSError."""
    settings = {"max_steps": 1, "warmup_steps": 0, "batch_size": 2}
    changes = {f"finetune.{key}": value for key, value in settings.items()}
    project = make_project(tmp_path, **changes)
    (project / "models/base").rename(project / "models/quantized")
    (project / "data/prepared/travel").mkdir(parents=True)
    write_rows(project / "data/prepared/travel/train.jsonl", ROWS)
    monkeypatch.chdir(project)
    monkeypatch.setattr("sys.argv", ["finetune", "--adapter", "travel"])
    monkeypatch.setattr(stage, "die_with_parent", lambda: None)
    with small_disk(project / "models/adapters", "64k") as disk:
        with mock.patch.dict(os.environ), pytest.raises(SystemExit) as ended:
            stage.run(stage_finetune.main, "finetune")
        assert ended.value.code == "finetune: no space left on the disk: while writing"
        assert list(disk.iterdir()) == []


def test_diverged_loss_is_an_error(folder):
    with pytest.raises(UserError, match=r"loss is nan at step 1; lower"):
        train(folder, "phi3", "nan", alpha=1e40)
