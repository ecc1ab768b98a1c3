"""The readers, with input like what each should get, and what must be true of what it returns."""

from __future__ import annotations

import contextlib
import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import yaml
from hypothesis import strategies as st
from hypothesis.strategies import SearchStrategy

from stages import assets, azure, blobs, bom, convert, fetch, generation, hub, params, rows, sums
from stages import template as chat_templates
from stages import tokenizer as tokenizers
from stages.errors import UserError
from tasks import lineage, origin, overrides, run_cache, store
from tasks.publish.folder import Folder
from tasks.sweep import spec
from tasks.sweep.search import Search
from tests.fuzz import inputs, package
from tests.fuzz.inputs import json_like, safetensors, safetensors_like, spoilt, warped
from tests.models import CHAT_TEMPLATE, save_tokenizer

REPO = Path(__file__).resolve().parents[2]
PARAMS = (REPO / "params.yaml").read_bytes()


@dataclass(frozen=True)
class Target:
    """A reader.

    Args:
        cases: what it is given.
        prepare: makes the folder that it works in, once.
        read: reads a case in that folder; it returns only what is sound, and asserts so.
        names: of which an error must name one; empty if it names the part of its own input.
        share: of all cases, against 1 for others.
    """

    cases: SearchStrategy[Any]
    prepare: Callable[[Path], Any]
    read: Callable[[Path, Any], object]
    names: tuple[str, ...] = ()
    share: float = 1.0
    extremes: bool = True
    """Whether a case is the bytes of a file, which `inputs.EXTREMES` may be as well."""


def write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


def nothing(folder: Path) -> None:
    """Nothing to prepare."""


# Rows.


ROW = b'{"prompt": "What is it?", "response": "A test \\u00e9\\ud83d\\ude00.", "id": 7}\n'


def read_rows(folder: Path, data: bytes) -> None:
    for row in rows.read_rows(write(folder / "rows.jsonl", data)):
        assert row.prompt.strip() and row.response.strip() and row.line > 0
        (row.prompt + row.response).encode()


def read_calibration(folder: Path, data: bytes) -> None:
    path = write(folder / "rows.jsonl", data)
    for text in rows.read_calibration(path, _tokenizer(folder)):
        text.encode()


_loaded: dict[Path, Any] = {}


def _tokenizer(folder: Path) -> Any:
    if folder not in _loaded:
        _loaded[folder] = save_tokenizer(folder / "tokenizer")
    return _loaded[folder]


# params.yaml, its changes, sweep.yaml.


def as_yaml(value: Any) -> bytes:
    return yaml.safe_dump(value, sort_keys=False).encode("utf-8", "surrogatepass")


def read_params(folder: Path, data: bytes) -> None:
    found = params.load(write(folder / "params.yaml", data))
    for name, adapter in found.adapters.items():
        assert Path("models/adapters", name).parent == Path("models/adapters") and name != ".."
        assert "://" not in adapter.data and "\0" not in adapter.data


def change_params(folder: Path, case: tuple[str, str] | dict[str, Any]) -> None:
    path = write(folder / "params.yaml", PARAMS)
    try:
        given = case if isinstance(case, dict) else overrides.parse(["=".join(case)])
        overrides.apply(folder, given)
    except UserError:
        assert path.read_bytes() == PARAMS
        raise
    params.load(path)


KEYS = ["quantize.bits", "adapters.x.data", "base.path", "finetune.target_modules", "gates", "run"]
WRITTEN = st.sampled_from(inputs.BITS).map(lambda bits: bits.decode("latin-1"))
changes = st.tuples(st.sampled_from(KEYS) | inputs.texts, inputs.texts | WRITTEN) | st.dictionaries(
    st.sampled_from(KEYS) | inputs.texts, inputs.values, max_size=3
)

SWEEP = {
    "name": "tries",
    "sampler": "random",
    "trials": 3,
    "space": {
        "quantize.algorithm": ["awq", "rtn"],
        "finetune.learning_rate": {"low": 1e-4, "high": 1e-2, "log": True},
        "finetune.r": {"low": 4, "high": 16, "step": 4},
    },
    "objectives": {"perplexity": "minimize"},
    "limits": ["size_mb <= 2500"],
}


def read_sweep(folder: Path, data: bytes) -> None:
    found = spec.load(write(folder / "sweep.yaml", data))
    assert 1 <= found.size <= spec.MOST
    Search(found).ask()


# Adapters.


MODULE = "model.layers.0.self_attn.qkv_proj"
CONTRACT: dict[str, Any] = {
    "dtype": "float32",
    "inputs": [
        {
            "A": "a",
            "B": "b",
            "in_features": 4,
            "out_features": 6,
            "sources": [{"module": MODULE, "rows": [0, 6], "columns": [0, 6]}],
        }
    ],
    "folds": "folds/scales.safetensors",
}
LORA = {
    "peft_type": "LORA",
    "r": 2,
    "lora_alpha": 4,
    "alpha_pattern": {"qkv_proj": 8},
    "use_rslora": False,
    "bias": "none",
    "base_model_name_or_path": "other",
}
TENSORS = {
    f"base_model.model.{MODULE}.lora_A.weight": {
        "dtype": "F32",
        "shape": [2, 4],
        "data_offsets": [0, 32],
    },
    f"base_model.model.{MODULE}.lora_B.weight": {
        "dtype": "F32",
        "shape": [6, 2],
        "data_offsets": [32, 80],
    },
}
NUMBERS = np.arange(20, dtype=np.float32).tobytes()
SCALES = {f"{MODULE}.s_in": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
# Path -> a good file.
ADAPTER = {
    "mine/adapter_config.json": json.dumps(LORA).encode(),
    "mine/adapter_model.safetensors": safetensors(TENSORS, NUMBERS),
    "onnx/adapter_inputs.json": json.dumps(CONTRACT).encode(),
    "onnx/folds/scales.safetensors": safetensors(SCALES, NUMBERS[:16]),
}


def read_adapter(name: str) -> Callable[[Path, bytes], None]:
    """A reader of an adapter and its model in which one file is the case."""

    def read(folder: Path, data: bytes) -> None:
        for path, good in ADAPTER.items():
            if path == name or not (folder / path).exists():
                write(folder / path, data if path == name else good)
        for value in convert.weights(folder / "mine", folder / "onnx").values():
            assert value.ndim == 2 and np.isfinite(value).all()

    return read


# Packages.


GENAI = {
    "model": {
        "bos_token_id": 1,
        "context_length": 128,
        "type": "phi3",
        "decoder": {
            "filename": "model.onnx",
            "session_options": {"log_id": "x", "provider_options": [{"cuda": {}}]},
        },
    },
    "search": {"do_sample": False},
}
HARMFUL = st.sampled_from(["custom_ops_library", "filename", "library_path"])


@st.composite
def genai_configs(draw: st.DrawFn) -> bytes:
    """With a file or a library of somebody's anywhere in it."""
    value = draw(warped(GENAI))
    parts = [value] if isinstance(value, dict) else []
    parts += [part for part in (value.get("model"),) if isinstance(part, dict)] if parts else []
    if parts:
        draw(st.sampled_from(parts))[draw(HARMFUL)] = draw(inputs.texts)
    return inputs.as_json(value)


def read_genai_config(folder: Path, data: bytes) -> None:
    write(folder / "genai_config.json", data)
    config = generation.read_config(folder)
    generation.provider(folder)
    text = json.dumps(config)
    assert "custom_ops_library" not in text and "library_path" not in text
    assert config["model"]["context_length"] > 0


def read_manifest(folder: Path, data: bytes) -> None:
    write(folder / "olivepress.json", data)
    assert "{prompt}" in generation.prompt_template(folder)


SUMS = b"".join(
    f"{word * 64}  {name}\n".encode() for word, name in (("a", "x"), ("b", "adapters/y"))
)


def read_sums(folder: Path, data: bytes) -> None:
    write(folder / "SHA256SUMS", data)
    write(folder / "x", b"")
    sums.verify(folder)


PACKAGE = package.make(GENAI)


def write_package(folder: Path, **files: bytes) -> None:
    """A package with some files of another content, and the sums of what is there."""
    for name, data in (PACKAGE | files).items():
        write(folder / name, data)
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    digests = {name: sums.sha256(folder / name) for name in names if name != sums.SUMS}
    sums.write(folder, digests)


def prepare_package(folder: Path) -> None:
    write_package(folder)
    assert not [one for one in origin.verify_package(folder) if one.verdict == "failed"]


def read_package(name: str) -> Callable[[Path, bytes], None]:
    """`olivepress verify` of a package in which one file is the case, and the sums are right."""

    def read(folder: Path, data: bytes) -> None:
        if name == bom.BOM:  # with its own serial number, so that it is compared
            with contextlib.suppress(ValueError, TypeError, AttributeError, RecursionError):
                data = bom.numbered(json.loads(data)).encode()
        write_package(folder, **{name: data})
        for finding in origin.verify_package(folder):
            assert finding.message.strip() and finding.message.isprintable(), finding
            assert (finding.path or "").isprintable(), finding

    return read


def adapter_names(folder: Path, name: str) -> None:
    path = folder / "adapters" / f"{name}.onnx_adapter"
    with contextlib.suppress(OSError, ValueError):  # what no file can be called
        path.parent.mkdir(exist_ok=True)
        path.touch()
        made = [one for one in path.parent.iterdir() if one.name == path.name]
        try:
            for found in generation.adapters_of(folder):
                assert params.ADAPTER_NAME.fullmatch(found)
        finally:
            for one in made:
                one.unlink()


# Base models.


CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
    "max_position_embeddings": 128,
}
WEIGHTS = {
    "model.layers.0.x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]},
    "__metadata__": {"format": "pt"},
}
BASE = {
    "config.json": json.dumps(CONFIG).encode(),
    "model.safetensors": safetensors(WEIGHTS, NUMBERS[:16]),
    "model.safetensors.index.json": b'{"weight_map": {"model.layers.0.x": "model.safetensors"}}',
}


def prepare_base(folder: Path) -> None:
    save_tokenizer(folder)
    for name, data in BASE.items():
        write(folder / name, data)


def read_base(name: str) -> Callable[[Path, bytes], None]:
    """A reader of a model's folder in which one file is the case."""

    def read(folder: Path, data: bytes) -> None:
        write(folder / name, data)
        with contextlib.redirect_stdout(None):
            assert fetch.check_base(folder) >= 0

    return read


def read_tokenizer(name: str) -> Callable[[Path, bytes], None]:
    """The tokenizer of such a folder, loaded and used."""

    def read(folder: Path, data: bytes) -> None:
        write(folder / name, data)
        found = tokenizers.load(folder)
        rows.render(found, "chat", "What?", "That.")

    return read


def tokenizer_files() -> dict[str, Any]:
    """The tokenizer's files with what they hold, the vocabulary cut short."""
    with tempfile.TemporaryDirectory() as folder:
        save_tokenizer(Path(folder))
        names = ("tokenizer.json", "tokenizer_config.json")
        found = {name: json.loads(Path(folder, name).read_text()) for name in names}
    vocabulary = found["tokenizer.json"]["model"]["vocab"]
    found["tokenizer.json"]["model"]["vocab"] = dict(list(vocabulary.items())[:20])
    return found


@st.composite
def templates(draw: st.DrawFn) -> str:
    """Chat templates out of pieces of good ones and of attacks."""
    pieces = st.sampled_from(
        [
            *("{{ m['content'] }}", "{{ m.role }}", "<|end|>", "{% endfor %}", "{{ messages }}"),
            *("{% for m in messages %}", "{% for i in range(99999) %}", "{% if loop.first %}"),
            *("{{ 'a' * 10**10 }}", "{{ 10**10**10 }}", "{{ 'a'|center(10**11) }}", "{% endif %}"),
            *("{{ ''.__class__.__mro__ }}", "{{ cycler.__init__.__globals__ }}", "{{ self }}"),
            *("{{ '{0.__class__}'.format(m) }}", "{{ '%1000000000000d' % 1 }}", "{{ x.y.z }}"),
            *("{{ raise_exception('no') }}", "{% include '/etc/passwd' %}", "{{ lipsum(9**9) }}"),
            *(
                "{% set a = a ~ a %}",
                "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
                "{{ [m]*9 }}",
            ),
        ]
    )
    return "".join(draw(st.lists(pieces | inputs.texts, max_size=6)))


def use_template(folder: Path, template: str) -> None:
    tokenizer = _tokenizer(folder)
    tokenizer.chat_template = template
    limits = {"SECONDS": 0.3, "MEGABYTES": 128}
    try:
        with mock.patch.multiple(chat_templates, **limits):
            start, answer = rows.render(tokenizer, "chat", "What?", "That.")
        assert isinstance(start, str) and isinstance(answer, str)
    finally:
        tokenizer.chat_template = CHAT_TEMPLATE


# What the pipeline recorded, and what came from a remote.


MINIMAL = """\
stages:
  first: {cmd: cp in.txt out.txt, deps: [in.txt], outs: [out.txt]}
"""
RECORD = {"stage": "first", "started": "2026-01-01", "seconds": 1, "versions": {"python": "3.11"}}


def prepare_project(folder: Path) -> None:
    """A project of one stage that was run, of which a case changes one file."""
    from conftest import init_project, sh

    init_project(folder / "project")
    (folder / "project/dvc.yaml").write_text(MINIMAL)
    (folder / "project/in.txt").write_text("in")
    sh("dvc", "repro", cwd=folder / "project")


def read_lineage(name: str) -> Callable[[Path, bytes], None]:
    """The lineage of an output, as `olivepress lineage` shows it."""

    def read(folder: Path, data: bytes) -> None:
        from flows import cli

        project = folder / "project"
        write(project / name, data)
        # Who finds dvc.lock half written waits for the one who writes it, 2 s.
        waiting = mock.patch.object(store, "TRIES", 0)
        with waiting, contextlib.chdir(project), cli.console.capture():
            for origin in lineage.trace(project, Path("out.txt")):
                cli._print_origin(origin)

    return read


LOCK = {
    "schema": "2.0",
    "stages": {
        "first": {
            "cmd": "cp in.txt out.txt",
            "deps": [{"path": "in.txt", "hash": "md5", "md5": "1" * 32, "size": 2}],
            "outs": [{"path": "out.txt", "hash": "md5", "md5": "2" * 32, "size": 2}],
        }
    },
}
RUN = {
    "cmd": "x",
    "deps": [{"path": "a", "md5": "1" * 32}],
    "outs": [{"path": "b", "md5": "2" * 32}],
}


def read_run_cache(folder: Path, data: bytes) -> None:
    write(folder / "runs/ab/key/value", data)
    for name in run_cache.outputs(folder, "key"):
        assert run_cache.OBJECT.fullmatch(name)
        run_cache.cached(folder, name)


def read_listing(folder: Path, data: bytes) -> None:
    """A folder's listing in DVC's cache."""
    write(folder / "files/md5/22" / f"{'2' * 30}.dir", data)
    assert run_cache.cached(folder, "2" * 32 + ".dir") in (True, False)


def read_published(folder: Path, data: bytes) -> None:
    write(folder / "models/mine/1/model.json", data)
    assert Folder(folder / "models").versions("mine").keys() == {"1"}


# Answers of services.


ANSWER = {
    "id": "some/tiny",
    "sha": "0" * 40,
    "siblings": [
        {"rfilename": "config.json", "size": 5, "blobId": "a" * 40},
        {
            "rfilename": "model.safetensors",
            "size": 9,
            "blobId": "b" * 40,
            "lfs": {"sha256": "c" * 64, "size": 9, "pointerSize": 1},
        },
    ],
}


def read_hub(folder: Path, data: bytes) -> None:
    try:
        found = hub.listed(data, "some/tiny", "0" * 40)
    except ValueError:  # `hub.download` explains it
        return
    for file in found:
        assert file.blob.parent.name == "blobs" and file.part.parent == file.blob.parent
        assert file.size >= 0 and "/" not in file.name


def read_names(folder: Path, names: list[str]) -> None:
    """Names of blobs, as a service lists them."""
    for name in names:
        blobs.check_name("there", name)
        assert (folder / name).resolve().is_relative_to(folder.resolve())
    assets.model_folder("there", names)


def read_place(folder: Path, data: bytes) -> None:
    write(folder / "config.json", data)
    place = azure.find_place({}, {}, folder)
    assert all(value is None or isinstance(value, str) for value in vars(place).values())


PLACE = {"subscription_id": "a", "resource_group": "b", "workspace_name": "c"}
PIECES = st.sampled_from(
    ["config.json", "model.safetensors", "a", "", ".", "..", "\\", "tokenizer.py"]
)
NAMES = st.lists(PIECES | inputs.texts, min_size=1, max_size=3).map("/".join)
YAML_PARAMS = warped(yaml.safe_load(PARAMS)).map(as_yaml) | spoilt(PARAMS)

TARGETS = {
    "rows": Target(
        json_like({"prompt": "a", "response": "b"}) | spoilt(ROW * 3),
        nothing,
        read_rows,
        ("rows.jsonl",),
        3,
    ),
    "calibration": Target(
        json_like({"text": "a"}) | spoilt(ROW * 3), _tokenizer, read_calibration, ("rows.jsonl",), 2
    ),
    "params": Target(YAML_PARAMS, nothing, read_params, ("params.yaml",), 0.5),
    "overrides": Target(
        changes, nothing, change_params, ("params.yaml", "-S"), 0.2, extremes=False
    ),
    "sweep": Target(
        warped(SWEEP).map(as_yaml) | spoilt(as_yaml(SWEEP)), nothing, read_sweep, ("sweep.yaml",), 2
    ),
    "adapter config": Target(
        json_like(LORA),
        nothing,
        read_adapter("mine/adapter_config.json"),
        ("adapter_config.json", "mine"),
        2,
    ),
    "adapter weights": Target(
        safetensors_like(TENSORS, NUMBERS),
        nothing,
        read_adapter("mine/adapter_model.safetensors"),
        ("adapter_model.safetensors", "base_model.model.", "mine"),
        3,
    ),
    "adapter inputs": Target(
        json_like(CONTRACT),
        nothing,
        read_adapter("onnx/adapter_inputs.json"),
        ("adapter_inputs.json", "mine", "onnx", "base_model.model."),
        2,
    ),
    "folds": Target(
        safetensors_like(SCALES, NUMBERS[:16]),
        nothing,
        read_adapter("onnx/folds/scales.safetensors"),
        ("scales.safetensors", "mine"),
        2,
    ),
    "genai config": Target(
        json_like(GENAI) | genai_configs(), nothing, read_genai_config, ("genai_config.json",), 3
    ),
    "manifest": Target(
        json_like({"format": 1, "prompt_template": "<|user|>{prompt}"}),
        nothing,
        read_manifest,
        ("olivepress.json",),
        2,
    ),
    "sums": Target(spoilt(SUMS), nothing, read_sums, (), 2),
    "adapter names": Target(inputs.texts, nothing, adapter_names, ("adapters",), 1, extremes=False),
    "base config": Target(
        json_like(CONFIG), prepare_base, read_base("config.json"), ("base config",), 2
    ),
    "base weights": Target(
        safetensors_like(WEIGHTS, NUMBERS[:16]),
        prepare_base,
        read_base("model.safetensors"),
        ("base weights",),
        3,
    ),
    "base index": Target(
        json_like({"weight_map": {"model.layers.0.x": "model.safetensors"}}),
        prepare_base,
        read_base("model.safetensors.index.json"),
        ("base index",),
        1,
    ),
    "lineage": Target(
        json_like(RECORD), prepare_project, read_lineage("models/lineage/first.json"), (), 0.1
    ),
    "dvc.lock": Target(
        warped(LOCK).map(as_yaml) | spoilt(as_yaml(LOCK)),
        prepare_project,
        read_lineage("dvc.lock"),
        (),
        0.1,
    ),
    "run-cache": Target(
        warped(RUN).map(as_yaml) | spoilt(as_yaml(RUN)), nothing, read_run_cache, (), 2
    ),
    "listing": Target(json_like([{"md5": "1" * 32, "relpath": "a"}]), nothing, read_listing, (), 2),
    "published": Target(
        json_like({"properties": {"olivepress.content": "a"}}), nothing, read_published, (), 2
    ),
    "hub": Target(json_like(ANSWER), nothing, read_hub, (), 2),
    "blobs": Target(
        st.lists(NAMES, min_size=1, max_size=4), nothing, read_names, ("there",), 3, extremes=False
    ),
    "place": Target(json_like(PLACE), nothing, read_place, ("config.json",), 2),
    "chat template": Target(
        templates(), _tokenizer, use_template, ("chat template",), 0.5, extremes=False
    ),
}
for _name in (name for name in PACKAGE if name.endswith(".json")):
    _cases, _read = json_like(json.loads(PACKAGE[_name])), read_package(_name)
    TARGETS[f"package {Path(_name).name}"] = Target(_cases, prepare_package, _read, (), 0.5)
# These load a whole tokenizer for each case.
for _name, _good in tokenizer_files().items():
    TARGETS[_name] = Target(json_like(_good), prepare_base, read_tokenizer(_name), (), 0.2)
