"""A base model from Azure ML: resumable, in bounded memory, verified."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from stages import azure, blobs
from stages.errors import UserError
from stages.fetch import check_space, check_weights, is_wanted
from stages.params import ASSET, Params
from stages.stage import BASE, remove

# Not a temporary of the stage, which the next try would clear: what a killed download left is
# gone on with.
PARTS = BASE.parent / ".base.download"


def download(params: Params) -> Path:
    """Download the files of a registered model that later stages read; the folder they are in.

    `base.id` names a model by version, which Azure ML keeps as it is. With `base.revision` the
    content must have that digest; without, the digest is printed, to be put there.

    Raises:
        UserError: as `stages.azure.connect`; no such model or version; no weights in it; too little
            space; other content than `base.revision` says.
    """
    base = params.base
    place, name, version = reference(base.id)
    client = azure.connect(place)
    what = f"base.id: {name} version {version} in {place}"
    with azure.explained(what):
        model = client.models.get(name, version)
        prefix = azure.model_files(client, model)[1]
        store = blobs.Store(lambda: azure.model_files(client, model)[0], what)
    sizes = {file: blob.size for file, blob in store.listed(prefix).items()}
    inner = model_folder(what, sizes)
    names = [file for file in wanted(sizes) if str(PurePosixPath(file).parent) == inner]
    folder = PARTS / hashlib.sha256(f"{place} {name} {version}".encode()).hexdigest()[:16]
    for other in PARTS.glob("*"):
        if other != folder:
            remove(other)
    there = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    total = sum(sizes[file] for file in names)
    check_space(folder, total - there)
    blobs.download(store, prefix, names, folder, blobs.shown(total))
    found = folder / inner
    for left in found.glob("*.part"):  # of another state of a blob
        remove(left)
    digest = content(found)
    if base.revision and base.revision != digest:
        remove(folder)
        raise UserError(f"{what}: its content is {digest}, and base.revision says {base.revision}")
    if not base.revision:
        print(f"{what}: content {digest}; set base.revision to it, to be sure of the same tomorrow")
    return found


def reference(text: str) -> tuple[azure.Place, str, str]:
    """Where, name and version of a model, from an address that `stages.params.ASSET` matches."""
    found = ASSET.fullmatch(text)
    parts = found.groupdict() if found else {}
    name, version = str(parts.pop("name")), str(parts.pop("version"))
    return azure.Place(**parts), name, version


def wanted(names: Iterable[str]) -> list[str]:
    """Those that later stages read, in whatever folder they are."""
    return sorted(name for name in names if is_wanted(PurePosixPath(name).name))


def model_folder(what: str, names: Iterable[str]) -> str:
    """The folder among the files of a model that has config.json and weights; `.` for the top.

    Models of Azure's own registry keep theirs in a folder of an MLflow model.
    """
    names = list(names)
    configs = [PurePosixPath(name).parent for name in names if name.split("/")[-1] == "config.json"]
    for folder in sorted(configs, key=lambda folder: (len(folder.parts), folder)):
        beside = [name for name in names if PurePosixPath(name).parent == folder]
        if any(name.endswith(".safetensors") for name in beside):
            return str(folder)
    check_weights(what, [PurePosixPath(name).name for name in names])
    raise UserError(f"{what}: no folder in it has both config.json and weights")


def content(folder: Path) -> str:
    """SHA-256 over the names and sums of the files of a folder, in hex."""
    lines = []
    for path in sorted(folder.iterdir()):
        with path.open("rb") as file:
            lines.append(f"{hashlib.file_digest(file, 'sha256').hexdigest()}  {path.name}\n")
    return hashlib.sha256("".join(lines).encode()).hexdigest()
