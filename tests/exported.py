"""A tiny model, quantized, taught and exported, and what PyTorch makes of it."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from passes.lora import load_adapted
from stages import convert as stage_convert
from stages import export as stage_export
from stages import finetune as stage_finetune
from stages import quantize as stage_quantize
from stages.params import Export, Finetune, Quantize
from tests.models import save_model

TARGETS = {
    "phi3": ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"],
    "llama": ["q_proj", "v_proj", "o_proj", "up_proj"],  # k and gate stay as they are
    "qwen2": ["q_proj", "k_proj", "v_proj", "down_proj"],
}
IDS = np.random.default_rng(0).integers(4, 250, (2, 20))
FINETUNE = {
    "r": 4,
    "alpha": 8.0,
    "dropout": 0.0,
    "max_steps": 1,
    "learning_rate": 0.01,
    "lr_scheduler": "constant",
    "warmup_steps": 0,
    "batch_size": 2,
    "max_seq_len": 64,
    "gradient_checkpointing": False,
    "seed": 7,
}
QUANTIZE = {
    "bits": 4,
    "group_size": 32,
    "symmetric": False,
    "calibration_data": "unread.jsonl",
    "calibration_samples": 1,
    "calibration_seq_len": 8,
}


def export_settings(**changes: object) -> Export:
    values = {"device": "cpu", "provider": "cpu", "lm_head": "float", "accuracy_level": 1}
    return Export(**{**values, **changes})


class Lab:
    """One tiny model taken through every stage."""

    def __init__(self, folder: Path, name: str, algorithm: str = "rtn") -> None:
        self.folder, self.name = folder, name
        self.quantized, self.onnx, self.adapter = (folder / x for x in ("q", "onnx", "adapter"))
        self.converted = folder / "adapter.onnx_adapter"
        save_model(folder / "base", name)
        quantize = Quantize(algorithm=algorithm, **QUANTIZE)
        stage_quantize.quantize(folder / "base", Path(), self.quantized, quantize)
        rows = folder / "train.jsonl"
        row = {"text_prompt": "<|user|>Question?<|assistant|>", "text_response": "Answer.<|end|>"}
        rows.write_text(json.dumps(row) + "\n")
        finetune = Finetune(target_modules=TARGETS[name], **FINETUNE)
        plot = folder / "loss.csv"
        stage_finetune.finetune(self.quantized, rows, self.adapter, plot, finetune)
        enlarge(self.adapter)
        self.export(self.onnx)
        stage_convert.convert(self.adapter, self.onnx, self.converted)

    def export(self, out: Path, **changes: object) -> Path:
        settings = export_settings(**changes)
        stage_export.export(self.quantized, out, settings, TARGETS[self.name])
        return out

    def torch_logits(self, adapter: Path | None) -> np.ndarray:
        with torch.inference_mode():
            model = load_adapted(self.quantized, adapter)
            return model(input_ids=torch.tensor(IDS)).logits.numpy()


def enlarge(adapter: Path) -> None:
    """Give lora_B random weights, so that the adapter changes every logit."""
    path = adapter / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(3)
    tensors = {
        k: 0.2 * torch.randn(v.shape, generator=generator) for k, v in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
