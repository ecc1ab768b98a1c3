"""How well a model answers, and how alike two models are, from their scores on known answers.

A row is a prompt and a response, tokens x[0..T-1], the response from x[S] on and with its stop
token. Row t of a model's scores (logits) is for the token at t + 1, so those that matter are
rows S-1 to T-2: the "response logits", of shape (T - S, vocabulary).
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from stages.generation import Session

BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Example:
    """Token ids of a row, of which the first `start` are the prompt."""

    ids: list[int]
    start: int

    @property
    def targets(self) -> np.ndarray:
        return np.asarray(self.ids[self.start :])


@dataclass
class Score:
    """Sums over rows of a split.

    perplexity = exp(-(1/N) sum over response tokens of log p(x[t] | x[<t])), N of them.

    exact_answer_rate = share of rows where argmax p(. | x[<t]) = x[t] for every response token.
    By induction over t that is when greedy decoding gives the response, token for token, and stops.
    """

    log_likelihood: float = 0.0
    tokens: int = 0
    exact: int = 0
    rows: int = 0

    def add(self, logits: np.ndarray, targets: np.ndarray) -> None:
        """Count one row: response logits (R, vocabulary) and its R tokens."""
        self.log_likelihood += float(log_softmax(logits)[np.arange(len(targets)), targets].sum())
        self.tokens += len(targets)
        self.exact += bool((logits.argmax(-1) == targets).all())
        self.rows += 1

    def figures(self) -> dict[str, float]:
        """Perplexity is inf where it is too large for a float."""
        try:
            perplexity = round(math.exp(-self.log_likelihood / self.tokens), 4)
        except OverflowError:  # above 709 nats a token
            perplexity = math.inf
        return {
            "perplexity": perplexity,
            "exact_answer_rate": round(self.exact / self.rows, 4),
        }


@dataclass
class Agreement:
    """Sums over response tokens of how alike model P (the reference) and model Q are.

    top1 = share of tokens where argmax P = argmax Q.
    mean_kl = mean of KL(P || Q) = sum over v of P(v) (log P(v) - log Q(v)), in nats.
    """

    same: int = 0
    divergence: float = 0.0
    tokens: int = 0

    def add(self, p: np.ndarray, q: np.ndarray) -> None:
        """Count one row: response logits of both, (R, vocabulary)."""
        log_p, log_q = log_softmax(p), log_softmax(q)
        self.divergence += float((np.exp(log_p) * (log_p - log_q)).sum())
        self.same += int((p.argmax(-1) == q.argmax(-1)).sum())
        self.tokens += len(p)

    def figures(self) -> dict[str, float]:
        return {
            "top1": round(self.same / self.tokens, 4),
            "mean_kl": round(self.divergence / self.tokens, 6),
        }


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p over the last axis, float64."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def encode(tokenizer: PreTrainedTokenizerBase, rows: list[dict]) -> list[Example]:
    """Token ids of prepared rows, shortest first: rows of like length then share a batch.

    Prompt and response are encoded apart, as finetune does: no token spans the two.
    """
    halves = [text for row in rows for text in (row["text_prompt"], row["text_response"])]
    ids = tokenizer(halves, add_special_tokens=False).input_ids
    pairs = zip(ids[::2], ids[1::2], strict=True)
    examples = [Example(prompt + response, len(prompt)) for prompt, response in pairs]
    return sorted(examples, key=lambda example: len(example.ids))


def excerpts(
    tokenizer: PreTrainedTokenizerBase, texts: list[tuple[str, str]], tokens: int, length: int
) -> list[Example]:
    """Texts to score, what is given apart from what follows, at most `tokens` of the latter.

    Taken in the order of a hash, cut into windows of `length`, and sorted as `encode` does. The
    first token of a window is never scored.
    """
    examples: list[Example] = []
    for given, following in sorted(texts, key=lambda t: sha256("".join(t).encode()).digest()):
        before, after = tokenizer([given, following], add_special_tokens=False).input_ids
        ids, start = before + after[:tokens], max(1, len(before))
        for i in range(0, len(ids), length):
            window = Example(ids[i : i + length], max(1, start - i))
            if window.start < len(window.ids):
                examples.append(window)
                tokens -= len(window.targets)
        if tokens <= 0:
            break
    return sorted(examples, key=lambda example: len(example.ids))


def torch_logits(model: nn.Module, examples: list[Example]) -> Iterator[np.ndarray]:
    """Yield the response logits of each example in order, float32 (R, vocabulary).

    Padded on the right: causal attention keeps padding out of what is before it.
    """
    import torch

    device = next(model.parameters()).device
    for batch in batches(examples):
        ids = torch.zeros(len(batch), max(len(e.ids) for e in batch), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for i, example in enumerate(batch):
            ids[i, : len(example.ids)] = torch.tensor(example.ids)
            mask[i, : len(example.ids)] = 1
        with torch.inference_mode():
            output = model(
                input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False
            )
        for i, example in enumerate(batch):
            yield output.logits[i, example.start - 1 : len(example.ids) - 1].float().cpu().numpy()


def torch_tokens_per_second(model: nn.Module, ids: list[int], tokens: int) -> float:
    """Greedy tokens a second of a transformers model, after it has read a prompt."""
    import torch

    x, past = torch.tensor([ids], device=next(model.parameters()).device), None
    started = 0.0
    with torch.inference_mode():
        for i in range(tokens + 1):
            output = model(input_ids=x, past_key_values=past, use_cache=True)
            x, past = output.logits[:, -1:].argmax(-1), output.past_key_values
            if i == 0:
                started = time.perf_counter()
    return tokens / (time.perf_counter() - started)


def batches(examples: list[Example]) -> Iterator[list[Example]]:
    """Cut examples, sorted by length, into batches of at most BATCH_TOKENS tokens, padding too."""
    batch: list[Example] = []
    for example in examples:
        if batch and (len(batch) + 1) * len(example.ids) > BATCH_TOKENS:
            yield batch
            batch = []
        batch.append(example)
    if batch:
        yield batch


def onnx_logits(
    session: Session, examples: list[Example], adapter: str | None
) -> Iterator[np.ndarray]:
    """Yield the response logits of each example in order, float32 (R, vocabulary).

    One row at a time: measured on 40 rows, batches are no faster on a CPU (0.51 s, and 0.55 s).
    """
    for example in examples:
        yield session.logits(example.ids, adapter)[example.start - 1 : -1]


def score(examples: list[Example], logits: Iterable[np.ndarray]) -> dict[str, float]:
    """Perplexity and exact answer rate of one model; see `Score`."""
    total = Score()
    for example, row in zip(examples, logits, strict=True):
        total.add(row, example.targets)
    return total.figures()
