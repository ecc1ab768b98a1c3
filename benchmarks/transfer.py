"""What it costs to register and fetch a large model: these transfers against azure-ai-ml's own.

    python benchmarks/transfer.py [--megabytes 1000]

Against the emulator of Azure on loopback that the tests use (make .azurite), so times say nothing
about a network; peak memory does not depend on it. The table goes to standard output.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPO))

WAYS = {
    ("upload", "azure-ai-ml"): "models.create_or_update(Model(path=FOLDER))",
    ("upload", "Olivepress"): "stages.blobs.upload, then models.create_or_update",
    ("download", "azure-ai-ml"): "models.download",
    ("download", "Olivepress"): "stages.blobs.download",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("--one", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        return one(*given.one)
    with tempfile.TemporaryDirectory() as home:
        table(Path(home), given.megabytes)


def table(home: Path, megabytes: int) -> None:
    """Run each way in a process of its own and print what it took."""
    from tests.emulator.client import Azure

    source = home / "source"
    source.mkdir()
    with (source / "model.onnx.data").open("wb") as file:
        for _ in range(megabytes):
            file.write(os.urandom(1_000_000))
    with Azure(home / "azure") as azure:
        idle = measure(azure.env, "idle", "", source)[1]
        print(f"{megabytes} MB in one file; after the imports: {idle:.0f} MB of memory\n")
        print("| | | peak memory over that | seconds |\n|---|---|---:|---:|")
        for (verb, who), what in WAYS.items():
            seconds, peak = measure(azure.env, verb, who, source)
            print(f"| {verb} | {who}: `{what}` | {peak - idle:,.0f} MB | {seconds:.1f} |")


def measure(env: dict[str, str], verb: str, who: str, source: Path) -> tuple[float, float]:
    """Seconds of one way, without imports, and peak resident memory of its process in MB."""
    done = subprocess.run(
        [sys.executable, __file__, "--one", verb, who, str(source)],
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        check=True,
    )
    seconds, peak = done.stdout.split()[-2:]
    return float(seconds), float(peak)


def one(verb: str, who: str, source: str) -> None:
    """One way, in this process."""
    from stages import azure, blobs

    ml = azure.connect(azure.find_place({}, {}))
    store = blobs.Store(lambda: azure.store_container(ml), "workspace")
    started = time.perf_counter()
    if who:
        act(verb, who == "Olivepress", ml, store, Path(source))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000
    print(time.perf_counter() - started, peak)


def act(verb: str, ours: bool, ml: Any, store: Any, source: Path) -> None:
    from azure.ai.ml.entities import Model

    from stages import blobs

    name = "ours" if ours else "theirs"
    files = {path.name: path for path in source.iterdir()}
    if verb == "upload":
        path = str(source)
        if ours:
            blobs.upload(store, "p/", files, lambda more: None)
            path = "azureml://datastores/workspaceblobstore/paths/p"
        ml.models.create_or_update(Model(name=name, version="1", path=path, type="custom_model"))
        return
    with tempfile.TemporaryDirectory() as out:
        if ours:
            blobs.download(store, "p/", list(files), Path(out), lambda more: None)
        else:
            ml.models.download(name, "1", download_path=out)
        (got,) = Path(out).rglob("model.onnx.data")
        assert got.stat().st_size == files["model.onnx.data"].stat().st_size


if __name__ == "__main__":
    main()
