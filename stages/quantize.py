"""Quantize the base model's linear layers, in Olive's format."""

from __future__ import annotations

import importlib
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import rows, stage
from stages.errors import UserError
from stages.params import GROUP_SIZES, Params, Quantize
from stages.tokenizer import load

if TYPE_CHECKING:
    from olive.data.config import DataConfig

ERROR_TOKENS = 256  # on which layers are compared
BATCH_TOKENS = {"cpu": 512, "cuda": 4096}  # enough to keep the matrix products busy


def main(params: Params) -> None:
    """Write models/quantized, and plots/quantize.csv with the error after each layer."""
    text = Path(params.quantize.calibration_data)
    with stage.new_output(stage.QUANTIZED) as out:
        quantize(stage.BASE, text, out, params.quantize)
    with stage.new_output(stage.PLOTS / "quantize.csv") as out:
        errors = layer_errors(stage.BASE, stage.QUANTIZED, text)
        lines = [f"{i},{error:.6f}" for i, error in enumerate(errors, 1)]
        out.write_text("\n".join(["layer,error", *lines, ""]), "utf-8")


def quantize(base: Path, calibration: Path, out: Path, params: Quantize) -> None:
    """Write `base` with the linear layers of its blocks quantized; embeddings and head stay float.

    Args:
        base: Hugging Face folder with safetensors weights and a tokenizer.
        calibration: JSONL that best, awq and gptq measure activations on.
        out: folder to write. Has all that later stages need; with algorithm `none` it is a copy.
        params: the `quantize` section.

    Raises:
        UserError: the model is already quantized, the group size does not divide a layer, or the
            calibration text is too short.
    """
    if params.algorithm == "none":
        shutil.copytree(base, out)
        return check(out)
    check_group_size(base, params.group_size)

    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    config: dict[str, Any] = {
        "bits": params.bits,
        "group_size": params.group_size,
        "sym": params.symmetric,
    }
    if params.algorithm in ("best", "awq", "gptq"):
        config["data_config"] = calibration_data(base, calibration, params)
    quantizer = create_pass_from_dict(pass_class(params.algorithm), config, disable_search=True)
    if params.algorithm in ("best", "awq"):
        quantizer.progress = stage.progress
    else:
        stage.progress(0, 1, f"quantizing with {params.algorithm}")
    quantizer.run(HfModelHandler(str(base)), str(out))
    check(out)


def pass_class(algorithm: str) -> type:
    """The Olive pass of an algorithm; only its own module is imported, since each costs time."""
    module, name = {
        "best": ("passes.best", "Best"),
        "awq": ("passes.awq", "Awq"),
        "gptq": ("olive.passes.pytorch.gptq", "Gptq"),
        "rtn": ("olive.passes.pytorch.rtn", "Rtn"),
        "kquant": ("olive.passes.pytorch.kquant", "KQuant"),
    }[algorithm]
    return getattr(importlib.import_module(module), name)


def check_group_size(base: Path, group_size: int) -> None:
    """Refuse a quantized model, and a group size that leaves a rest in some layer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    if getattr(config, "quantization_config", None):
        raise UserError(
            f"{base} is already quantized: set quantize.algorithm to none, or start from its "
            "float version"
        )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    head = model.get_output_embeddings()
    linears = {n: m.in_features for n, m in model.named_modules() if type(m) is torch.nn.Linear}
    linears = {n: size for n, size in linears.items() if model.get_submodule(n) is not head}
    if not linears:
        raise UserError(f"{base}: {type(model).__name__} has no linear layers to quantize")
    for name, in_features in linears.items():
        if in_features % group_size:
            good = [str(g) for g in GROUP_SIZES if all(n % g == 0 for n in linears.values())]
            raise UserError(
                f"params.yaml: quantize.group_size {group_size} does not divide the "
                f"{in_features} in_features of {name}; these do: {', '.join(good) or 'none'}"
            )


def calibration_data(base: Path, calibration: Path, params: Quantize) -> DataConfig:
    """Tokenize the calibration text and cut it into sequences.

    Raises:
        UserError: there is too little of it.
    """
    from passes.calibration import data_config, pack

    tokenizer = load(base)
    texts = rows.read_calibration(calibration, tokenizer)
    documents = tokenizer(texts, add_special_tokens=False).input_ids
    length = params.calibration_seq_len
    try:
        sequences = pack(documents, params.calibration_samples, length)
    except ValueError as error:
        raise UserError(
            f"{calibration}: {error}; lower quantize.calibration_samples or "
            "quantize.calibration_seq_len, or add text"
        ) from None
    return data_config(sequences, batch_size=batch_size(length))


def batch_size(length: int) -> int:
    """Calibration sequences of `length` tokens that go through a layer together."""
    return max(1, BATCH_TOKENS[device()] // length)


def device() -> str:
    """Where models are run: a GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def layer_errors(base: Path, quantized: Path, text: Path) -> list[float]:
    """|h' - h| / |h| after each layer, h the hidden states of `base` and h' those of `quantized`.

    On the first tokens of the text; norms are over all of them. The last are those after the final
    norm, as transformers gives them.
    """
    import torch
    from olive.model import HfModelHandler

    tokenizer = load(base)
    texts = rows.read_calibration(text, tokenizer)
    documents = tokenizer(texts, add_special_tokens=False).input_ids
    tokens = [token for document in documents for token in document][:ERROR_TOKENS]
    ids = torch.tensor([tokens], device=device())
    states = []
    for folder in (base, quantized):
        model = HfModelHandler(str(folder)).load_model(cache_model=False).eval().to(device())
        with torch.inference_mode():
            output = model(input_ids=ids, output_hidden_states=True, use_cache=False)
        states.append([h.float() for h in output.hidden_states[1:]])
        del model, output
    return [float((b - a).norm() / a.norm()) for a, b in zip(*states, strict=True)]


def check(out: Path) -> None:
    """Load what was written and run one token."""
    import torch
    from olive.model import HfModelHandler

    model = HfModelHandler(str(out)).load_model(cache_model=False).eval().to(device())
    with torch.inference_mode():
        if not model(input_ids=torch.tensor([[0]], device=device())).logits.isfinite().all():
            raise UserError(f"{out}: the quantized model gives no finite logits")


if __name__ == "__main__":
    stage.run(main, "quantize", stage.TORCH_MB)
