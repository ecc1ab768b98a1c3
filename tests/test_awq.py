"""AWQ: folds that change nothing, a search that never loses, and Olive's format on disk."""

import copy
import gc
import hashlib
import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from olive.common.hf.wrapper import ModelWrapper
from olive.common.quant.nn import QuantLinear
from olive.common.quant.utils import WeightQuantizer
from olive.model import HfModelHandler
from olive.passes.olive_pass import create_pass_from_dict
from olive.passes.pytorch.quant_utils import QuantInfo
from olive.passes.pytorch.rtn import Rtn
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from passes import rounding
from passes.awq import Activations, Awq
from passes.best import Best
from passes.calibration import data_config, pack
from passes.folding import Fold, candidates, leaves_unchanged
from stages import quantize as stage_quantize
from stages.errors import UserError
from stages.params import Quantize
from tests.models import CONFIGS, save_model, token_sequences

pytestmark = pytest.mark.usefixtures("one_thread")

# The module that each fold of the first layer divides.
FOLDS = {
    "phi3": [
        "input_layernorm",
        "self_attn.qkv_proj",
        "post_attention_layernorm",
        "mlp.gate_up_proj",
    ],
    "llama": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "qwen2": ["input_layernorm", "self_attn.v_proj", "post_attention_layernorm", "mlp.up_proj"],
    "gemma2": ["input_layernorm", "self_attn.v_proj", "pre_feedforward_layernorm", "mlp.up_proj"],
    "opt": ["self_attn_layer_norm", "self_attn.v_proj", "final_layer_norm", "fc1"],
    "phi": [],  # its norm is read by the MLP too, and Olive does not know its other linears
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("awq")


def run(pass_type: type, model: Path, out: Path, sequences: int = 8, **config) -> HfModelHandler:
    if issubclass(pass_type, Awq):
        config["data_config"] = data_config(token_sequences(sequences, 64), batch_size=8)
    quantizer = create_pass_from_dict(pass_type, {"group_size": 32, **config}, True)
    return quantizer.run(HfModelHandler(str(model)), str(out))


def load(folder: Path) -> nn.Module:
    handler = HfModelHandler(str(folder), load_kwargs={"dtype": "float32"})
    return handler.load_model(cache_model=False).eval()


def wrapped(name: str) -> tuple[ModelWrapper, Tensor]:
    """A model of uneven channels whose linears are marked as to be quantized, and its input."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name])).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn(parameter.shape))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.quant_info = QuantInfo(WeightQuantizer(4, False, 32))
    return ModelWrapper.from_model(model), torch.tensor(token_sequences(2, 16))


@torch.no_grad()
def valid_folds(wrapper: ModelWrapper, ids: Tensor) -> list[tuple[str, Fold]]:
    layer = wrapper.get_layer_wrappers()[0]
    names = {module: name for name, module in layer.layer.named_modules()}

    def output() -> Tensor:
        return wrapper.model(input_ids=ids).logits

    found, expected = [], output()
    for choices in candidates(wrapper, layer):
        valid = (f for f in choices if leaves_unchanged(f, expected, output, torch.float32))
        found += list(valid)[:1]
    return [(names[f.source], f) for f in found]


@pytest.mark.parametrize("name", CONFIGS)
def test_folds_go_where_the_architecture_allows(name):
    assert [source for source, _ in valid_folds(*wrapped(name))] == FOLDS[name]


def test_no_fold_across_a_nonlinearity():
    model = AutoModelForCausalLM.from_config(
        CONFIGS["opt"].__class__(**{**CONFIGS["opt"].to_dict(), "activation_function": "gelu"})
    ).eval()
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.quant_info = QuantInfo(WeightQuantizer(4, False, 32))
    ids = torch.tensor(token_sequences(2, 16))
    sources = [source for source, _ in valid_folds(ModelWrapper.from_model(model), ids)]
    assert sources == FOLDS["opt"][:-1]


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_folding_leaves_the_function_unchanged(name, dtype):
    wrapper, ids = wrapped(name)
    wrapper.model.to(dtype).float()  # what a checkpoint of this type holds
    expected = wrapper.model(input_ids=ids).logits
    for _, fold in valid_folds(wrapper, ids):
        fold.apply(fold.tie(torch.rand(fold.linears[0].in_features) + 0.3), dtype)
        if not isinstance(fold.source, nn.Linear):
            stored = fold.source.weight.to(dtype).float()
            assert torch.equal(stored, fold.source.weight), "the norm's weight would be rounded"
    error = wrapper.model(input_ids=ids).logits - expected
    # Only a LayerNorm's bias is rounded: bfloat16 has 8 bits.
    limit = 2e-3 if (name, dtype) == ("opt", torch.bfloat16) else 1e-5
    assert error.norm() < limit * expected.norm()


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("group_size", [16, -1])
def test_rounding_is_olives_bit_for_bit(symmetric, group_size):
    quantizer = WeightQuantizer(4, symmetric, group_size)
    w = torch.randn(24, 64, generator=torch.Generator().manual_seed(1))
    w[0], w[1], w[2] = 0, w[1].abs(), -w[2].abs()
    assert torch.equal(rounding.rounded(w, quantizer), quantizer.fake_quantize(w))


def layer(seed: int, outliers: list[int] | None = None) -> tuple[nn.Linear, Tensor]:
    """A linear to be quantized and 128 of its inputs, in which `outliers` are 30 times larger."""
    generator = torch.Generator().manual_seed(seed)
    linear = nn.Linear(64, 32, bias=False)
    linear.weight.data = torch.randn(32, 64, generator=generator)
    linear.quant_info = QuantInfo(WeightQuantizer(4, False, 32))
    x = torch.randn(128, 64, generator=generator)
    if outliers is None:
        return linear, x * (torch.rand(64, generator=generator) ** 4 + 1e-3)
    x[:, outliers] *= 30
    return linear, x


def search(linear: nn.Linear, x: Tensor, **config) -> tuple[Awq, Activations, Tensor]:
    seen = Activations(torch.zeros(64, 64), torch.zeros(64))
    seen.add(x)
    quantize = create_pass_from_dict(Awq, {"data_config": data_config([[1]]), **config}, True)
    return quantize, seen, quantize._search_scale(Fold([linear], nn.RMSNorm(64)), seen)


@torch.no_grad()
def test_search_finds_outlier_channels():
    outliers = [3, 17, 40]
    linear, x = layer(0, outliers)
    _, _, s = search(linear, x)
    assert sorted(s.topk(3).indices.tolist()) == outliers
    assert s[outliers].min() > 2 * s.median()


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_search_solves_equation_4(seed):
    """s* = argmin |Q(W diag(s)) diag(s)^-1 X - W X|, s = mean|X|^alpha, over a grid of alpha."""
    linear, x = layer(seed)
    _, _, found = search(linear, x, grid=10, duo=False)
    w = linear.weight.data
    choices = [x.abs().mean(0) ** (i / 10) for i in range(11)]
    quantizer = linear.quant_info.quantizer
    losses = [((quantizer.fake_quantize(w * s) / s - w) @ x.T).norm() for s in choices]
    best = choices[int(torch.stack(losses).argmin())]
    torch.testing.assert_close(found / found.max(), best / best.max())


@torch.no_grad()
@pytest.mark.parametrize("seed", range(4))
def test_search_and_clipping_never_lose_to_plain_rounding(seed):
    linear, x = layer(seed)
    quantize, seen, s = search(linear, x)
    w, quantizer = linear.weight.data, linear.quant_info.quantizer

    def error(scale: Tensor) -> Tensor:
        return (x @ (rounding.rounded(w * scale, quantizer) / scale - w).T).square().sum()

    assert error(s) <= error(torch.ones(64))
    plain = (x @ (quantizer.fake_quantize(w) - w).T).square().sum(0)
    ranges = quantize._ranges(linear, seen.gram, torch.float32)
    clipped = (x @ (quantizer.fake_quantize(w, *ranges) - w).T).square().sum(0)
    assert (clipped <= plain * (1 + 1e-4)).all()


@torch.no_grad()
def test_correction_is_the_least_squares_solution():
    """v = argmin |v x' - w x|, and w itself where x' is x."""
    linear, x = layer(1)
    w, rough = linear.weight.data.double(), (x + 0.1 * torch.randn(x.shape)).double()
    x = x.double()
    gram, cross = rough.T @ rough, x.T @ rough
    expected = torch.linalg.lstsq(rough, x @ w.T).solution.T
    torch.testing.assert_close(rounding.corrected(w, gram, cross, 1e-12), expected)
    torch.testing.assert_close(rounding.corrected(w, gram, gram, 0.1), w)


@torch.no_grad()
@pytest.mark.parametrize("group_size", [16, 32, 64])
def test_descent_ends_where_no_single_code_helps(group_size):
    linear, x = layer(2)
    quantizer, w = WeightQuantizer(4, False, group_size), linear.weight.data
    gram = rounding.damped(x.T @ x, 0.01)
    qparams = quantizer.find_qparams(w)
    q = quantizer.fake_quantize(w, *qparams)
    errors = [rounding.output_error(q - w, gram)]
    for _ in range(30):
        q = rounding.descend(w, q, qparams, gram, quantizer)
        errors.append(rounding.output_error(q - w, gram))
    assert all((b <= a * (1 + 1e-4)).all() for a, b in pairwise(errors))
    assert errors[-1].sum() < 0.9 * errors[0].sum()
    torch.testing.assert_close(q, quantizer.fake_quantize(q, *qparams))  # on the grid
    for i in range(w.shape[1]):
        for step in (-1, 1):
            other = q.clone()
            other[:, i] += step * qparams[0][:, i // group_size]
            inside = quantizer.fake_quantize(other, *qparams)[:, i].sub(other[:, i]).abs() < 1e-5
            worse = rounding.output_error(other - w, gram) >= errors[-1] * (1 - 1e-4)
            assert worse[inside].all()


@torch.no_grad()
def test_refit_finds_the_best_scales():
    linear, x = layer(3)
    quantizer, w = linear.quant_info.quantizer, linear.weight.data
    gram = rounding.damped(x.T @ x, 0.01)
    scales, zero_points = quantizer.find_qparams(w)
    q = quantizer.fake_quantize(w, scales, zero_points)
    fitted, new = rounding.refit(w, q, scales, gram, torch.float32)
    codes = (q.view(32, 2, 32) / scales[..., None]).round()
    root = torch.linalg.cholesky(gram)
    for row in range(32):
        basis = torch.block_diag(*codes[row]) @ root  # (groups, in_features)
        expected = torch.linalg.lstsq(basis.T, (w[row] @ root)[:, None]).solution[:, 0]
        torch.testing.assert_close(new[row], expected, rtol=1e-3, atol=1e-5)
    assert (rounding.output_error(fitted - w, gram) <= rounding.output_error(q - w, gram)).all()
    coarse, _ = rounding.refit(w, q, scales, gram, torch.bfloat16)  # rounding may undo the gain
    assert (rounding.output_error(coarse - w, gram) <= rounding.output_error(q - w, gram)).all()


@pytest.mark.parametrize("name", ["phi3", "llama", "qwen2", "gemma2"])
def test_best_is_nearer_than_awq_and_awq_than_rounding(folder, name):
    """The distance of the logits, where few channels are large, on tokens not calibrated with.

    2,048 tokens of calibration for 256 channels: with 512 `best` fits them and not their kind, and
    is no nearer than AWQ.
    """
    base = save_model(folder / f"wide-{name}", name)
    ids = torch.tensor(token_sequences(16, 64, seed=5))
    with torch.no_grad():
        expected = load(base)(ids).logits

        def distance(pass_type: type) -> float:
            out = run(pass_type, base, folder / name / pass_type.__name__, sequences=32)
            return (load(Path(out.model_path))(ids).logits - expected).norm().item()

        rtn, awq, best = (distance(p) for p in (Rtn, Awq, Best))
    assert best < awq < rtn


@pytest.mark.parametrize("pass_type", [Awq, Best])
@pytest.mark.parametrize("name", CONFIGS)
def test_writes_olives_format(folder, name, pass_type):
    base = save_model(folder / name, name, torch.bfloat16)
    out = folder / f"{name}-{pass_type.__name__}"
    run(pass_type, base, out)
    model, original = load(out), load(base)
    ids = torch.tensor(token_sequences(2, 16))
    with torch.no_grad():
        assert model(input_ids=ids).logits.isfinite().all()
    assert sum(isinstance(m, QuantLinear) for m in model.modules()) == sum(
        type(m) is nn.Linear for n, m in original.named_modules() if n != "lm_head"
    )
    for get in ("get_input_embeddings", "get_output_embeddings"):
        assert torch.equal(getattr(model, get)().weight, getattr(original, get)().weight)


@pytest.mark.parametrize("pass_type", [Awq, Best])
@pytest.mark.parametrize("config", [{"sym": True}, {"bits": 8}, {"group_size": -1}])
def test_other_formats(folder, config, pass_type):
    base = save_model(folder / "other", "llama")
    run(pass_type, base, folder / "other-quantized", **config)
    expected, found = load(base), load(folder / "other-quantized")
    ids = torch.tensor(token_sequences(2, 16))
    with torch.no_grad():
        a, b = expected(ids).logits, found(ids).logits
    assert (a - b).norm() < (0.05 if "bits" in config else 1) * a.norm()


def test_pack_spreads_over_the_text_and_refuses_too_little():
    assert pack([[0, 1, 2], [3, 4, 5, 6, 7]], 2, 2) == [[0, 1], [4, 5]]
    with pytest.raises(ValueError, match="8 tokens are too few for 3 sequences of 4; they hold 2"):
        pack([list(range(8))], 3, 4)


# The stage.


def settings(**changes) -> Quantize:
    values = {
        "algorithm": "awq",
        "bits": 4,
        "group_size": 32,
        "symmetric": False,
        "calibration_data": "unused",
        "calibration_samples": 8,
        "calibration_seq_len": 32,
    }
    return Quantize(**{**values, **changes})


@pytest.fixture(scope="module")
def text(folder) -> Path:
    path = folder / "calibration.jsonl"
    path.write_text(json.dumps({"text": "Some text to measure activations on. " * 10}) + "\n")
    return path


@pytest.fixture(scope="module")
def base(folder) -> Path:
    return save_model(folder / "base", "phi3")


def digest(folder: Path) -> dict[str, str]:
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@pytest.mark.parametrize("algorithm", ["awq", "best"])
def test_same_input_gives_same_bytes(folder, base, text, algorithm):
    one, two = folder / f"one-{algorithm}", folder / f"two-{algorithm}"
    for out in (one, two):
        stage_quantize.quantize(base, text, out, settings(algorithm=algorithm))
    assert digest(one) == digest(two)
    assert str(folder).encode() not in b"".join(p.read_bytes() for p in one.glob("*.json"))


@pytest.mark.parametrize("algorithm", ["best", "gptq", "rtn", "kquant", "none"])
def test_every_algorithm_leaves_a_whole_model(folder, base, text, algorithm):
    out = folder / algorithm
    stage_quantize.quantize(base, text, out, settings(algorithm=algorithm))
    extra = {"folds"} if algorithm == "best" else set()
    assert {p.name for p in base.iterdir()} | extra == {p.name for p in out.iterdir()}
    linear = load(out).get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(linear, nn.Linear if algorithm == "none" else QuantLinear)


def test_group_size_that_does_not_divide_names_the_layer(folder, text):
    odd = save_model(folder / "odd", "llama", intermediate_size=160)
    with pytest.raises(UserError) as error:
        stage_quantize.quantize(odd, text, folder / "no", settings(group_size=64))
    assert str(error.value) == (
        "params.yaml: quantize.group_size 64 does not divide the 160 in_features of "
        "model.layers.0.mlp.down_proj; these do: 16, 32"
    )


def test_quantized_base_is_refused(folder, base, text):
    quantized = folder / "again"
    stage_quantize.quantize(base, text, quantized, settings(algorithm="rtn"))
    with pytest.raises(UserError, match=r"already quantized: set quantize\.algorithm to none"):
        stage_quantize.quantize(quantized, text, folder / "no", settings())


def test_short_calibration_text_is_refused(folder, base, text):
    with pytest.raises(UserError, match=r"too few for 64 sequences of 32.*calibration_samples"):
        stage_quantize.quantize(base, text, folder / "no", settings(calibration_samples=64))


def to_quantize() -> int:
    """How many linears that a pass has marked are alive."""
    gc.collect()
    return sum(type(m) is nn.Linear and hasattr(m, "quant_info") for m in gc.get_objects())


def test_floats_of_a_finished_layer_are_let_go(folder):
    before, alive = to_quantize(), []
    model = save_model(folder / "let-go", "phi3")
    config = {"group_size": 32, "data_config": data_config(token_sequences(2, 16))}
    quantizer = create_pass_from_dict(Awq, config, True)
    quantizer.progress = lambda done, total, note: alive.append(to_quantize() - before)
    quantizer.run(HfModelHandler(str(model)), str(folder / "let-go-quantized"))
    layers = len(alive) - 1
    assert alive == [4 * left for left in reversed(range(layers + 1))]
