"""Phi-3 models of any size with random weights: the shape is real, the text is not.

Weights are written a layer at a time, so a model is never in memory as a whole.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import Phi3Config

from stages.builtin import train_tokenizer
from stages.rows import read_rows

# hidden_size, intermediate_size, layers, heads; 3.8 is Phi-3.5-mini-instruct (3.82 B parameters).
SIZES = {
    "0.1": (768, 2048, 8, 12),
    "0.5": (1536, 4096, 14, 16),
    "1": (2048, 5632, 17, 16),
    "3.8": (3072, 8192, 32, 32),
}
VOCABULARY = 32064
STD = 0.02
GROUP_SIZE = 128
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TEXT = Path(__file__).resolve().parents[1] / "data/everyday.jsonl"


def config(size: str) -> Phi3Config:
    """Phi-3.5-mini's configuration with other widths and depths."""
    hidden, intermediate, layers, heads = SIZES[size]
    factors = [1.0 + 0.5 * i for i in range(hidden // heads // 2)]
    return Phi3Config(
        architectures=["Phi3ForCausalLM"],
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        max_position_embeddings=131072,
        original_max_position_embeddings=4096,
        rope_parameters={
            "rope_type": "longrope",
            "type": "longrope",  # as published; onnxruntime-genai reads this one
            "rope_theta": 10000.0,
            "short_factor": [1.0] * len(factors),
            "long_factor": factors,
            "original_max_position_embeddings": 4096,
        },
        sliding_window=262144,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


def parameters(size: str) -> int:
    """Weights of a model, embeddings and head among them."""
    hidden, intermediate, layers, _ = SIZES[size]
    return layers * (4 * hidden**2 + 3 * hidden * intermediate) + 2 * VOCABULARY * hidden


def float_model(folder: Path, size: str, seed: int = 0) -> None:
    """Write a bfloat16 model to `folder`."""
    write(folder, size, seed, quantized=False)


def quantized_model(folder: Path, size: str, seed: int = 0) -> None:
    """Write a model as `quantize` would: 4 bits, groups of 128, zero points, the rest bfloat16."""
    write(folder, size, seed, quantized=True)


def write(folder: Path, size: str, seed: int, quantized: bool) -> None:
    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    made = config(size)
    saved: dict[str, Any] = made.to_dict()
    if quantized:
        saved["quantization_config"] = {
            "quant_method": "olive",
            "bits": 4,
            "group_size": GROUP_SIZE,
            "symmetric": False,
            "lm_head": False,
            "embeds": False,
            "modules_to_not_convert": None,
            "overrides": None,
            "tie_word_embeddings": False,
        }
    (folder / "config.json").write_text(json.dumps(saved, indent=2) + "\n")
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards(made, quantized)):
        name = f"model-{number:05}.safetensors"
        places |= dict.fromkeys(tensors, name)
        save_file(tensors, folder / name, {"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    rows = read_rows(TEXT)
    train_tokenizer(text for row in rows for text in (row.prompt, row.response)).save_pretrained(
        folder
    )


def shards(made: Phi3Config, quantized: bool) -> Iterator[dict[str, Tensor]]:
    """The embeddings and the head; then layer after layer."""
    hidden, wide = made.hidden_size, made.intermediate_size
    yield {
        "model.embed_tokens.weight": weights(VOCABULARY, hidden),
        "lm_head.weight": weights(VOCABULARY, hidden),
        "model.norm.weight": torch.ones(hidden, dtype=torch.bfloat16),
    }
    linears = {
        "self_attn.qkv_proj": (3 * hidden, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_up_proj": (2 * wide, hidden),
        "mlp.down_proj": (hidden, wide),
    }
    for layer in range(made.num_hidden_layers):
        prefix = f"model.layers.{layer}."
        tensors = {
            f"{prefix}{norm}.weight": torch.ones(hidden, dtype=torch.bfloat16)
            for norm in ("input_layernorm", "post_attention_layernorm")
        }
        for name, (rows, columns) in linears.items():
            if quantized:
                parts = packed(rows, columns)
                tensors |= {f"{prefix}{name}.{part}": tensor for part, tensor in parts.items()}
            else:
                tensors[f"{prefix}{name}.weight"] = weights(rows, columns)
        yield tensors


def weights(rows: int, columns: int) -> Tensor:
    """Normal, (rows, columns) bfloat16."""
    return (torch.randn(rows, columns, device=DEVICE) * STD).bfloat16().cpu()


def packed(rows: int, columns: int) -> dict[str, Tensor]:
    """Random codes with the scales that give them the spread of `weights`."""
    groups = columns // GROUP_SIZE
    codes = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=DEVICE)
    return {
        "qweight": codes.cpu(),
        "scales": torch.full((rows, groups), STD / 4.6, dtype=torch.bfloat16),
        "qzeros": torch.full((rows, (groups + 1) // 2), 0x88, dtype=torch.uint8),
    }
