"""Checks before anything heavy starts: versions that clash, memory, disk and GPU for this model."""

from __future__ import annotations

import importlib.metadata
import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.specifiers import SpecifierSet

from stages import params
from stages.errors import UserError
from stages.stage import BASE, ONNX, PACKAGE, QUANTIZED
from tasks import bridge

GB = 1e9
BUILTIN_PARAMETERS = 1_970_000
# Outputs that grow with the model, in bytes a weight: 16 bits, and 4 bits with scales and head.
WEIGHTY = {
    "fetch": (BASE, 2.0),
    "quantize": (QUANTIZED, 0.7),
    "export": (ONNX, 0.7),
    "package": (PACKAGE, 0.7),
}
OTHER_FILES = 0.2 * GB

# Each was seen to break otherwise: what is needed, and what happens. docs/versions.md has the runs.
CLASHES = {
    "fastapi": ("<0.151", "prefect 3.8's server fails to start from 0.155"),
    "onnxruntime-genai": ("<0.15", "0.15 moved a module that olive-ai 0.13 imports"),
}
# Those that passed; others may, but nobody tried.
TRIED = {
    "olive-ai": ["==0.13.*"],
    "onnxruntime-genai": ["==0.14.*"],
    "transformers": ["==5.10.*", "==5.23.*", "==5.24.*"],
    "torch": ["==2.13.*"],
    "prefect": ["==3.8.*", "==3.9.*"],
    "dvc": ["==3.67.*"],
}


@dataclass(frozen=True)
class Check:
    """One line of `olivepress doctor`."""

    name: str
    verdict: Literal["ok", "warning", "problem"]
    message: str


def check_or_raise(root: Path) -> None:
    """Stop a run before it starts when something is sure to fail.

    Raises:
        UserError: every problem, one a line.
    """
    problems = [check.message for check in check(root) if check.verdict == "problem"]
    if problems:
        raise UserError("\n".join(problems))


def check(root: Path, ask_hub: bool = False) -> list[Check]:
    """All checks. `ask_hub` allows one call to the hub for the size of a model not yet here."""
    values = params.load(root / "params.yaml")
    size = parameters(root, values.base, ask_hub)
    return [
        *_versions(),
        _model(values, size),
        _memory(size),
        _disk(root, values.base, size),
        _gpu(values),
    ]


def _versions() -> Iterator[Check]:
    if sys.version_info[:2] != (3, 11):
        yield Check("python", "problem", f"Python 3.11 is needed, this is {sys.version.split()[0]}")
    for name in dict.fromkeys([*CLASHES, *TRIED]):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Check(name, "problem", f"{name} is not installed; run make install")
            continue
        needed, why = CLASHES.get(name, ("", ""))
        if not _fits(version, needed):
            message = f"{name} {version} is installed, {needed} is needed: {why}; run make install"
            yield Check(name, "problem", message)
        elif not any(_fits(version, one) for one in TRIED.get(name, [""])):
            message = f"{name} {version} is installed, and {' and '.join(TRIED[name])} was tried"
            yield Check(name, "warning", f"{message}; make install brings it back")
        else:
            yield Check(name, "ok", version)


def _fits(version: str, needed: str) -> bool:
    return SpecifierSet(needed).contains(version.partition("+")[0], prereleases=True)


def parameters(root: Path, base: params.Base, ask_hub: bool = False) -> int | None:
    """Number of weights of the base model, None when it cannot be known without a download."""
    if base.source == "builtin":
        return BUILTIN_PARAMETERS
    folder = root / (base.path if base.source == "local" else "models/base")
    if counted := sum(_weights(file) for file in folder.glob("*.safetensors")):
        return counted
    if base.source == "hf" and ask_hub:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError

        try:
            info = HfApi().model_info(base.id, revision=base.revision, timeout=10)
            return info.safetensors.total if info.safetensors else None
        except (HfHubHTTPError, OSError):
            return None
    return None


def _weights(file: Path) -> int:
    """Elements in a safetensors file, from its header (8 bytes of length, then JSON)."""
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(min(length, 100_000_000)))
    except (OSError, ValueError, struct.error):
        return 0
    header.pop("__metadata__", None)
    total = 0
    for tensor in header.values():
        count = 1
        for extent in tensor["shape"]:
            count *= extent
        total += count
    return total


def _model(values: params.Params, size: int | None) -> Check:
    base = values.base
    name = base.id if base.source in params.REMOTE else base.path
    if base.source == "builtin":
        name = "built-in"
    if size is None:
        return Check("model", "warning", f"{name}: size unknown until it is here")
    return Check("model", "ok", f"{name}: {size / 1e6:,.0f} M parameters")


def _memory(size: int | None) -> Check:
    import psutil

    total = psutil.virtual_memory().total
    if size is None:
        return Check("memory", "ok", f"{total / GB:.0f} GB")
    need = memory_needed(size)
    text = f"{total / GB:.0f} GB, about {need / GB:.1f} GB needed"
    if total < need:
        return Check("memory", "warning", f"{text}: it will swap or be killed")
    return Check("memory", "ok", text)


def memory_needed(size: int) -> float:
    """Bytes for a model of `size` weights.

    evaluate holds the base in float32, 4 bytes a weight; libraries take about 1.5 GB.
    """
    return 4 * size + 1.5 * GB


def disk_needed(base: params.Base, size: int) -> float:
    """Bytes for a run from scratch: all here, and in DVC's cache."""
    hub = WEIGHTY["fetch"][1] if base.source == "hf" else 0
    return OTHER_FILES + size * (2 * sum(each for _, each in WEIGHTY.values()) + hub)


def _disk(root: Path, base: params.Base, size: int | None) -> Check:
    free = shutil.disk_usage(root).free
    most = disk_needed(base, size or 0)
    if free >= most:  # true almost always, and then nobody has to ask DVC
        return Check(
            "disk", "ok", f"{free / GB:.1f} GB free, {most / GB:.1f} GB needed from scratch"
        )
    need = _disk_now(root, base, size or 0)
    text = f"{free / GB:.1f} GB free, about {need / GB:.1f} GB needed"
    if free < need:
        return Check("disk", "problem", f"disk: {text} in {root}")
    return Check("disk", "ok", text)


def _disk_now(root: Path, base: params.Base, size: int) -> float:
    """Bytes that a run would need now, by what DVC says of each stage."""
    stale = {name: need for name, need in bridge.status(root).items() if need.action != "unchanged"}
    total = OTHER_FILES if stale else 0
    for name, (path, each) in WEIGHTY.items():
        if name in stale:
            copies = 1 if stale[name].action == "restore" else 2  # here, and in DVC's cache
            copies -= (root / path).exists()  # the old one makes room
            total += copies * each * size
    if "fetch" in stale and stale["fetch"].action == "run" and _downloads_here(root, base):
        total += WEIGHTY["fetch"][1] * size
    return total


def _downloads_here(root: Path, base: params.Base) -> bool:
    """Whether fetch will put a copy in the hub's cache, and on the same disk."""
    if base.source != "hf":
        return False
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    name = f"models--{base.id.replace('/', '--')}"
    if (cache / name / "snapshots" / str(base.revision)).exists():
        return False
    while not cache.exists():
        cache = cache.parent
    return cache.stat().st_dev == root.stat().st_dev


def _gpu(values: params.Params) -> Check:
    found = None
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"]
        found = subprocess.run(query, capture_output=True, text=True, check=False).stdout.strip()
    if found:
        return Check("gpu", "ok", found.splitlines()[0])
    if values.export.device == "gpu":
        message = f"no GPU here: the {values.export.provider} model cannot be measured on it"
        return Check("gpu", "warning", message)
    return Check("gpu", "ok", "none, and none needed")


def report(root: Path) -> list[Check]:
    """`check` for a person: a mistake in params.yaml is a line of it, not the end of it."""
    try:
        return check(root, ask_hub=True)
    except UserError as error:
        return [*_versions(), Check("params", "problem", str(error))]
