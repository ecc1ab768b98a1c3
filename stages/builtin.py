"""The built-in base model: a small Phi-3 chat model trained from scratch on everyday questions.

With it a first run needs no download and no GPU, yet takes the same path as a published Phi-3.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.errors import UserError
from stages.rows import read_rows

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import Phi3ForCausalLM, PreTrainedTokenizerFast

# Phi-3's own names. <|endoftext|> ends a document and pads, <|end|> ends a turn.
PHI3_TURNS = ["<|assistant|>", "<|end|>", "<|system|>", "<|user|>"]
SPECIAL_TOKENS = ["<unk>", "<s>", "</s>", "<|endoftext|>", *PHI3_TURNS]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] in ['system', 'user', 'assistant'] %}"
    "{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
    "{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
# Few enough entries that a new name is spelled from pieces which the base has practised.
VOCAB_SIZE = 1280
MAX_POSITIONS = 512
# Every linear reads 256 or 512 features: both hold whole quantization groups of up to 128.
HIDDEN_SIZE = 256
INTERMEDIATE_SIZE = 512
LAYERS = 2
HEAD_SIZE = 64
# Larger than the library's 0.02, so that pieces seen rarely stay distinct from each other.
EMBEDDING_STD = 0.5
HEAD_STD = 0.0625

STEPS = 400
BATCH_ROWS = 32
WARMUP_STEPS = 20
CONSTANT_STEPS = 120
EMBEDDING_LEARNING_RATE = 1e-2
LEARNING_RATE = 2e-3
HEAD_LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.1
# A little weight on the questions keeps them likely text; the answers are what is taught.
PROMPT_WEIGHT = 0.1
# Two threads whatever the machine has: another count sums in another order, so other bytes.
THREADS = 2


def build(out: Path, data: Path, seed: int, progress: Callable[[int, int, str], None]) -> None:
    """Train the base model and write it to `out` as a Hugging Face folder.

    Writes config.json, generation_config.json, model.safetensors (float32), tokenizer.json,
    tokenizer_config.json and chat_template.jinja. The same data, seed, machine and library
    versions give the same bytes.

    Args:
        out: folder to write; made if missing, files of these names are replaced.
        data: JSONL of {"prompt": str, "response": str} rows.
        seed: of the initial weights and of the order of the rows.
        progress: called as progress(step, steps, text) about every second.

    Raises:
        UserError: as `read_rows`, or a row is too long; names file and line.
    """
    import torch

    rows = read_rows(data)
    tokenizer = train_tokenizer(text for row in rows for text in (row.prompt, row.response))
    examples = [encode(tokenizer, row.prompt, row.response) for row in rows]
    for row, (ids, _) in zip(rows, examples, strict=True):
        if len(ids) > MAX_POSITIONS:
            raise UserError(f"{data}:{row.line}: {len(ids)} tokens, at most {MAX_POSITIONS} fit")

    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = new_model(tokenizer)
            train(model, examples, seed, progress)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)

    out.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: any text can be encoded, and decodes to itself."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["</s>", *PHI3_TURNS],
        padding_side="left",
        model_max_length=MAX_POSITIONS,
        chat_template=CHAT_TEMPLATE,
    )


def encode(tokenizer: PreTrainedTokenizerFast, prompt: str, response: str) -> tuple[list[int], int]:
    """Return the token ids of one chat up to the response's <|end|>, and the prompt's length."""
    user = [{"role": "user", "content": prompt}]
    text = tokenizer.apply_chat_template(user, add_generation_prompt=True, tokenize=False)
    start = tokenizer(text, add_special_tokens=False).input_ids
    answer = tokenizer(response + "<|end|>", add_special_tokens=False).input_ids
    return start + answer, len(start)


def new_model(tokenizer: PreTrainedTokenizerFast) -> Phi3ForCausalLM:
    """Return an untrained float32 model; the initial weights come from torch's seed."""
    import torch
    from transformers import GenerationConfig, Phi3Config, Phi3ForCausalLM

    end_of_text = SPECIAL_TOKENS.index("<|endoftext|>")
    end_of_turn = SPECIAL_TOKENS.index("<|end|>")
    config = Phi3Config(
        vocab_size=len(tokenizer),
        hidden_size=HIDDEN_SIZE,
        intermediate_size=INTERMEDIATE_SIZE,
        num_hidden_layers=LAYERS,
        num_attention_heads=HIDDEN_SIZE // HEAD_SIZE,
        num_key_value_heads=HIDDEN_SIZE // HEAD_SIZE,
        max_position_embeddings=MAX_POSITIONS,
        original_max_position_embeddings=MAX_POSITIONS,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=end_of_text,
        pad_token_id=end_of_text,
    )
    model = Phi3ForCausalLM(config)
    torch.nn.init.normal_(model.model.embed_tokens.weight, std=EMBEDDING_STD)
    torch.nn.init.normal_(model.lm_head.weight, std=HEAD_STD)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=[end_of_text, end_of_turn],
        pad_token_id=end_of_text,
    )
    return model


def train(
    model: Phi3ForCausalLM,
    examples: list[tuple[list[int], int]],
    seed: int,
    progress: Callable[[int, int, str], None],
) -> None:
    """Train in place with AdamW on STEPS batches; examples are (token ids, prompt length)."""
    import torch
    from torch.nn.functional import cross_entropy

    embeddings = model.model.embed_tokens.weight
    layers = [p for p in model.model.layers.parameters() if p.dim() == 2]
    norms = [p for p in model.parameters() if p.dim() == 1]
    groups: list[dict[str, Any]] = [
        {"params": [embeddings], "lr": EMBEDDING_LEARNING_RATE},
        {"params": layers, "weight_decay": WEIGHT_DECAY},
        {"params": [model.lm_head.weight], "lr": HEAD_LEARNING_RATE},
        {"params": norms},
    ]
    optimizer = torch.optim.AdamW(groups, lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor)
    model.train()
    for step, (ids, weights) in enumerate(batches(examples, seed), start=1):
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        losses = cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        loss = (losses * weights[:, 1:]).sum() / weights[:, 1:].sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 5 == 0 or step == STEPS:
            progress(step, STEPS, f"loss {loss.item():.3f}")
    model.eval()


def learning_rate_factor(step: int) -> float:
    """Linear warm-up, CONSTANT_STEPS at 1, then a straight line to 0 at STEPS."""
    return min(1.0, (step + 1) / WARMUP_STEPS, (STEPS - step) / (STEPS - CONSTANT_STEPS))


def batches(examples: list[tuple[list[int], int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield STEPS pairs (ids int64, loss weights float32), both (up to BATCH_ROWS, longest row).

    Rows of like length share a batch, so little is spent on padding; the lengths are jittered by
    up to 3 tokens so that each pass makes other batches.
    """
    import torch

    generator = torch.Generator().manual_seed(seed)
    pad = SPECIAL_TOKENS.index("<|endoftext|>")
    done = 0
    while done < STEPS:
        jitter = (3 * torch.rand(len(examples), generator=generator)).tolist()
        order = sorted(range(len(examples)), key=lambda i: len(examples[i][0]) + jitter[i])
        groups = [order[i : i + BATCH_ROWS] for i in range(0, len(order), BATCH_ROWS)]
        for group in torch.randperm(len(groups), generator=generator).tolist()[: STEPS - done]:
            rows = [examples[i] for i in groups[group]]
            ids = torch.full((len(rows), max(len(r) for r, _ in rows)), pad)
            weights = torch.zeros(ids.shape)
            for i, (row, prompt_length) in enumerate(rows):
                ids[i, : len(row)] = torch.tensor(row)
                weights[i, :prompt_length] = PROMPT_WEIGHT
                weights[i, prompt_length : len(row)] = 1.0
            yield ids, weights
            done += 1
