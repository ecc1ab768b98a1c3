"""Text from an exported model, with or without one of its adapters.

Needs onnxruntime-genai and numpy only, so that a package runs where nothing else is installed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as og

from stages.errors import UserError

SUFFIX = ".onnx_adapter"
MANIFEST = "olivepress.json"


class CannotRunHere(UserError):
    """The model is for an execution provider that cannot load it on this machine."""


def provider(folder: Path) -> str:
    """The execution provider that a model is for, as genai_config.json names it, or cpu."""
    config = json.loads((folder / "genai_config.json").read_text("utf-8"))
    options = config["model"]["decoder"]["session_options"]["provider_options"]
    return next((name for option in options for name in option), "cpu")


def adapters_of(folder: Path) -> dict[str, Path]:
    """A package's adapters by name."""
    return {p.name.removesuffix(SUFFIX): p for p in folder.glob(f"adapters/*{SUFFIX}")}


class Session:
    """An ONNX model for onnxruntime-genai with its tokenizer and LoRA adapters.

    Args:
        folder: a package, or any folder with genai_config.json.
        adapters: files by name; left out, those in `folder`/adapters.

    Raises:
        CannotRunHere: the model is not for the CPU, and what it is for is not here.
        UserError: there is no model in the folder, or it or an adapter cannot be read.
    """

    def __init__(self, folder: Path, adapters: Mapping[str, Path] | None = None) -> None:
        if not (folder / "genai_config.json").is_file():
            raise UserError(f"{folder}: no genai_config.json; expected a model for genai")
        adapters = adapters_of(folder) if adapters is None else adapters
        self.folder = folder
        self.adapters = sorted(adapters)
        config = json.loads((folder / "genai_config.json").read_text("utf-8"))["model"]
        self.context_length: int = config["context_length"]
        reading = folder
        try:
            self._model = og.Model(str(folder))
            self._tokenizer = og.Tokenizer(self._model)
            self._adapters = og.Adapters(self._model)
            for name in self.adapters:
                reading = adapters[name]
                self._adapters.load(str(reading), name)
        except RuntimeError as error:
            why = str(error).strip()
            if reading == folder and provider(folder) != "cpu":
                raise CannotRunHere(
                    f"{folder} is for {provider(folder)}, and does not load on this machine: {why}"
                ) from None
            raise UserError(f"{reading}: cannot be loaded: {why}") from None

    def encode(self, text: str) -> list[int]:
        """Token ids; special tokens such as <|user|> are read in `text` and none is added."""
        return [int(token) for token in self._tokenizer.encode(text)]

    def render(self, prompt: str) -> str:
        """Put a question into the text that the model was taught to answer.

        Raises:
            UserError: the folder is not a package, so nothing says what that text is.
        """
        manifest = self.folder / MANIFEST
        if not manifest.exists():
            raise UserError(f"{self.folder}: no {MANIFEST}; expected a package")
        template = json.loads(manifest.read_text("utf-8"))["prompt_template"]
        return template.replace("{prompt}", prompt)

    def stream(
        self, prompt: str, adapter: str | None = None, max_new_tokens: int = 256
    ) -> Iterator[str]:
        """Yield the answer to a question piece by piece; see `stream_text`."""
        return self.stream_text(self.render(prompt), adapter, max_new_tokens)

    def stream_text(
        self, text: str, adapter: str | None = None, max_new_tokens: int = 256
    ) -> Iterator[str]:
        """Yield what follows `text` piece by piece, up to and without a stop token.

        Each token is the likeliest one.

        Args:
            adapter: one of `self.adapters`, or None for the base model.

        Raises:
            UserError: no such adapter, or no room for an answer in the context.
        """
        pieces = self._tokenizer.create_stream()
        for token in self.tokens(self.encode(text), adapter, max_new_tokens):
            if piece := pieces.decode(token):
                yield piece

    def tokens(self, ids: list[int], adapter: str | None, max_new_tokens: int) -> Iterator[int]:
        """Yield the likeliest tokens after `ids`, up to and without a stop token.

        Raises:
            UserError: as `stream_text`.
        """
        generator = self._generator(ids, adapter, max_new_tokens)
        stops = {int(token) for token in self._tokenizer.eos_token_ids}
        while not generator.is_done():
            generator.generate_next_token()
            token = int(generator.get_next_tokens()[0])
            if token in stops:
                return
            yield token

    def logits(self, ids: list[int], adapter: str | None = None) -> np.ndarray:
        """Scores of the next token after each token: float32 (len(ids), vocabulary)."""
        generator = self._generator(ids, adapter, 0)
        return np.asarray(generator.get_output("logits")[0], np.float32)

    def _generator(
        self, ids: list[int], adapter: str | None, max_new_tokens: int, **options: Any
    ) -> og.Generator:
        if adapter is not None and adapter not in self.adapters:
            known = ", ".join(self.adapters) or "none"
            raise UserError(f"{self.folder}: no adapter {adapter}; it has {known}")
        if len(ids) + min(max_new_tokens, 1) > self.context_length:
            raise UserError(
                f"the prompt has {len(ids)} tokens and the model takes {self.context_length}, "
                "with the answer; shorten it"
            )
        length = min(len(ids) + max_new_tokens, self.context_length)
        parameters = og.GeneratorParams(self._model)
        # genai_config.json may ask for sampling, as the base model's own configuration did.
        parameters.set_search_options(max_length=length, do_sample=False, **options)
        generator = og.Generator(self._model, parameters)
        if adapter is not None:
            generator.set_active_adapter(self._adapters, adapter)
        generator.append_tokens(np.asarray(ids, np.int32))
        return generator

    def speed(self, text: str, adapter: str | None, tokens: int) -> dict[str, float]:
        """Time `tokens` tokens after `text`, stop tokens not heeded; the median of three tries.

        Returns:
            time_to_first_token_ms, with the reading of the prompt; tokens_per_second after that.
        """
        ids = self.encode(text)
        tokens = max(1, min(tokens, self.context_length - len(ids)))
        tries = []
        for _ in range(4):  # the first warms up and is not counted
            started = time.perf_counter()
            generator = self._generator(ids, adapter, tokens, min_length=len(ids) + tokens)
            generator.generate_next_token()
            first = time.perf_counter()
            for _ in range(tokens - 1):
                generator.generate_next_token()
            rate = (tokens - 1) / (time.perf_counter() - first)
            tries.append((1000 * (first - started), rate))
        milliseconds, rates = zip(*tries[1:], strict=True)
        return {
            "time_to_first_token_ms": round(statistics.median(milliseconds), 2),
            "tokens_per_second": round(statistics.median(rates), 1),
        }


def peak_rss_mb() -> float:
    """Most memory this process has held, in MB of 10^6 bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # getrusage would count what the parent held before it started this one
        fields = dict(line.split(":", 1) for line in status.read_text().splitlines())
        return int(fields["VmHWM"].split()[0]) * 1024 / 1e6
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def main() -> None:
    """Print one JSON object of speed and memory, measured in a process that does nothing else.

    The prompt is read from standard input. Where the model is for another machine, the object says
    why it was `not_measured`.
    """
    parser = argparse.ArgumentParser(prog="python -m stages.generation")
    parser.add_argument("folder", type=Path)
    parser.add_argument("adapter", type=Path)
    parser.add_argument("tokens", type=int)
    args = parser.parse_args()
    text = sys.stdin.buffer.read().decode()
    try:
        started = time.perf_counter()
        session = Session(args.folder, {"adapter": args.adapter})
        figures: dict[str, Any] = {"load_seconds": round(time.perf_counter() - started, 3)}
        figures["adapter_off"] = session.speed(text, None, args.tokens)
        figures["adapter_on"] = session.speed(text, "adapter", args.tokens)
        figures["peak_rss_mb"] = round(peak_rss_mb(), 1)
    except CannotRunHere as error:
        figures = {"not_measured": str(error)}
    except UserError as error:
        sys.exit(str(error))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
