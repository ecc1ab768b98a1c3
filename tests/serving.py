"""A tiny package with two adapters, and a server for it: as a process, or in this one and slow."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import httpx
import torch
from safetensors.torch import load_file, save_file

from conftest import BIN
from serve import Settings
from serve.engine import Engine
from serve.server import KEY, configured, listen
from stages import convert

if TYPE_CHECKING:
    from exported import Lab

HELLO: dict[str, Any] = {
    "model": "base",
    "temperature": 0,
    "messages": [{"role": "user", "content": "Hello"}],
}
TEMPLATE = "<|user|>{prompt}<|end|><|assistant|>"


def make_package(lab: Lab, folder: Path) -> Path:
    """What `package` would write, as far as it is served."""
    shutil.copytree(lab.onnx, folder)
    (folder / "adapters").mkdir()
    shutil.copy(lab.converted, folder / "adapters/one.onnx_adapter")
    another_adapter(lab, folder / "adapters/two.onnx_adapter", seed=11)
    (folder / "olivepress.json").write_text(json.dumps({"prompt_template": TEMPLATE}))
    (folder / "README.md").write_text("# The card\n")
    (folder / "lineage.json").write_text('{"export": {"cmd": "python -m stages.export"}}')
    return folder


def another_adapter(lab: Lab, out: Path, seed: int) -> Path:
    """An adapter for the same model with other weights."""
    trained = out.parent / f".{out.stem}"
    shutil.copytree(lab.adapter, trained)
    path = trained / "adapter_model.safetensors"
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        key: 0.2 * torch.randn(value.shape, generator=generator)
        for key, value in sorted(load_file(path).items())
    }
    save_file(tensors, path, {"format": "pt"})
    convert.convert(trained, lab.onnx, out)
    shutil.rmtree(trained)
    return out


@contextlib.contextmanager
def served(folder: Path, *options: str, **env: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """`olivepress serve` on a free port: its address and its process."""
    command = [BIN / "olivepress", "serve", folder, "--port", "0", "--json", *options]
    process = subprocess.Popen(
        [str(word) for word in command], text=True, env={**os.environ, **env},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout and process.stderr
    try:
        said = ""
        for line in process.stdout:
            said += line
            if line == "}\n":
                break
        else:
            raise AssertionError(process.stderr.read())
        yield json.loads(said)["url"], process
    finally:
        process.terminate()
        process.communicate(timeout=60)


@contextlib.contextmanager
def slow(folder: Path, seconds: float, **settings: int) -> Iterator[tuple[str, Engine]]:
    """A server in this process whose model takes so long for a step that there is time to act."""
    engine = Engine(folder, Settings(**settings))
    step = engine.batch.step

    def slowly(*args: Any) -> Any:
        time.sleep(seconds)
        return step(*args)

    started = threading.Event()
    bound = listen("127.0.0.1", 0)
    url = f"http://127.0.0.1:{bound.getsockname()[1]}"
    with mock.patch.object(engine.batch, "step", slowly), mock.patch.dict(os.environ):
        os.environ.pop(KEY, None)
        server = configured(engine, bound, started.set)
        thread = threading.Thread(target=server.run, args=([bound],))
        thread.start()
        try:
            assert started.wait(30)
            yield url, engine
        finally:
            server.should_exit = True
            thread.join()


def ask(url: str, **body: Any) -> httpx.Response:
    """A question to the base model, unless the body says other things."""
    whole = HELLO | {"max_tokens": 8} | body
    return httpx.post(f"{url}/v1/chat/completions", json=whole, timeout=60)


def text_of(response: httpx.Response, choice: int = 0) -> str:
    assert response.status_code == 200, response.text
    return response.json()["choices"][choice]["message"]["content"]


def eventually(what: Any, seconds: float = 10) -> None:
    """Wait until something is so."""
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "it never came to be so"
        time.sleep(0.02)


def refusal(response: httpx.Response, status: int) -> dict[str, Any]:
    """The error of a response, in the API's shape and nothing else."""
    assert response.status_code == status, response.text
    assert response.json().keys() == {"error"}
    error = response.json()["error"]
    assert error.keys() == {"message", "type", "param", "code"}
    return error
