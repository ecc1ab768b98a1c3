"""ONNX with adapter inputs: the checkpoint's weights and PyTorch's logits, adapter on or off."""

import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as og
import pytest
import torch
from exported import IDS, QUANTIZE, TARGETS, Lab, enlarge, export_settings
from onnx import numpy_helper
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import small_disk
from transformers import AutoModelForCausalLM

from passes.lora import load_adapted
from stages import convert as stage_convert
from stages import export as stage_export
from stages import quantize as stage_quantize
from stages.errors import UserError
from stages.params import Quantize
from tests.models import save_model

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=TARGETS)
def lab(request, labs) -> Lab:
    return labs(request.param)


@pytest.fixture(scope="module")
def phi3(labs) -> Lab:
    return labs("phi3")


def logits(model: Path, adapter: Path | None = None) -> np.ndarray:
    """The ONNX model's logits for IDS, (rows, tokens, vocabulary)."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    session = ort.InferenceSession(model / "model.onnx", options)
    feed = {"input_ids": IDS, "attention_mask": np.ones_like(IDS)}
    for value in session.get_inputs():
        if value.name.startswith("past_key_values"):
            shape = [len(IDS), value.shape[1], 0, value.shape[3]]
            feed[value.name] = np.zeros(shape, np.float32)
    if adapter is not None:
        reader = ort.AdapterFormat.read_adapter(str(adapter))
        feed |= {k: v.numpy() for k, v in reader.get_parameters().items()}
    return session.run(["logits"], feed)[0]


def relative(found: np.ndarray, expected: np.ndarray) -> float:
    return float(np.linalg.norm(found - expected) / np.linalg.norm(expected))


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir())}


def test_without_an_adapter_it_is_the_quantized_model(lab):
    assert relative(logits(lab.onnx), lab.torch_logits(None)) < 1e-5


def test_with_an_adapter_it_is_pytorch_with_the_adapter(lab):
    on = lab.torch_logits(lab.adapter)
    assert relative(lab.torch_logits(None), on) > 0.1, "the adapter must matter for this to test"
    assert relative(logits(lab.onnx, lab.converted), on) < 1e-5


def test_int8_arithmetic_is_near(lab):
    out = lab.export(lab.folder / "level4", accuracy_level=4)
    on = lab.torch_logits(lab.adapter)
    assert relative(logits(out, lab.converted), on) < 0.1


def test_unused_inputs_change_no_bit(lab, tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(lab.onnx, plain)
    model = onnx.load(plain / "model.onnx", load_external_data=False)
    for node in list(model.graph.node):
        if node.name.endswith("/lora/Add"):
            base = next(n for n in model.graph.node if node.input[0] in n.output)
            base.output[0] = node.output[0]
        if "/lora" in node.name:
            model.graph.node.remove(node)
    for kind in (model.graph.input, model.graph.initializer):
        for value in [v for v in kind if ".lora_" in v.name]:
            kind.remove(value)
    onnx.save(model, plain / "model.onnx")
    assert np.array_equal(logits(lab.onnx), logits(plain))


def test_weights_are_the_checkpoints_bit_for_bit(lab):
    assert_same_weights(lab.quantized, lab.onnx, {"qweight", "scales", "qzeros"})


@pytest.mark.parametrize(
    ("bits", "symmetric", "group_size"),
    [(8, False, 32), (4, True, 32), (4, False, 128), (8, True, 128)],
)
def test_other_widths_and_groups_are_exported_as_they_are(tmp_path, bits, symmetric, group_size):
    base = save_model(tmp_path / "base", "phi3")
    changes = {"bits": bits, "symmetric": symmetric, "group_size": group_size}
    settings = Quantize(algorithm="rtn", **{**QUANTIZE, **changes})
    stage_quantize.quantize(base, Path(), tmp_path / "q", settings)
    stage_export.export(tmp_path / "q", tmp_path / "onnx", export_settings(), ["o_proj"])
    kinds = {"qweight", "scales"} if symmetric else {"qweight", "scales", "qzeros"}
    assert_same_weights(tmp_path / "q", tmp_path / "onnx", kinds)
    with torch.inference_mode():
        expected = load_adapted(tmp_path / "q", None)(input_ids=torch.tensor(IDS)).logits.numpy()
    assert relative(logits(tmp_path / "onnx"), expected) < 1e-5


def assert_same_weights(quantized: Path, model: Path, kinds: set[str]) -> None:
    """Every projection of the graph has tensors of these kinds, with the checkpoint's bits."""
    checkpoint = load_file(quantized / "model.safetensors")
    initializers = onnx.load(model / "model.onnx").graph.initializer
    pattern = re.compile(r"model\.layers\.(\d)\.(attn|mlp)\.(\w+)\.MatMulNBits\.(\w+)")
    found = {m.groups(): i for i in initializers if (m := pattern.fullmatch(i.name))}
    assert {key[3] for key in found} == kinds
    assert len(found) == 2 * 5 * len(kinds)  # layers, projections
    for key, initializer in found.items():
        expected = stored(checkpoint, *key).flatten().numpy()
        assert np.array_equal(numpy_helper.to_array(initializer).flatten(), expected), key


def stored(checkpoint: dict, layer: str, block: str, name: str, kind: str) -> torch.Tensor:
    """The checkpoint's tensor of one projection of the graph."""

    def get(part: str) -> torch.Tensor | None:
        parent = {"attn": "self_attn", "mlp": "mlp"}[block]
        return checkpoint.get(f"model.layers.{layer}.{parent}.{part}.{kind}")

    if (whole := get(name)) is not None:
        return whole
    if name == "qkv_proj":
        return torch.cat([get("q_proj"), get("k_proj"), get("v_proj")])
    gate, up = get("gate_up_proj").chunk(2)
    return gate if name == "gate_proj" else up


def test_genai_switches_the_adapter_on_and_off(lab):
    model = og.Model(str(lab.onnx))
    adapters = og.Adapters(model)
    adapters.load(str(lab.converted), "taught")

    def generate(adapter: str | None) -> list[int]:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=32, min_length=32)
        generator = og.Generator(model, params)
        if adapter:
            generator.set_active_adapter(adapters, adapter)
        generator.append_tokens(IDS[0].tolist())
        while not generator.is_done():
            generator.generate_next_token()
        return generator.get_sequence(0).tolist()

    off, on, again = generate(None), generate("taught"), generate(None)
    assert off == again
    assert off != on


def test_contract_says_what_each_input_comes_from(lab):
    contract = json.loads((lab.onnx / "adapter_inputs.json").read_text())
    assert contract["dtype"] == "float32"
    qkv = next(e for e in contract["inputs"] if e["A"] == "model.layers.1.attn.qkv_proj.lora_A")
    module = "model.layers.1.self_attn."
    sources = [(s["module"], s["rows"], s["columns"]) for s in qkv["sources"]]
    assert (
        sources
        == {
            "phi3": [(f"{module}qkv_proj", [0, 384], [0, 384])],
            "llama": [
                (f"{module}q_proj", [0, 128], [0, 128]),
                (f"{module}v_proj", [0, 64], [192, 256]),
            ],
            "qwen2": [
                (f"{module}q_proj", [0, 128], [0, 128]),
                (f"{module}k_proj", [0, 64], [128, 192]),
                (f"{module}v_proj", [0, 64], [192, 256]),
            ],
        }[lab.name]
    )
    if lab.name == "phi3":
        up = next(e for e in contract["inputs"] if e["A"] == "model.layers.0.mlp.up_proj.lora_A")
        assert up["sources"][0]["rows"] == [256, 512]


def test_same_input_gives_same_bytes_and_no_paths(lab, tmp_path):
    assert digest(lab.export(tmp_path / "again")) == digest(lab.onnx)
    stage_convert.convert(lab.adapter, lab.onnx, tmp_path / "again.onnx_adapter")
    assert (tmp_path / "again.onnx_adapter").read_bytes() == lab.converted.read_bytes()
    for path in [*lab.onnx.iterdir(), *lab.quantized.iterdir(), lab.converted]:
        assert str(lab.folder).encode() not in path.read_bytes(), path.name


def test_genai_config(lab):
    config = json.loads((lab.onnx / "genai_config.json").read_text())
    assert config["search"]["past_present_share_buffer"] is False
    assert config["model"]["eos_token_id"] == [0, 3]
    assert config["model"]["context_length"] == 256
    session = config["model"]["decoder"]["session_options"]
    assert session["intra_op_num_threads"] == 0  # as many as there are cores


@pytest.mark.parametrize(("lm_head", "bits"), [("int8", 8), ("int4", 4)])
def test_quantized_head(phi3, lm_head, bits):
    out = phi3.export(phi3.folder / lm_head, lm_head=lm_head)
    graph = onnx.load(out / "model.onnx", load_external_data=False).graph
    head = next(n for n in graph.node if "logits" in n.output)
    assert head.op_type == "MatMulNBits"
    assert next(a.i for a in head.attribute if a.name == "bits") == bits
    assert relative(logits(out), phi3.torch_logits(None)) < {8: 0.02, 4: 0.2}[bits]


def test_float_model(tmp_path):
    lab = Lab(tmp_path, "phi3", algorithm="none")
    assert relative(logits(lab.onnx), lab.torch_logits(None)) < 1e-5
    assert relative(logits(lab.onnx, lab.converted), lab.torch_logits(lab.adapter)) < 1e-5
    again = lab.export(tmp_path / "again", lm_head="int8")
    assert np.array_equal(logits(again), logits(lab.onnx)), "the head of a float model stays float"


@pytest.mark.parametrize("name", TARGETS)
def test_a_plain_peft_adapter_of_the_float_model_fits(tmp_path, name):
    """Quantized with scales folded in: the linears' inputs are not those it was trained on."""
    base = save_model(tmp_path / "base", name)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": "Some text to measure activations on. " * 10}) + "\n")
    settings = QUANTIZE | {"bits": 8, "calibration_samples": 8, "calibration_seq_len": 32}
    stage_quantize.quantize(base, text, tmp_path / "q", Quantize(algorithm="awq", **settings))
    stage_export.export(tmp_path / "q", tmp_path / "onnx", export_settings(), TARGETS[name])
    model = AutoModelForCausalLM.from_pretrained(base)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=TARGETS[name], task_type="CAUSAL_LM")
    get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    enlarge(tmp_path / "adapter")
    stage_convert.convert(tmp_path / "adapter", tmp_path / "onnx", tmp_path / "x.onnx_adapter")
    float_model = PeftModel.from_pretrained(
        AutoModelForCausalLM.from_pretrained(base), tmp_path / "adapter"
    )
    with torch.inference_mode():
        expected = float_model(input_ids=torch.tensor(IDS)).logits.numpy()
    assert relative(logits(tmp_path / "onnx", tmp_path / "x.onnx_adapter"), expected) < 0.05
    folds = load_file(tmp_path / "onnx/folds/scales.safetensors")
    assert max((s - 1).abs().max() for s in folds.values()) > 0.5, "the folds must matter"


def test_any_rank_fits_the_same_model(phi3, tmp_path):
    adapter = tmp_path / "wide"
    shutil.copytree(phi3.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"r": 7, "use_rslora": True}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    path = adapter / "adapter_model.safetensors"
    tensors = {
        k: torch.randn(7, v.shape[1]) if "lora_A" in k else torch.randn(v.shape[0], 7) / 9
        for k, v in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    stage_convert.convert(adapter, phi3.onnx, tmp_path / "wide.onnx_adapter")
    found = logits(phi3.onnx, tmp_path / "wide.onnx_adapter")
    assert relative(found, phi3.torch_logits(adapter)) < 1e-5


FIRST = "base_model.model.model.layers.0.mlp.down_proj"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(f"{FIRST}.lora_A.weight"), r"down_proj\.lora_A\.weight is missing"),
        (
            lambda t: t.update({f"{FIRST}.lora_B.weight": torch.zeros(127, 4)}),
            r"down_proj\.lora_B\.weight is \(127, 4\), and the ONNX model takes \(128, r\)",
        ),
        (
            lambda t: t.update({f"{FIRST}.lora_B.weight": torch.zeros(128, 5)}),
            r"down_proj: lora_A has rank 4, lora_B has rank 5",
        ),
        (
            lambda t: t.update({f"{FIRST}.lora_B.weight": torch.zeros(128, 4).bfloat16()}),
            r"down_proj\.lora_B\.weight is BF16",
        ),
        (
            lambda t: t.update({"base_model.model.lm_head.lora_A.weight": torch.zeros(4, 128)}),
            r"lm_head\.lora_A\.weight has no input in the ONNX model, which takes .* of down_proj",
        ),
    ],
)
def test_adapter_that_does_not_fit_is_refused(phi3, tmp_path, change, message):
    adapter = tmp_path / "bad"
    shutil.copytree(phi3.adapter, adapter)
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(UserError, match=message):
        stage_convert.convert(adapter, phi3.onnx, tmp_path / "bad.onnx_adapter")


@pytest.mark.parametrize(
    ("field", "value"),
    [("use_dora", True), ("modules_to_save", ["lm_head"]), ("bias", "all"), ("peft_type", "LOHA")],
)
def test_more_than_plain_lora_is_refused(phi3, tmp_path, field, value):
    adapter = tmp_path / "bad"
    shutil.copytree(phi3.adapter, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {field: value}))
    with pytest.raises(UserError, match=f"adapter_config.json: {field} is"):
        stage_convert.convert(adapter, phi3.onnx, tmp_path / "bad.onnx_adapter")


def test_a_disk_too_small_for_the_adapter_is_said(phi3, tmp_path):
    """onnxruntime says only that it could not write."""
    with small_disk(tmp_path / "disk", "16k") as disk:
        with pytest.raises(UserError, match=r"disk: 0\.00 GB are needed and 0\.00 GB are free"):
            stage_convert.convert(phi3.adapter, phi3.onnx, disk / "x.onnx_adapter")
        assert list(disk.iterdir()) == []


def test_unknown_target_is_refused(phi3, tmp_path):
    with pytest.raises(UserError, match=r"target_modules: q_proj is no linear.* it has down_proj"):
        stage_export.export(phi3.quantized, tmp_path / "no", export_settings(), ["q_proj"])


def test_gpu_graph_is_half_precision_and_splits_what_is_packed(phi3):
    """On DirectML the builder makes q, k and v of a packed qkv; it is not run here."""
    out = phi3.export(phi3.folder / "dml", device="gpu", provider="dml")
    contract = json.loads((out / "adapter_inputs.json").read_text())
    assert contract["dtype"] == "float16"
    sources = {e["A"]: e["sources"][0] for e in contract["inputs"]}
    for part, rows in {"q": [0, 128], "k": [128, 256], "v": [256, 384]}.items():
        source = sources[f"model.layers.0.attn.{part}_proj.lora_A"]
        assert source["module"] == "model.layers.0.self_attn.qkv_proj"
        assert (source["rows"], source["columns"]) == (rows, [0, 128])
    stage_convert.convert(phi3.adapter, out, phi3.folder / "half.onnx_adapter")


@pytest.mark.parametrize(
    ("quantize", "export", "message"),
    [
        (
            {"bits": 8},
            {"device": "gpu", "provider": "NvTensorRtRtx"},
            r"NvTensorRtRtx takes quantize\.bits 4, not 8",
        ),
        (
            {},
            {"device": "gpu", "provider": "NvTensorRtRtx", "lm_head": "int8"},
            r"NvTensorRtRtx takes export\.lm_head float, not int8",
        ),
        (
            {"symmetric": False},
            {"device": "gpu", "provider": "NvTensorRtRtx"},
            r"NvTensorRtRtx takes quantize\.symmetric true",
        ),
    ],
)
def test_what_the_kernels_cannot_do_is_refused(tmp_path, quantize, export, message):
    save_model(tmp_path / "base", "phi3", intermediate_size=384)
    settings = Quantize(algorithm="rtn", **{**QUANTIZE, **quantize})
    stage_quantize.quantize(tmp_path / "base", Path(), tmp_path / "q", settings)
    with pytest.raises(UserError, match=message):
        stage_export.export(tmp_path / "q", tmp_path / "no", export_settings(**export), ["o_proj"])
