"""The base, the quantized and the ONNX model, as the lm-evaluation-harness asks models.

Gao et al., "The Language Model Evaluation Harness", zenodo.org/records/12608602, as the package
lm_eval; its model for PyTorch is HFLM in lm_eval/models/huggingface.py. Needs the extra `lm-eval`,
as stages/harness_tasks.py does; no stage needs either.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from lm_eval.api.model import CacheHook
from lm_eval.models.huggingface import HFLM

from stages.generation import SUFFIX, Session
from stages.stage import ADAPTERS, BASE, ONNX, QUANTIZED

# As they come in the pipeline.
MODELS = {"base": BASE, "quantized": QUANTIZED, "onnx": ONNX}

Progress = Callable[[int, int], None]
"""Called with the requests that are done and those that are known of."""


class TorchLM(HFLM):
    """HFLM over a transformers model that is loaded already; it reports instead of drawing bars.

    Args:
        tokenizer: folder of the tokenizer.
        batch_size: requests at once.
        max_length: context in tokens; left out, what the model's configuration says.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Path,
        batch_size: int = 1,
        progress: Progress = lambda done, total: None,
        max_length: int | None = None,
    ) -> None:
        super().__init__(
            pretrained=model,
            backend="causal",
            tokenizer=str(tokenizer),
            batch_size=batch_size,
            max_length=max_length,
        )
        self._total = 0
        self._progress = progress
        self.set_cache_hook(_Counter(lambda done: progress(done, self._total)))

    def loglikelihood(self, requests: list, disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        self._total += len(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def loglikelihood_rolling(self, requests: list, disable_tqdm: bool = True) -> list[float]:
        """As HFLM, a batch of texts at a time: HFLM counts none before the last is done."""
        self._total += len(requests)
        values: list[float] = []
        for i in range(0, len(requests), self.batch_size):
            group = requests[i : i + self.batch_size]
            values += super().loglikelihood_rolling(group, disable_tqdm=True)
        return values

    def generate_until(self, requests: list, disable_tqdm: bool = True) -> list[str]:
        self._total += len(requests)
        return super().generate_until(requests, disable_tqdm=True)

    def _loglikelihood_tokens(
        self, requests: list, disable_tqdm: bool = True, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        return super()._loglikelihood_tokens(requests, True, override_bs)


class OnnxLM(TorchLM):
    """HFLM with an exported model in place of PyTorch's, with or without an adapter.

    Only the two calls of the model differ. All else is HFLM's own code, so that a difference
    between two models is one of their numbers: context and continuation are encoded together and
    then split, spaces at the end of a context go to the continuation, what does not fit is cut on
    the left, a long text is scored in windows, `is_greedy` is argmax, and a generated text ends
    before the first of `until`.

    Args:
        tokenizer: folder of the base model's tokenizer, which the other models use too.
        adapter: one of the session's, or None.
    """

    def __init__(
        self,
        session: Session,
        tokenizer: Path,
        adapter: str | None = None,
        progress: Progress = lambda done, total: None,
    ) -> None:
        # One request at a time, so no padding: batches are no faster on a CPU (stages/scoring.py).
        stand_in = SimpleNamespace(device=torch.device("cpu"), config=None)
        super().__init__(stand_in, tokenizer, 1, progress, session.context_length)
        self._session = session
        self._adapter = adapter

    def _model_call(self, inps: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
        """Scores of the next token after each token: (B, T) ids to float32 (B, T, vocabulary)."""
        rows = [self._session.logits(ids, self._adapter) for ids in inps.tolist()]
        return torch.from_numpy(np.stack(rows))

    def _model_generate(
        self, context: torch.Tensor, max_length: int, stop: list[str], **_: Any
    ) -> torch.Tensor:
        """The likeliest tokens after one context, (1, T) ids to (1, T + new), until one of `stop`.

        The text is decoded with its special tokens, as HFLM does to look for `stop`.
        """
        ids, new = context[0].tolist(), []
        for token in self._session.tokens(ids, self._adapter, max_length - len(ids)):
            new.append(token)
            text = self.tokenizer.decode(new)
            if any(word in text for word in stop if word):
                break
        return torch.tensor([ids + new])


class _Counter(CacheHook):
    """HFLM tells this hook of every request that is done."""

    def __init__(self, report: Callable[[int], None]) -> None:
        super().__init__(None)
        self._report = report
        self._done = 0

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        self._done += 1
        self._report(self._done)


def open_model(
    name: str,
    adapter: str | None,
    batch_size: int = 1,
    progress: Progress = lambda done, total: None,
) -> TorchLM:
    """One of `MODELS` for the harness; the adapter goes on all but the base model.

    PyTorch's run on a GPU in bfloat16 if there is one (passes/lora.py).

    Raises:
        UserError: it cannot be loaded, or not on this machine.
    """
    if name == "onnx":
        files = {adapter: ADAPTERS / f"{adapter}{SUFFIX}"} if adapter else {}
        return OnnxLM(Session(ONNX, files), BASE, adapter, progress)

    from passes.lora import load_adapted

    with_adapter = ADAPTERS / adapter if adapter and name != "base" else None
    return TorchLM(load_adapted(MODELS[name], with_adapter), BASE, batch_size, progress)
