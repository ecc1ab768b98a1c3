"""Write a Phi-3 model of `shapes.py` as GGUF and quantize it to Q4_0, for llama.cpp.

    python benchmarks/gguf_of.py FLOAT_MODEL OUT.gguf

Needs llama-cpp-python and gguf, which are not in the lock. The tokenizer has bytes and made-up
words: the model is timed, not talked to. Names of tensors and keys: gguf's own `constants.py`,
architecture phi3.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import gguf
import llama_cpp
import numpy as np

NAMES = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
    "input_layernorm.weight": "attn_norm.weight",
    "self_attn.qkv_proj.weight": "attn_qkv.weight",
    "self_attn.o_proj.weight": "attn_output.weight",
    "post_attention_layernorm.weight": "ffn_norm.weight",
    "mlp.gate_up_proj.weight": "ffn_up.weight",
    "mlp.down_proj.weight": "ffn_down.weight",
}


def tensors(path: Path) -> dict[str, np.ndarray]:
    """The bfloat16 tensors of a safetensors file, as float32.

    The format: https://huggingface.co/docs/safetensors/index#format.
    """
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        start = file.tell()
    data = np.memmap(path, np.uint8, "r", start)
    found = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        words = data[begin:end].view(np.uint16).astype(np.uint32) << 16
        found[name] = words.view(np.float32).reshape(entry["shape"])
    return found


def new_name(name: str) -> str:
    if name in NAMES:
        return NAMES[name]
    _, _, layer, rest = name.split(".", 3)
    return f"blk.{layer}.{NAMES[rest]}"


def add_tokenizer(writer: gguf.GGUFWriter, size: int) -> None:
    """One of SentencePiece's kind, in which every token has a text."""
    kinds = gguf.TokenType
    pieces = [("<unk>", kinds.UNKNOWN), ("<s>", kinds.CONTROL), ("</s>", kinds.CONTROL)]
    pieces += [(f"<0x{byte:02X}>", kinds.BYTE) for byte in range(256)]
    pieces += [(f"\u2581w{number}", kinds.NORMAL) for number in range(size - len(pieces))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([text for text, _ in pieces])
    writer.add_token_types([kind for _, kind in pieces])
    writer.add_token_scores([-float(at) for at in range(size)])
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)


def main() -> None:
    folder, out = map(Path, sys.argv[1:])
    config = json.loads((folder / "config.json").read_text("utf-8"))
    whole = out.with_suffix(".f16")
    writer = gguf.GGUFWriter(whole, "phi3")
    heads, size = config["num_attention_heads"], config["hidden_size"]
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, config["vocab_size"])
    writer.add_context_length(config["original_max_position_embeddings"])
    writer.add_embedding_length(size)
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(size // heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_sliding_window(0)
    for path in sorted(folder.glob("*.safetensors")):
        for name, tensor in tensors(path).items():
            kept = np.float32 if tensor.ndim == 1 else np.float16
            writer.add_tensor(new_name(name), tensor.astype(kept))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0
    failed = llama_cpp.llama_model_quantize(str(whole).encode(), str(out).encode(), params)
    whole.unlink()
    if failed:
        sys.exit(f"{out}: llama.cpp could not quantize it")


if __name__ == "__main__":
    main()
