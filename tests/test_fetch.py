"""The fetch stage on local folders; tests/test_hub.py has the hub."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from tiny import assert_refused, make_project, refused, run_stage

from stages import fetch
from stages.errors import UserError
from stages.fetch import check_space


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return make_project(tmp_path_factory.mktemp("fetch"))


@pytest.fixture
def project(model: Path, tmp_path: Path) -> Path:
    """A copy with its own tiny/, and nothing fetched yet."""
    copy = Path(shutil.copytree(model, tmp_path / "project"))
    shutil.rmtree(copy / "models/base")
    return copy


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


def to_pickle(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def cut_off(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1])


def lose_a_shard(folder: Path) -> None:
    index = {"weight_map": {"a": "model.safetensors", "b": "model-2.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")


def test_copies_what_is_needed_and_no_code(project):
    for name in ("modeling_tiny.py", "training_args.bin", "README.md", "LICENSE"):
        (project / "tiny" / name).write_text("x")
    done = run_stage(project, "fetch")
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (project / "models/base").iterdir()} == {
        "LICENSE",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert "models/base: 0.4 million parameters" in done.stdout


def test_links_are_copied_as_files(project):
    """A snapshot in the hub's cache is a folder of links."""
    snapshot = project / "cache/snapshots/0123"
    snapshot.parent.mkdir(parents=True)
    (project / "tiny").rename(snapshot)
    (project / "cache/blobs").mkdir()
    (snapshot / "model.safetensors").rename(project / "cache/blobs/ab")
    (snapshot / "model.safetensors").symlink_to("../../blobs/ab")
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    values["base"]["path"] = str(snapshot)
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    assert run_stage(project, "fetch").returncode == 0
    assert not (project / "models/base/model.safetensors").is_symlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "model.safetensors").unlink(), "tiny: no weights"),
        (to_pickle, "pickles, which can run code when read: pytorch_model.bin"),
        (cut_off, "tiny/model.safetensors: damaged or cut off"),
        (lose_a_shard, "tiny: missing shards: model-2.safetensors"),
        (lambda f: (f / "config.json").unlink(), "tiny/config.json: missing"),
        (lambda f: (f / "config.json").write_text("{"), "tiny/config.json: not JSON"),
        (lambda f: (f / "tokenizer.json").unlink(), "tiny: no tokenizer.json"),
        (shutil.rmtree, "base.path: tiny: not found"),
    ],
)
def test_unusable_folders_are_refused(project: Path, spoil: Callable[[Path], None], message: str):
    spoil(project / "tiny")
    refused(project, fetch.main, message)
    assert not (project / "models/base").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"architectures": ["T5ForConditionalGeneration"], "is_encoder_decoder": True},
            "T5ForConditionalGeneration is an encoder-decoder",
        ),
        (
            {"architectures": ["LlavaForConditionalGeneration"], "vision_config": {}},
            "LlavaForConditionalGeneration is for images or sound",
        ),
        ({"architectures": ["BertModel"]}, "BertModel is not a decoder-only language model"),
        ({"quantization_config": {"quant_method": "awq"}}, "is quantized already (awq)"),
        (
            {"model_type": "odd", "auto_map": {"AutoModelForCausalLM": "odd.Odd"}},
            "is read with Python code of its own, which is never run here",
        ),
    ],
)
def test_other_kinds_of_model_are_named(project, changes, message):
    edit(project / "tiny/config.json", **changes)
    refused(project, fetch.main, message)


def test_missing_chat_template_is_said(project):
    (project / "tiny/chat_template.jinja").unlink()
    done = run_stage(project, "fetch")
    assert done.returncode == 0
    assert "prepare.template must be a text" in done.stdout


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (b'{"prompt": "a", "response": null}', ":2: column 'response' holds null and not text"),
        (b'{"prompt": "a"}', ":2: no column 'response'; it has prompt"),
        (b'{"prompt": "\xff"}', ":2: not UTF-8 at byte 50 of the file"),
    ],
)
def test_rows_of_the_builtin_model_are_checked_as_all_rows(project, row, message):
    (project / "rows.jsonl").write_bytes(b'{"prompt": "Hi", "response": "Hello"}\n' + row + b"\n")
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    values["base"] |= {"source": "builtin", "path": "rows.jsonl"}
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    assert_refused(project, run_stage(project, "fetch"), f"base.path: rows.jsonl{message}")


def test_full_disk_is_found_before_copying(tmp_path):
    with pytest.raises(UserError, match=r"1000000\.00 GB are needed and"):
        check_space(tmp_path / "not" / "there", 10**15)
