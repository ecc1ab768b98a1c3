"""Bring the base model to models/base: made here, from a hub, from Azure ML or from a folder."""

from __future__ import annotations

import importlib.util
import math
import os
import re
import shutil
from fnmatch import fnmatch
from pathlib import Path

from stages.errors import UserError
from stages.params import Params
from stages.reading import Missing, content, json_object, tensors
from stages.stage import BASE, new_output, progress, remove, run
from stages.tokenizer import explained

# What the later stages read; anything else in a repository or folder is left there.
WANTED = [
    "*.safetensors",
    "*.safetensors.index.json",
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template*",
    "vocab.json",
    "merges.txt",
    "LICENSE*",
]
PICKLES = ["*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl", "*.pickle"]
# Whatever they are called otherwise: what runs code when it is read.
NEVER = [*PICKLES, "*.py", "*.so", "*.dll"]
TOKENIZER_BYTES = 256 << 20  # Gemma 3's has 33 MB
INDEX = "model.safetensors.index.json"
# Where Olive's ModelWrapper looks for the blocks of a decoder (olive/common/hf/wrapper.py, LAYERS).
FIRST_BLOCK = re.compile(r"(model|transformer|gpt_neox|model\.decoder)\.(layers|h)\.0\.")


def main(params: Params) -> None:
    """Write models/base and check that every later stage can work with it.

    Raises:
        UserError: as `check_base`; the folder or repository cannot be had; the disk is too small.
    """
    base = params.base
    with new_output(BASE) as out:
        if base.source == "builtin":
            from stages.builtin import build

            try:
                build(out, Path(base.path), base.seed, progress)
            except UserError as error:
                raise UserError(f"base.path: {error}") from None
            parameters = check_base(out)
        elif base.source == "local":
            parameters = copy(Path(base.path), out)
        elif base.source == "hf":
            from stages.hub import download

            parameters = copy(download(base.id, str(base.revision)), out)
        else:
            from stages import assets

            folder = assets.download(params)
            parameters = check_base(folder)
            folder.rename(out)
            remove(assets.PARTS)
    print(f"{BASE}: {parameters / 1e6:,.1f} million parameters")


def copy(source: Path, out: Path) -> int:
    """Check a folder, copy its wanted files, and return the model's number of parameters.

    Links are followed, as onnx refuses linked files later.

    Raises:
        UserError: not a folder, as `check_base`, or too little space for the copy.
    """
    if not source.is_dir():
        raise UserError(
            f"base.path: {source}: {'not a folder' if source.exists() else 'not found'}"
        )
    parameters = check_base(source)
    names = sorted(path.name for path in source.iterdir() if is_wanted(path.name))
    check_links(source, names)
    check_space(out.parent, sum((source / name).stat().st_size for name in names))
    out.mkdir()
    for done, name in enumerate(names, start=1):
        shutil.copyfile(source / name, out / name)
        progress(done, len(names), name)
    return parameters


def is_wanted(name: str) -> bool:
    """Whether later stages read a file of this name."""
    fits = any(fnmatch(name, pattern) for pattern in WANTED)
    return fits and not any(fnmatch(name, pattern) for pattern in NEVER)


def check_links(folder: Path, names: list[str]) -> None:
    """Raise a UserError for a name that is no file, or a link out of the folder.

    Such a link in a model that a stranger made would bring any file of this machine into the
    package. The links of the hub's cache, from snapshots/COMMIT to blobs, stay in their repository.
    """
    inside = [folder.resolve()]
    if folder.resolve().parent.name == "snapshots":
        inside.append(folder.resolve().parents[1] / "blobs")
    for name in names:
        path = folder / name
        if not path.is_file():
            raise UserError(f"{path}: no plain file")
        target = path.resolve()
        if not any(target.is_relative_to(place) for place in inside):
            raise UserError(f"{path}: a link to {target}, out of the folder; copy the file there")


def check_space(folder: Path, needed: int) -> None:
    """Raise a UserError unless `needed` bytes are free where `folder` is, or will be."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(
            f"{folder.resolve()}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free"
        )


def check_weights(where: str, names: list[str]) -> None:
    """Raise a UserError unless `names` has safetensors: pickles run code when they are read."""
    if any(fnmatch(name, "*.safetensors") for name in names):
        return
    pickles = [name for name in names if any(fnmatch(name, pattern) for pattern in PICKLES)]
    if pickles:
        raise UserError(
            f"{where}: the weights are pickles, which can run code when read: "
            f"{', '.join(pickles[:5])}; only safetensors are taken"
        )
    raise UserError(f"{where}: no weights; expected model.safetensors or its shards")


def check_base(folder: Path) -> int:
    """Check a Hugging Face folder and return its number of parameters.

    Raises:
        UserError: no readable config.json, not a decoder-only model for text, quantized already,
            no weights in whole safetensors files, or no tokenizer.json.
    """
    check_config(folder)
    check_weights(str(folder), sorted(path.name for path in folder.iterdir()))
    parameters = check_tensors(folder)
    check_tokenizer(folder)
    return parameters


def check_tokenizer(folder: Path) -> None:
    """Raise a UserError unless tokenizer.json is one; say it if there is no chat template."""
    from tokenizers import Tokenizer

    path = folder / "tokenizer.json"
    try:
        text = content(path, TOKENIZER_BYTES)
    except Missing:
        raise UserError(f"{folder}: no tokenizer.json, the form of tokenizer needed here") from None
    with explained(f"{path}: no tokenizer"):
        Tokenizer.from_str(text.decode("utf-8"))
    settings = folder / "tokenizer_config.json"
    inside = settings.exists() and "chat_template" in read_object(settings)
    if not inside and not (folder / "chat_template.jinja").exists():
        print(f"{folder}: no chat template; prepare.template must be a text, not `chat`")


def read_object(path: Path) -> dict:
    """Read a JSON object, or raise a UserError that names the file."""
    try:
        return json_object(path)
    except Missing:
        raise UserError(f"{path}: missing; expected a Hugging Face model folder") from None


def check_config(folder: Path) -> None:
    """Raise a UserError that names what a config is, unless it is a float decoder for text."""
    config = read_object(folder / "config.json")
    listed = config.get("architectures")
    names = listed if listed and isinstance(listed, list) else ["no architecture"]
    if config.get("is_encoder_decoder"):
        kind = "an encoder-decoder"
    elif "vision_config" in config or "audio_config" in config:
        kind = "for images or sound"
    elif not str(names[0]).endswith("ForCausalLM"):
        kind = "not a decoder-only language model"
    elif "auto_map" in config and not known_to_transformers(str(config.get("model_type"))):
        kind = "read with Python code of its own, which is never run here"
    elif "quantization_config" in config:
        method = config["quantization_config"]
        method = method.get("quant_method") if isinstance(method, dict) else method
        kind = f"quantized already ({str(method)[:40]})"
    else:
        return
    name = str(names[0])[:80]
    raise UserError(f"{folder}: {name} is {kind}; needed is a decoder-only ...ForCausalLM")


def known_to_transformers(model_type: str) -> bool:
    """Whether the installed transformers has the model's code, without the time of its import."""
    spec = importlib.util.find_spec("transformers")
    folders = (spec.submodule_search_locations if spec else None) or []
    name = model_type.replace("-", "_")
    places = [Path(folder) / "models" / name for folder in folders]
    return name.isidentifier() and any(place.is_dir() for place in places)


def check_tensors(folder: Path) -> int:
    """Check every safetensors file's header and size, and return the number of parameters."""
    shards = {path.name for path in folder.glob("*.safetensors")}
    if (folder / INDEX).exists():
        listed = read_object(folder / INDEX).get("weight_map", {})
        if not isinstance(listed, dict) or not all(isinstance(v, str) for v in listed.values()):
            raise UserError(f"{folder / INDEX}: weight_map is no list of tensors with their files")
        wanted = set(listed.values())
        if wanted - shards:
            raise UserError(f"{folder}: missing shards: {', '.join(sorted(wanted - shards))}")
    names: list[str] = []
    parameters = 0
    for shard in sorted(shards):
        with tensors(folder / shard) as file:
            names += file.keys()
            shapes = [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118
            parameters += sum(math.prod(shape) for shape in shapes)
    if not any(FIRST_BLOCK.match(name) for name in names):
        raise UserError(f"{folder}: no decoder blocks under a name that Olive knows")
    return parameters


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "0")  # base.source hf asks to go online
    run(main, "fetch")
