"""LoRA over Olive's quantized linears, as an Olive pass: loading, training, saving."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from olive.common.quant.nn import QuantLinear
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import HfModelHandler
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from olive.passes.pytorch.lora import LoRA
from olive.passes.pytorch.train_utils import load_hf_base_model
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from passes.lora_linear import LoraQuantLinear, keep_products_alone

IGNORE_INDEX = -100
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Diverged(ArithmeticError):
    """The loss is no finite number any more."""


def over_quantized(config: LoraConfig) -> LoraConfig:
    """Let PEFT put LoRA over QuantLinear too."""
    config._register_custom_module({QuantLinear: LoraQuantLinear})
    return config


def load_adapted(quantized_dir: Path, adapter_dir: Path | None) -> nn.Module:
    """Load a model (quantized by Olive, or float) and an adapter over it, for evaluation.

    Returns:
        The model in eval mode, called as any transformers model: float32 on the CPU, bfloat16 on a
        GPU if there is one.
    """
    cuda = torch.cuda.is_available()
    dtype = torch.bfloat16 if cuda else torch.float32
    model = load_hf_base_model(HfModelHandler(str(quantized_dir)), torch_dtype=dtype)
    model.to("cuda" if cuda else "cpu")
    if adapter_dir is not None:
        config = over_quantized(LoraConfig.from_pretrained(str(adapter_dir)))
        model = PeftModel.from_pretrained(model, str(adapter_dir), config=config)
    return model.eval()


class QuantLora(LoRA):
    """LoRA on rows with labels, over `QuantLinear` or float linears.

    Takes the configuration of Olive's LoRA; of `training_args` it reads learning_rate,
    lr_scheduler_type (cosine, linear or constant), warmup_steps, max_steps,
    per_device_train_batch_size, gradient_checkpointing and seed. Rows are padded on the right.
    Nothing but the adapter is written, and the same input gives the same bytes.

    Set `progress` to be called as progress(steps done, steps, note). After a run `losses` holds
    (step, loss, learning rate) for each step.
    """

    progress: Callable[[int, int, str], None] = staticmethod(lambda done, total, note: None)
    losses: list[tuple[int, float, float]]

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            **super()._default_config(accelerator_spec),
            "base_name": PassConfigParam(
                type_=str,
                default_value=None,
                description="base_model_name_or_path of adapter_config.json; the folder that the "
                "model was loaded from would differ from machine to machine.",
            ),
        }

    @staticmethod
    def get_peft_model(
        model: PreTrainedModel, config: type[BasePassConfig], config_kwargs: dict | None = None
    ) -> PeftModel:
        """Put a new adapter on the model; its initial weights come from the seed."""
        torch.manual_seed(config.training_args.extra_args["seed"])
        lora = LoraConfig(
            r=config.r,
            lora_alpha=config.alpha,
            lora_dropout=config.lora_dropout,
            target_modules=config.target_modules,
            **(config_kwargs or {}),
        )
        adapted: Any = get_peft_model(model, over_quantized(lora))
        if not torch.cuda.is_available():
            for module in adapted.modules():
                if isinstance(module, LoraQuantLinear):
                    module.unpack()
        return adapted

    def train_and_save_new_model(
        self,
        model: PeftModel,
        tokenizer: Any,
        config: type[BasePassConfig],
        output_model: HfModelHandler,
        output_model_path: str,
    ) -> HfModelHandler:
        """Train the adapter and write it to `output_model_path`/adapter."""
        data = config.train_data_config.to_data_container()
        rows = data.pre_process(data.load_dataset())
        self.losses = []
        self._train(model, rows, config.training_args)
        folder = Path(output_model_path) / "adapter"
        save_adapter(model, folder, config.base_name)
        output_model.set_resource("adapter_path", folder)
        return output_model

    def _train(self, model: PeftModel, rows: Any, args: Any) -> None:
        extra = args.extra_args
        steps, size = extra["max_steps"], extra["per_device_train_batch_size"]
        parameters = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=0.0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: rate_factor(step, steps, extra["warmup_steps"], args.lr_scheduler_type),
        )
        model.train()
        model.config.use_cache = False
        if model.device.type == "cuda" and not args.gradient_checkpointing:
            keep_products_alone(model)
        for step, batch in enumerate(batches(rows, size, steps, extra["seed"]), start=1):
            loss = response_loss(model, *(x.to(model.device) for x in batch))
            if not loss.isfinite():
                raise Diverged(f"loss is {loss.item()} at step {step}; lower learning_rate")
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            rate = float(schedule.get_last_lr()[0])
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            self.losses.append((step, loss.item(), rate))
            self.progress(step, steps, f"loss {loss.item():.3f}")


def rate_factor(step: int, steps: int, warmup: int, kind: str) -> float:
    """Learning rate over its peak at a step counted from 0: linear warm-up, then the schedule."""
    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, steps - warmup)
    return {"cosine": 0.5 + 0.5 * math.cos(math.pi * done), "linear": 1 - done, "constant": 1.0}[
        kind
    ]


def batches(rows: Any, size: int, count: int, seed: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield `count` batches (input_ids, attention_mask, labels), int64 of shape (rows, longest).

    Each pass over the rows is in a new order; among 8 batches' worth of rows, those of like length
    share a batch, so that little is spent on padding.
    """
    generator = torch.Generator().manual_seed(seed)
    done = 0
    while done < count:
        order = torch.randperm(len(rows), generator=generator).tolist()
        chunks = [order[i : i + 8 * size] for i in range(0, len(order), 8 * size)]
        order = [i for c in chunks for i in sorted(c, key=lambda i: len(rows[i][1]))]
        groups = [order[i : i + size] for i in range(0, len(order), size)]
        for group in torch.randperm(len(groups), generator=generator).tolist()[: count - done]:
            items = [rows[i] for i in groups[group]]
            yield (
                pad_sequence([x["input_ids"] for x, _ in items], batch_first=True),
                pad_sequence([x["attention_mask"] for x, _ in items], batch_first=True),
                pad_sequence([y for _, y in items], batch_first=True, padding_value=IGNORE_INDEX),
            )
            done += 1


def response_loss(model: PeftModel, ids: Tensor, mask: Tensor, labels: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens with a label; the head runs on their positions only."""
    wanted = (labels[:, 1:] != IGNORE_INDEX).any(0).nonzero().squeeze(1)
    logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=wanted).logits
    return cross_entropy(logits.flatten(0, 1).float(), labels[:, wanted + 1].flatten())


def save_adapter(model: PeftModel, folder: Path, base_name: str | None) -> None:
    """Write `ADAPTER_FILES` in PEFT's format, in an order that does not change from run to run."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    config = json.loads((folder / ADAPTER_FILES[0]).read_text("utf-8"))
    config["base_model_name_or_path"] = base_name
    config["target_modules"] = sorted(config["target_modules"])
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / ADAPTER_FILES[0]).write_text(text, "utf-8")
