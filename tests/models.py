"""Tiny random models of the architectures that the pipeline must not get wrong."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    GenerationConfig,
    LlamaConfig,
    OPTConfig,
    Phi3Config,
    PhiConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

SPECIAL = ["<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>"]
VOCAB_SIZE = 264  # 256 bytes, the special tokens, and up to a multiple of 8
CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}

CONFIGS: dict[str, PreTrainedConfig] = {
    # Packed qkv and gate_up.
    "phi3": Phi3Config(
        **_COMMON,
        num_key_value_heads=4,
        original_max_position_embeddings=256,
        tie_word_embeddings=False,
    ),
    # Grouped-query attention, tied embeddings.
    "llama": LlamaConfig(**_COMMON, num_key_value_heads=2, tie_word_embeddings=True),
    # Biases on q, k and v.
    "qwen2": Qwen2Config(**_COMMON, num_key_value_heads=2, tie_word_embeddings=False),
    # The norm's weight is 1 + w, and there are norms after the blocks too.
    "gemma2": Gemma2Config(**_COMMON, num_key_value_heads=2, head_dim=32),
    # One norm is read by attention and MLP, fc1 -> gelu -> fc2.
    "phi": PhiConfig(**_COMMON, tie_word_embeddings=False),
    # LayerNorm with bias, fc1 -> relu -> fc2, biases everywhere.
    "opt": OPTConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        ffn_dim=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=256,
        word_embed_proj_dim=128,
        bos_token_id=0,
        eos_token_id=0,
        pad_token_id=0,
    ),
}


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Write a tokenizer with one token a byte, and Phi-3's form of chat template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: i for i, token in enumerate([*SPECIAL, *alphabet])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=SPECIAL[0],
        pad_token=SPECIAL[0],
        additional_special_tokens=SPECIAL[1:],
        chat_template=CHAT_TEMPLATE,
        model_max_length=256,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def save_model(
    folder: Path, name: str, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: object
) -> Path:
    """Write a random model of one of `CONFIGS` with uneven channels, and its tokenizer.

    Channels of the embeddings, the norms and the biases differ in size, as those of trained models
    do; at their initial values the norms are all 1 and the biases 0, and a wrong fold would not
    show.
    """
    torch.manual_seed(seed)
    config = CONFIGS[name].__class__(**{**CONFIGS[name].to_dict(), **changes})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(0.3 * torch.randn(parameter.shape))
            else:
                parameter.mul_(3 * torch.rand(1, parameter.shape[1]).exp())
    model.to(dtype)
    model.generation_config = GenerationConfig(
        bos_token_id=0, eos_token_id=[0, SPECIAL.index("<|end|>")], pad_token_id=0
    )
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return folder


def token_sequences(count: int, length: int, seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(4, VOCAB_SIZE - 4, (count, length), generator=generator).tolist()
