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

from stages.errors import UserError, shortened
from stages.reading import ADAPTER_NAME, CONTROL, Missing, json_object

SUFFIX = ".onnx_adapter"
MANIFEST = "olivepress.json"
# Keys of genai_config.json that name code to be loaded.
LIBRARIES = {"custom_ops_library", "library_path"}


class CannotRunHere(UserError):
    """The model is for an execution provider that cannot load it on this machine."""


def provider(folder: Path) -> str:
    """The execution provider that a model is for, as genai_config.json names it, or cpu."""
    return _provider(read_config(folder))


def _provider(config: dict[str, Any]) -> str:
    options = config["model"]["decoder"]["session_options"]["provider_options"]
    return next((name for option in options for name in option), "cpu")


def read_config(folder: Path) -> dict[str, Any]:
    """A folder's genai_config.json, with all that is read here and nothing that is not data.

    Raises:
        UserError: it is missing or damaged; it names a file out of the folder, or a library, whose
            code would be run.
    """
    path = folder / "genai_config.json"
    try:
        config = json_object(path)
    except Missing:
        raise UserError(f"{folder}: no genai_config.json; expected a model for genai") from None
    for key, value in _entries(config):
        if key in LIBRARIES:
            raise UserError(f"{path}: {key}: a library of its own is never loaded")
        if key == "filename" and not _stays(folder, value):
            raise UserError(f"{path}: {key} {shortened(value)}: no file of the folder")
    try:
        model = config["model"]
        options = model["decoder"]["session_options"]["provider_options"]
        whole = all(isinstance(option, dict) for option in options)
        whole &= isinstance(model["context_length"], int) and model["context_length"] > 0
    except (KeyError, TypeError):
        whole = False
    if not whole:
        raise UserError(f"{path}: not as the exporter writes it: model.context_length or …")
    return config


def _entries(value: Any) -> Iterator[tuple[str, Any]]:
    """Every key with its value, however deep."""
    todo = [value]
    while todo:
        one = todo.pop()
        if isinstance(one, dict):
            yield from one.items()
            todo += one.values()
        elif isinstance(one, list):
            todo += one


def _stays(folder: Path, name: Any) -> bool:
    """Whether a name is that of a file in the folder, or of none."""
    if not isinstance(name, str) or CONTROL.search(name):
        return False
    return (folder / name).resolve().is_relative_to(folder.resolve())


def adapters_of(folder: Path) -> dict[str, Path]:
    """A package's adapters by name.

    Raises:
        UserError: one is a link, or its name could be none in params.yaml.
    """
    found = sorted(folder.glob(f"adapters/*{SUFFIX}"))
    for path in found:
        if not ADAPTER_NAME.fullmatch(path.name.removesuffix(SUFFIX)):
            raise UserError(f"{folder}/adapters: {path.name!r} is no name of an adapter")
        if path.is_symlink() or not path.is_file():
            raise UserError(f"{path}: no plain file")
    return {path.name.removesuffix(SUFFIX): path for path in found}


def prompt_template(folder: Path) -> str:
    """The text that a package's model was taught to answer, with {prompt} once.

    Raises:
        UserError: the folder is not a package, so nothing says what that text is.
    """
    path = folder / MANIFEST
    try:
        template = json_object(path).get("prompt_template")
    except Missing:
        raise UserError(f"{folder}: no {MANIFEST}; expected a package") from None
    if not isinstance(template, str) or template.count("{prompt}") != 1:
        raise UserError(f"{path}: prompt_template must be a text with {{prompt}} once")
    return template


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
        config = read_config(folder)
        adapters = adapters_of(folder) if adapters is None else adapters
        self.folder = folder
        self.adapters = sorted(adapters)
        self.context_length: int = config["model"]["context_length"]
        reading = folder
        try:
            self._model = og.Model(str(folder))
            self._tokenizer = og.Tokenizer(self._model)
            self._adapters = og.Adapters(self._model)
            for name in self.adapters:
                reading = adapters[name]
                self._adapters.load(str(reading), name)
        except Exception as error:  # of the library, whatever C++ threw
            why = str(error).strip()
            if reading == folder and _provider(config) != "cpu":
                raise CannotRunHere(
                    f"{folder} is for {_provider(config)}, and does not load on this machine: {why}"
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
        return prompt_template(self.folder).replace("{prompt}", prompt)

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
