"""Put model, adapters, card, lineage and checksums into one folder that runs with genai alone."""

from __future__ import annotations

import hashlib
import importlib.metadata
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import yaml

from stages import bom, foundry, sums, tokenizer
from stages.card import base_of, card, portable
from stages.errors import UserError
from stages.fetch import check_space
from stages.params import Params
from stages.stage import (
    ADAPTERS,
    BASE,
    LINEAGE,
    METRICS,
    ONNX,
    PACKAGE,
    TOOLCHAIN,
    new_output,
    progress,
    read_json,
    record,
    run,
    write_json,
)

FORMAT = 1
CARD, TRACE, MANIFEST = "README.md", "lineage.json", "olivepress.json"
LOCK = Path("requirements.lock")
PATHS = {"path", "data", "calibration_data", "text"}  # last parts of parameters that hold one


def main(params: Params) -> None:
    """Write models/package and try it.

    Raises:
        UserError: no dvc.lock, so that nothing says what the model was made of; too little space;
            the finished package does not run.
    """
    started = time.time()
    metrics = {name: read_json(METRICS / f"{name}.json") for name in params.adapters}
    lineage = trace(list(params.adapters))
    sources = files(list(params.adapters))
    steps = len(sources) + 1
    check_space(PACKAGE.parent, sum(path.stat().st_size for path in sources.values()))
    with new_output(PACKAGE) as out:
        digests = {}
        for done, (name, path) in enumerate(sorted(sources.items()), start=1):
            digests[name] = copy(path, out / name)
            progress(done, steps, name)
        lineage["package"] = {"record": record("package", started)}
        describe(out, manifest(params, metrics, lineage), metrics, lineage, digests)
        check(out)
        progress(steps, steps, "package tried")
    size = sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file())
    print(f"{PACKAGE}: {size / 1e6:,.1f} MB, adapters {', '.join(sorted(params.adapters))}")


def files(adapters: list[str]) -> dict[str, Path]:
    """What is copied: name in the package -> path."""
    found = {path.relative_to(ONNX).as_posix(): path for path in ONNX.rglob("*") if path.is_file()}
    for name in adapters:
        found[f"adapters/{name}.onnx_adapter"] = ADAPTERS / f"{name}.onnx_adapter"
        found[f"metrics/{name}.json"] = METRICS / f"{name}.json"
    return found | {path.name: path for path in BASE.glob("LICENSE*")}


def describe(
    out: Path,
    about: dict[str, Any],
    metrics: dict[str, dict],
    lineage: dict[str, dict],
    digests: dict[str, str],
) -> None:
    """Write what a package says of itself, and the sums: `digests` has those of what was copied."""
    from stages.generation import provider

    write_json(out / MANIFEST, about)
    found = foundry.inference_model(about, provider(ONNX), tokenizer.load(BASE))
    write_json(out / foundry.FILE, found)
    for name in (MANIFEST, foundry.FILE):
        digests[name] = sums.sha256(out / name)
    materials = bom.write(
        about,
        metrics=metrics,
        lineage=lineage,
        sums={name: digest for name, digest in digests.items() if not volatile(name)},
        base=base_files(),
        used=bom.libraries(LOCK.read_text("utf-8"), read_json(TOOLCHAIN)),
    )
    (out / bom.BOM).write_text(materials, "utf-8")
    (out / CARD).write_text(card(about, metrics, lineage, provider(ONNX)), "utf-8")
    write_json(out / TRACE, lineage)
    for name in (bom.BOM, CARD, TRACE):
        digests[name] = sums.sha256(out / name)
    sums.write(out, digests)


def base_files() -> dict[str, dict[str, str]]:
    """Each file of the base model with its digests, by CycloneDX's names of the algorithms."""
    found = {}
    for path in sorted(path for path in BASE.rglob("*") if path.is_file()):
        print(f"{path}: taking its sums", flush=True)
        digest = sums.digest(path)
        name = path.relative_to(BASE).as_posix()
        found[name] = {"MD5": digest.md5, "SHA-256": digest.sha256}
    return found


def volatile(name: str) -> bool:
    """Whether a file of a package says when, where, how fast or with which libraries it was made.

    Two packages that differ in nothing else are the same model.
    """
    return name in (CARD, TRACE, bom.BOM) or name.startswith("metrics/")


def writer() -> str:
    """What the form of card and bill of materials depends on, as 12 hex digits.

    Only by the same can they be written again and compared.
    """
    found = hashlib.sha256(importlib.metadata.version("cyclonedx-python-lib").encode())
    for name in ("bom.py", "card.py"):
        found.update(Path(__file__).with_name(name).read_bytes())
    return found.hexdigest()[:12]


def copy(source: Path, target: Path) -> str:
    """Copy a file, reading it once, and return its SHA-256.

    The bytes and never a link: onnx refuses external data that is linked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(sums.BLOCK):
            digest.update(block)
            writer.write(block)
    shutil.copymode(source, target)
    return digest.hexdigest()


def manifest(params: Params, metrics: dict[str, dict], lineage: dict[str, dict]) -> dict:
    """What `stages.generation.Session` and a person need to run the package."""
    return {
        "format": FORMAT,
        "writer": writer(),
        "adapters": {name: f"adapters/{name}.onnx_adapter" for name in params.adapters},
        "data": {name: portable(adapter.data) for name, adapter in params.adapters.items()},
        # All adapters are taught with prepare.template, so any one's will do.
        "prompt_template": next(iter(metrics.values()))["prompt_template"],
        "base": {
            **base_of(params),
            "content": lineage.get("fetch", {}).get("outs", {}).get(BASE.as_posix()),
        },
    }


def trace(adapters: list[str]) -> dict[str, dict]:
    """For each stage that this package came through: what dvc.lock and its own record say.

    Paths outside the project are cut to their last part: a package may be published.
    """
    lock = Path("dvc.lock")
    if not lock.exists():
        raise UserError(
            "dvc.lock is missing; make the package with `olivepress run` or `dvc repro`"
        )
    lineage = {}
    for name, entry in yaml.safe_load(lock.read_text("utf-8"))["stages"].items():
        _, _, adapter = name.partition("@")
        if name == "package" or (adapter and adapter not in adapters):
            continue  # of the package before this one, or of an adapter that is gone
        written = LINEAGE / f"{name}.json"
        lineage[name] = {
            "cmd": entry["cmd"],
            "deps": hashes(entry.get("deps", [])),
            "params": without_folders(entry.get("params", {}).get("params.yaml", {})),
            "outs": hashes(entry.get("outs", [])),
            "record": read_json(written) if written.exists() else None,
        }
    return lineage


def hashes(entries: list[dict]) -> dict[str, str]:
    return {portable(entry["path"]): f"md5:{entry['md5']}" for entry in entries}


def without_folders(params: dict) -> dict:
    """The parameters with the paths among them made portable."""

    def cut(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return without_folders(value)
        return portable(value) if key.rpartition(".")[2] in PATHS else value

    return {key: cut(key, value) for key, value in params.items()}


def check(package: Path) -> None:
    """Run the model with and without each adapter, if it runs here.

    The sums are not taken again: that would read from memory what was just written. Who takes the
    package away does (`stages.sums`).

    Raises:
        UserError: the model gives no finite scores.
    """
    import numpy as np

    from stages.generation import CannotRunHere, Session

    try:
        session = Session(package)
    except CannotRunHere as error:
        print(f"not tried: {str(error).replace(str(package), str(PACKAGE))}")
        return
    ids = session.encode(session.render("Hello"))
    for adapter in (None, *session.adapters):
        list(session.stream("Hello", adapter, max_new_tokens=1))
        if not np.isfinite(session.logits(ids, adapter)).all():
            raise UserError(f"{PACKAGE}: no finite scores with adapter {adapter}")


if __name__ == "__main__":
    # A chat template needs no torch: without it transformers loads in 2 s of processor time, not 6.
    sys.modules["torch"] = None  # type: ignore[assignment]
    run(main, "package")
