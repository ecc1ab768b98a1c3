"""Random models of Phi-3's architecture up to Phi-3.5-mini's shape, for measuring time and memory.

They are written tensor by tensor, so that the machine needs room for the largest one only.

    python benchmarks/shapes.py quantized 3.8 FOLDER
"""

from __future__ import annotations

import argparse
import json
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, Phi3Config

from stages import builtin
from stages.rows import read_rows

HEAD_SIZE = 96
SHAPES = {  # hidden, intermediate, layers: 0.106, 0.495, 1.008 and 3.821e9 weights
    "0.1": (768, 2048, 8),
    "0.5": (1536, 4096, 14),
    "1": (1920, 5120, 20),
    "3.8": (3072, 8192, 32),
}
BITS, GROUP_SIZE = 4, 128
WEIGHT_STD = 0.02  # as the library initializes them
SHARD_BYTES = 5_000_000_000
DTYPES = {torch.bfloat16: "BF16", torch.uint8: "U8"}  # safetensors' names
TEXT = Path(__file__).parents[1] / "data/everyday.jsonl"

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


def shape(billions: str) -> dict[str, Any]:
    """The arguments of Phi3Config for a size in `SHAPES`; "3.8" is Phi-3.5-mini's."""
    hidden, intermediate, layers = SHAPES[billions]
    return {
        "vocab_size": 32064,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // HEAD_SIZE,
        "num_key_value_heads": hidden // HEAD_SIZE,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1 + i / 48 for i in range(HEAD_SIZE // 2)],
            "long_factor": [1 + i * 4 / 3 for i in range(HEAD_SIZE // 2)],
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 3,
        "pad_token_id": 3,
        "dtype": "bfloat16",
    }


def float_model(folder: Path, size: str, seed: int = 0) -> Path:
    """Write a random bfloat16 checkpoint with its tokenizer, in shards of up to 5 GB."""
    config, shapes = prepare(folder, size)
    config.save_pretrained(folder)
    tensors = {name: (torch.bfloat16, dims) for name, dims in shapes.items()}
    write(folder, tensors, float_values, seed)
    return folder


def quantized_model(folder: Path, size: str, seed: int = 0) -> Path:
    """Write a random checkpoint as Olive's quantizers do: 4 bits, groups of 128, asymmetric.

    Its linears are uniform in 16 steps around 0, with the float model's standard deviation.
    """
    config, shapes = prepare(folder, size)
    config.quantization_config = {
        "bits": BITS,
        "embeds": False,
        "group_size": GROUP_SIZE,
        "lm_head": False,
        "modules_to_not_convert": None,
        "overrides": None,
        "quant_method": "olive",
        "symmetric": False,
        "tie_word_embeddings": False,
    }
    config.save_pretrained(folder)
    tensors: Tensors = {}
    for name, dims in shapes.items():
        if "_proj." in name:
            rows, groups = dims[0], dims[1] // GROUP_SIZE
            prefix = name.removesuffix("weight")
            tensors[f"{prefix}qweight"] = (torch.uint8, (rows, dims[1] * BITS // 8))
            tensors[f"{prefix}qzeros"] = (torch.uint8, (rows, -(-groups * BITS // 8)))
            tensors[f"{prefix}scales"] = (torch.bfloat16, (rows, groups))
        else:
            tensors[name] = (torch.bfloat16, dims)
    write(folder, tensors, quantized_values, seed)
    return folder


def prepare(folder: Path, size: str) -> tuple[Phi3Config, dict[str, tuple[int, ...]]]:
    """Write the tokenizer; return the configuration and the shapes of the float weights."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = read_rows(TEXT)
    tokenizer = builtin.train_tokenizer(text for row in rows for text in (row.prompt, row.response))
    tokenizer.save_pretrained(folder)
    config = Phi3Config(**shape(size), architectures=["Phi3ForCausalLM"])
    GenerationConfig(bos_token_id=1, eos_token_id=[3, 5], pad_token_id=3).save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, {name: tuple(w.shape) for name, w in sorted(model.state_dict().items())}


def float_values(name: str, dtype: torch.dtype, dims: tuple[int, ...]) -> Tensor:
    if len(dims) == 1:
        return torch.ones(dims, dtype=dtype)
    return torch.empty(dims).normal_(0, WEIGHT_STD).to(dtype)


def quantized_values(name: str, dtype: torch.dtype, dims: tuple[int, ...]) -> Tensor:
    if name.endswith("qweight"):
        return torch.randint(256, dims, dtype=dtype)
    if name.endswith("qzeros"):
        return torch.full(dims, 0x88, dtype=dtype)
    if name.endswith("scales"):  # 0 to 15 have a standard deviation of 4.61
        return (torch.rand(dims).add_(0.5) * (WEIGHT_STD / 4.61)).to(dtype)
    return float_values(name, dtype, dims)


def write(
    folder: Path,
    tensors: Tensors,
    values: Callable[[str, torch.dtype, tuple[int, ...]], Tensor],
    seed: int,
) -> None:
    """Write model.safetensors, or shards of up to SHARD_BYTES and their index."""
    torch.manual_seed(seed)
    parts = list(shards(tensors))
    index = {}
    for number, part in enumerate(parts, 1):
        name = f"model-{number:05}-of-{len(parts):05}.safetensors"
        name = name if len(parts) > 1 else "model.safetensors"
        index |= dict.fromkeys(part, name)
        with (folder / name).open("wb") as file:
            write_header(file, part)
            for key, (dtype, dims) in part.items():
                file.write(values(key, dtype, dims).view(torch.uint8).numpy().data)
    if len(parts) > 1:
        total = sum(map(nbytes, tensors.values()))
        text = json.dumps({"metadata": {"total_size": total}, "weight_map": index}, indent=2)
        (folder / "model.safetensors.index.json").write_text(text)


def nbytes(spec: tuple[torch.dtype, tuple[int, ...]]) -> int:
    return spec[0].itemsize * torch.Size(spec[1]).numel()


def shards(tensors: Tensors) -> Iterator[Tensors]:
    part: Tensors = {}
    for name, spec in tensors.items():
        if part and sum(map(nbytes, part.values())) + nbytes(spec) > SHARD_BYTES:
            yield part
            part = {}
        part[name] = spec
    yield part


def write_header(file: BinaryIO, tensors: Tensors) -> None:
    """The header of the safetensors format: its length, then JSON with the place of each tensor."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    start = 0
    for name, (dtype, dims) in tensors.items():
        end = start + nbytes((dtype, dims))
        header[name] = {"dtype": DTYPES[dtype], "shape": dims, "data_offsets": [start, end]}
        start = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.write(struct.pack("<Q", len(text)) + text)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("kind", choices=["float", "quantized"])
    parser.add_argument("size", choices=SHAPES, help="1e9 weights")
    parser.add_argument("folder", type=Path)
    args = parser.parse_args()
    {"float": float_model, "quantized": quantized_model}[args.kind](args.folder, args.size)
