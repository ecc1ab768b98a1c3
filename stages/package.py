"""Put model, adapters, card, lineage and checksums into one folder that runs with genai alone."""

from __future__ import annotations

import hashlib
import shutil
import time
from pathlib import Path
from typing import Any

import yaml

from stages.card import portable, write_card
from stages.errors import UserError
from stages.fetch import check_space
from stages.params import REMOTE, Params
from stages.stage import (
    ADAPTERS,
    BASE,
    LINEAGE,
    METRICS,
    ONNX,
    PACKAGE,
    new_output,
    progress,
    read_json,
    record,
    run,
    write_json,
)

FORMAT = 1
SUMS = "SHA256SUMS"
BLOCK = 1 << 20
PATHS = {"path", "data", "calibration_data"}  # last parts of the parameters that hold one


def main(params: Params) -> None:
    """Write models/package and try it.

    Raises:
        UserError: no dvc.lock, so that nothing says what the model was made of; too little space;
            the finished package does not run.
    """
    from stages.generation import provider

    started = time.time()
    metrics = {name: read_json(METRICS / f"{name}.json") for name in params.adapters}
    lineage = trace(list(params.adapters))
    sources = files(list(params.adapters))
    check_space(PACKAGE.parent, sum(path.stat().st_size for path in sources.values()))
    with new_output(PACKAGE) as out:
        sums = {}
        for done, (name, path) in enumerate(sorted(sources.items()), start=1):
            sums[name] = copy(path, out / name)
            progress(done, len(sources) + 1, name)
        lineage["package"] = {"record": record("package", started)}
        write_json(out / "olivepress.json", manifest(params, metrics, lineage))
        write_card(out / "README.md", params, metrics, lineage, provider(ONNX))
        write_json(out / "lineage.json", lineage)
        for name in ("olivepress.json", "README.md", "lineage.json"):
            sums[name] = sha256(out / name)
        lines = [f"{digest}  {name}\n" for name, digest in sorted(sums.items())]
        (out / SUMS).write_text("".join(lines), "utf-8")
        check(out)
        progress(len(sources) + 1, len(sources) + 1, "package tried")
    size = sum(path.stat().st_size for path in PACKAGE.rglob("*") if path.is_file())
    print(f"{PACKAGE}: {size / 1e6:,.1f} MB, adapters {', '.join(sorted(params.adapters))}")


def files(adapters: list[str]) -> dict[str, Path]:
    """What is copied: name in the package -> path."""
    found = {path.relative_to(ONNX).as_posix(): path for path in ONNX.rglob("*") if path.is_file()}
    for name in adapters:
        found[f"adapters/{name}.onnx_adapter"] = ADAPTERS / f"{name}.onnx_adapter"
    return found | {path.name: path for path in BASE.glob("LICENSE*")}


def copy(source: Path, target: Path) -> str:
    """Copy a file, reading it once, and return its SHA-256.

    The bytes and never a link: onnx refuses external data that is linked.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    digest = hashlib.sha256()
    with source.open("rb") as reader, target.open("wb") as writer:
        while block := reader.read(BLOCK):
            digest.update(block)
            writer.write(block)
    shutil.copymode(source, target)
    return digest.hexdigest()


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(params: Params, metrics: dict[str, dict], lineage: dict[str, dict]) -> dict:
    """What `stages.generation.Session` and a person need to run the package."""
    base = params.base
    return {
        "format": FORMAT,
        "adapters": {name: f"adapters/{name}.onnx_adapter" for name in params.adapters},
        # All adapters are taught with prepare.template, so any one's will do.
        "prompt_template": next(iter(metrics.values()))["prompt_template"],
        "base": {
            "source": base.source,
            "id": base.id if base.source in REMOTE else portable(base.path),
            "revision": base.revision if base.source in REMOTE else None,
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


def verify(package: Path) -> dict[str, str]:
    """Check each file of a package against its sum; name -> SHA-256, in hex.

    Raises:
        UserError: names of the files that are missing, more, or not what was written.
    """
    lines = (package / SUMS).read_text("utf-8").splitlines()
    wanted = {name: digest for digest, _, name in (line.partition("  ") for line in lines)}
    there = {p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()} - {SUMS}
    bad = {name for name in wanted if name not in there or sha256(package / name) != wanted[name]}
    if bad or there != set(wanted):
        raise UserError(f"not what was written: {', '.join(sorted(bad | (there ^ set(wanted))))}")
    return wanted


def check(package: Path) -> None:
    """Run the model with and without each adapter, if it runs here.

    The sums are not taken again: that would read from memory what was just written. Who takes the
    package away does (`verify`).

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
    run(main, "package")
