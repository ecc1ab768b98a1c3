"""The next token from its scores, as one request wants it chosen."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

COLDEST = 1e-5  # below it the likeliest token is taken, as at 0
CANDIDATES = 256  # likeliest tokens that are sorted first; top_p seldom needs more


@dataclass
class Choice:
    """A token, and how likely it was beside others."""

    token: int
    logprob: float = 0.0
    top: list[tuple[int, float]] = field(default_factory=list)
    """The likeliest tokens with their logarithms of probability, best first."""


def no_bias() -> tuple[np.ndarray, np.ndarray]:
    return np.empty(0, np.int64), np.empty(0, np.float32)


@dataclass
class Sampler:
    """Chooses the tokens of one answer.

    Penalties are those of OpenAI's API: score - frequency * count - presence * (count > 0).
    """

    temperature: float = 0.0
    top_p: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    bias: tuple[np.ndarray, np.ndarray] = field(default_factory=no_bias)
    """Tokens, and what is added to their scores."""
    seed: int | None = None
    index: int = 0
    """Which of the answers to one request: the same seed gives each another sequence."""
    top_logprobs: int | None = None
    """How many alternatives are told; None tells no probability at all."""

    def __post_init__(self) -> None:
        entropy = None if self.seed is None else [self.seed % (1 << 64), self.index]
        self._random = np.random.default_rng(entropy)
        self._counts: dict[int, int] = {}

    def choose(self, logits: np.ndarray) -> Choice:
        """The next token.

        Args:
            logits: float32 (vocabulary,); not changed.
        """
        scores = logits
        if not np.isfinite(scores.max()):
            raise ValueError("its scores are no numbers")
        if len(self.bias[0]) or (
            self._counts and (self.presence_penalty or self.frequency_penalty)
        ):
            scores = self._adjusted(logits)
        if self.temperature < COLDEST:
            token = int(scores.argmax())
        else:
            token = self._draw((scores - scores.max()) / np.float64(self.temperature))
        if self.presence_penalty or self.frequency_penalty:
            self._counts[token] = self._counts.get(token, 0) + 1
        if self.top_logprobs is None:
            return Choice(token)
        return self._told(scores, token)

    def _adjusted(self, logits: np.ndarray) -> np.ndarray:
        scores = logits.copy()
        tokens, values = self.bias
        scores[tokens] += values
        for token, count in self._counts.items():
            scores[token] -= self.frequency_penalty * count + self.presence_penalty
        return scores

    def _draw(self, scores: np.ndarray) -> int:
        """One token by its probability, of the fewest likeliest that together have `top_p`.

        The highest of `scores`, float64, is 0.

        Nucleus sampling: Holtzman et al. 2020, "The Curious Case of Neural Text Degeneration".
        """
        weights = np.exp(scores)
        if self.top_p < 1:
            chosen = _nucleus(weights, self.top_p)
            weights = weights[chosen]
        else:
            chosen = None
        sums = weights.cumsum()
        place = int(np.searchsorted(sums, self._random.random() * sums[-1], "right"))
        place = min(place, len(sums) - 1)
        return place if chosen is None else int(chosen[place])

    def _told(self, scores: np.ndarray, token: int) -> Choice:
        highest = scores.max()
        total = highest + np.log(np.exp(scores - highest, dtype=np.float64).sum())
        count = self.top_logprobs or 0
        best = np.argpartition(scores, -max(count, 1))[-max(count, 1) :]
        best = best[np.argsort(-scores[best], kind="stable")][:count]
        top = [(int(one), float(scores[one] - total)) for one in best]
        return Choice(token, float(scores[token] - total), top)


def _nucleus(weights: np.ndarray, top_p: float) -> np.ndarray:
    """Indices of the fewest largest weights whose sum reaches `top_p` of all."""
    wanted = top_p * weights.sum()
    for count in (CANDIDATES, len(weights)):
        if count < len(weights):
            largest = np.argpartition(weights, -count)[-count:]
            if weights[largest].sum() < wanted:
                continue
        else:
            largest = np.arange(len(weights))
        order = largest[np.argsort(-weights[largest], kind="stable")]
        enough = int(np.searchsorted(weights[order].cumsum(), wanted, "left")) + 1
        return order[:enough]
    raise AssertionError("the last count takes all")
