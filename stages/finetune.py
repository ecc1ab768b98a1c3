"""Train a LoRA adapter on the prepared rows, over the quantized model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from stages import stage
from stages.errors import UserError
from stages.params import Finetune, Params
from stages.rows import read_prepared
from stages.targets import target_shapes
from stages.tokenizer import load

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def main(params: Params, adapter: str) -> None:
    """Write models/adapters/NAME and plots/loss/NAME.csv."""
    rows = stage.PREPARED / adapter / "train.jsonl"
    with (
        stage.new_output(stage.ADAPTERS / adapter) as out,
        stage.new_output(stage.PLOTS / "loss" / f"{adapter}.csv") as plot,
    ):
        finetune(stage.QUANTIZED, rows, out, plot, params.finetune)


def finetune(model: Path, rows: Path, out: Path, plot: Path, params: Finetune) -> None:
    """Train an adapter.

    Args:
        model: Hugging Face folder, quantized by Olive or float.
        rows: JSONL of {"text_prompt", "text_response"}: rendered text up to the answer, and the
            answer with its end token.
        out: folder to write adapter_config.json and adapter_model.safetensors (float32) to.
        plot: CSV to write, with columns step, loss, learning_rate.
        params: the `finetune` section.

    Raises:
        UserError: a row is too long, a target module does not exist, or the loss diverged.
    """
    target_shapes(model, params.target_modules)

    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    from passes.calibration import data_config
    from passes.lora import ADAPTER_FILES, Diverged, QuantLora

    tokenizer = load(model)
    sequences, labels = encode(rows, tokenizer, params.max_seq_len)
    config = {
        "r": params.r,
        "alpha": params.alpha,
        "lora_dropout": params.dropout,
        "target_modules": params.target_modules,
        "train_data_config": data_config(sequences, labels),
        "base_name": str(stage.QUANTIZED),
        **training(params),
    }
    lora = create_pass_from_dict(QuantLora, config, disable_search=True)
    lora.progress = stage.progress
    try:
        lora.run(HfModelHandler(str(model)), str(out))
    except Diverged as error:
        raise UserError(str(error)) from None
    for name in ADAPTER_FILES:
        (out / "adapter" / name).rename(out / name)
    (out / "adapter").rmdir()
    lines = [f"{step},{loss:.6f},{rate:.8f}\n" for step, loss, rate in lora.losses]
    plot.write_text("step,loss,learning_rate\n" + "".join(lines), "utf-8")
    check(model, out, sequences[0])


def training(params: Finetune) -> dict:
    """How the pass is to train, in the names of transformers' TrainingArguments."""
    import torch

    cuda = torch.cuda.is_available()
    return {
        "torch_dtype": "bfloat16" if cuda else "float32",
        "device_map": "auto" if cuda else None,
        "training_args": {
            "learning_rate": params.learning_rate,
            "lr_scheduler_type": params.lr_scheduler,
            "warmup_steps": params.warmup_steps,
            "max_steps": params.max_steps,
            "per_device_train_batch_size": params.batch_size,
            "gradient_checkpointing": params.gradient_checkpointing,
            "seed": params.seed,
        },
    }


def encode(
    path: Path, tokenizer: PreTrainedTokenizerBase, max_seq_len: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids and labels of each row of a file that `prepare` wrote; no loss is on the prompt.

    Raises:
        UserError: as `read_prepared`; a row has more than `max_seq_len` tokens; names the line.
    """
    from passes.lora import IGNORE_INDEX

    sequences, labels = [], []
    for number, row in read_prepared(path):
        prompt, response = (
            tokenizer(row[key], add_special_tokens=False).input_ids
            for key in ("text_prompt", "text_response")
        )
        if len(prompt) + len(response) > max_seq_len:
            raise UserError(
                f"{path}:{number}: {len(prompt) + len(response)} tokens, and "
                f"finetune.max_seq_len is {max_seq_len}; raise it or shorten the row"
            )
        sequences.append(prompt + response)
        labels.append([IGNORE_INDEX] * len(prompt) + response)
    return sequences, labels


def check(model: Path, adapter: Path, tokens: list[int]) -> None:
    """Load what was written and run it on the first row."""
    import torch

    from passes.lora import load_adapted

    loaded = load_adapted(model, adapter)
    with torch.inference_mode():
        ids = torch.tensor([tokens], device=next(loaded.parameters()).device)
        if not loaded(input_ids=ids).logits.isfinite().all():
            raise UserError("the adapter gives no finite logits; lower learning_rate")


if __name__ == "__main__":
    stage.run(main, "finetune", stage.TORCH_MB)
