"""Models, adapters, packages and parameters that were made to do harm are refused, or do none."""

from __future__ import annotations

import json
import os
import re
import shutil
from contextlib import chdir
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from dvc.fs import get_cloud_fs, registry
from tiny import make_project, refused

from conftest import REPO, init_project, sh, typed
from stages import convert, fetch, generation, hub, params, reading, rows, sums
from stages import template as templates
from stages import tokenizer as tokenizers
from stages.errors import UserError
from tasks import run_cache
from tasks.pipeline import check_depth
from tasks.sweep import spec
from tests.bounded import bounded
from tests.fuzz.inputs import BOMB
from tests.fuzz.targets import ADAPTER, GENAI, PACKAGE, SWEEP, as_yaml, write, write_package
from tests.models import save_tokenizer

PICKLE = b"\x80\x04\x95\x1f\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x8c\x06system\x93."


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_project(tmp_path_factory.mktemp("hostile"))


@pytest.fixture
def project(model: Path, tmp_path: Path) -> Path:
    """A copy with its own tiny/, and nothing fetched yet."""
    copy = Path(shutil.copytree(model, tmp_path / "project"))
    shutil.rmtree(copy / "models/base")
    return copy


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """A LoRA of one linear in mine/, and the contract of a model that takes it in onnx/."""
    for name, data in ADAPTER.items():
        write(tmp_path / name, data)
    return tmp_path


def edit(path: Path, **changes: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text("utf-8")) | changes), "utf-8")


# Pickles.


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "m.pth", "m.ckpt", "m.pkl"])
def test_weights_in_a_pickle_are_refused_by_name(project: Path, name: str) -> None:
    (project / "tiny/model.safetensors").rename(project / "tiny" / name)
    refused(project, fetch.main, "pickles, which can run code when read", name)


@pytest.mark.parametrize("begins", [PICKLE, b"PK\x03\x04" + bytes(60)])
def test_a_pickle_under_another_name_is_refused(
    project: Path, adapter: Path, begins: bytes
) -> None:
    (project / "tiny/model.safetensors").write_bytes(begins)
    refused(project, fetch.main, "tiny/model.safetensors: a pickle under the name of a safetensors")
    write(adapter / "mine/adapter_model.safetensors", begins)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors: a pickle under the name"):
        convert.weights(adapter / "mine", adapter / "onnx")


def test_nothing_that_can_run_is_copied_whatever_it_is_called(project: Path) -> None:
    for name in ("tokenizer_evil.py", "chat_template.py", "tokenizer.pkl", "tokenizer.so"):
        (project / "tiny" / name).write_bytes(PICKLE)
    with chdir(project):
        fetch.main(params.load())
    kept = {path.suffix for path in (project / "models/base").iterdir()}
    assert kept == {".json", ".safetensors", ".jinja"}


# Code of a model's own.


def test_code_that_comes_with_a_model_is_never_run(project: Path, tmp_path: Path) -> None:
    """There is no switch for it: what transformers does not know, Olive and genai do not either."""
    canary = tmp_path / "canary"
    code = f"open({str(canary)!r}, 'w')\nclass Evil: pass\n"
    for name in ("evil.py", "tokenizer_evil.py"):
        (project / "tiny" / name).write_text(code)
    names = ("AutoConfig", "AutoModelForCausalLM", "AutoModel")
    edit(project / "tiny/config.json", auto_map=dict.fromkeys(names, "evil.Evil"))
    edit(
        project / "tiny/tokenizer_config.json",
        auto_map={"AutoTokenizer": ["tokenizer_evil.Evil", None]},
    )
    with chdir(project):
        fetch.main(params.load())
    assert not list((project / "models/base").glob("*.py"))
    for name in ("evil.py", "tokenizer_evil.py"):  # were they there all the same
        (project / "models/base" / name).write_text(code)
    from passes.lora import load_adapted
    from stages.quantize import check_group_size

    base = project / "models/base"
    assert tokenizers.load(base)("a").input_ids
    check_group_size(base, 32)
    load_adapted(base, None)
    assert not canary.exists()


def test_code_that_a_model_cannot_do_without_is_refused(project: Path) -> None:
    for kind in ("odd", "../../..", "../models/phi3", "/"):
        edit(project / "tiny/config.json", model_type=kind, auto_map={"AutoConfig": "e.E"})
        refused(project, fetch.main, "read with Python code of its own, which is never run here")


def test_a_library_that_a_package_names_is_never_loaded(tmp_path: Path) -> None:
    """onnxruntime-genai would load it: its code would run."""
    for place in ("model", "search"):
        evil = GENAI | {place: GENAI[place] | {"custom_ops_library": "/tmp/evil.so"}}
        (tmp_path / "genai_config.json").write_text(json.dumps(evil))
        with pytest.raises(UserError, match="custom_ops_library: a library of its own is never"):
            generation.Session(tmp_path)


# Names, links and paths.


@pytest.mark.parametrize("name", ["../../secret", "/etc/passwd", "a/../../../secret"])
def test_a_model_of_a_package_is_in_the_package(tmp_path: Path, name: str) -> None:
    decoder = GENAI["model"]["decoder"] | {"filename": name}
    config = GENAI | {"model": GENAI["model"] | {"decoder": decoder}}
    (tmp_path / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="no file of the folder"):
        generation.Session(tmp_path)


def test_a_link_out_of_a_model_brings_nothing_into_the_package(project: Path) -> None:
    """`LICENSE`, a link to a private key, was copied, packaged and published."""
    (project / "secret").write_text("a private key")
    (project / "tiny/LICENSE").symlink_to(project / "secret")
    refused(project, fetch.main, "tiny/LICENSE: a link to ", "out of the folder")
    assert not (project / "models/base").exists()


def test_a_package_holds_plain_files(tmp_path: Path) -> None:
    folder, secret = tmp_path / "package", tmp_path / "secret"
    secret.write_text("a private key")
    write(folder / "a", b"x")
    (folder / "SHA256SUMS").write_text(
        "".join(f"{sums.sha256(path)}  {path.name}\n" for path in (folder / "a",))
    )
    sums.verify(folder)
    for make in (lambda at: at.symlink_to(secret), os.mkfifo):
        make(folder / "b")
        with pytest.raises(UserError, match="b"):
            sums.verify(folder)
        (folder / "b").unlink()
    (folder / "adapters").mkdir()
    (folder / "adapters/b.onnx_adapter").symlink_to(secret)
    with pytest.raises(UserError, match="no plain file"):
        generation.adapters_of(folder)


@pytest.mark.parametrize("name", ["..", "-rf", "a b", "a\x1b[2J", ".hidden", "é", "x" * 65])
def test_adapters_of_a_package_have_names_of_adapters(tmp_path: Path, name: str) -> None:
    write(tmp_path / f"adapters/{name}.onnx_adapter", b"")
    with pytest.raises(UserError, match="is no name of an adapter"):
        generation.adapters_of(tmp_path)


def test_objects_of_a_remote_have_names_of_objects(tmp_path: Path) -> None:
    """An absolute path behind two letters named any file of this machine as one to be pushed."""
    secret = tmp_path / "secret"
    secret.write_text("a private key")
    cache = tmp_path / "cache"
    record = {"cmd": "x", "outs": [{"path": "a", "md5": f"ab{secret}"}, {"md5": "1" * 32}]}
    write(cache / "runs/ab/key/value", as_yaml(record))
    assert run_cache.outputs(cache, "key") == {"1" * 32}


def test_no_archive_is_read() -> None:
    """So no name in one can lead out of a folder."""
    reads = re.compile(r"\b(zipfile|tarfile|unpack_archive|extractall|py7zr)\b")
    for folder in ("flows", "tasks", "stages", "passes"):
        for path in (REPO / folder).rglob("*.py"):
            assert not reads.search(path.read_text()), path


# What DVC makes of parameters.


def test_nothing_but_an_adapters_name_reaches_a_command() -> None:
    listed = yaml.safe_load((REPO / "dvc.yaml").read_text())["stages"]
    commands = [entry.get("do", entry)["cmd"] for entry in listed.values()]
    assert {found for cmd in commands for found in re.findall(r"\$\{[^}]*\}", cmd)} == {"${key}"}
    assert "adapters" in listed["toolchain"]["params"]


@pytest.fixture
def repro(tmp_path: Path) -> Path:
    """The project's own dvc.yaml, of which toolchain was run; and a folder of data."""
    folder = init_project(tmp_path / "project")
    for name in ("dvc.yaml", "requirements.lock", "stages/toolchain.py", "stages/stage.py"):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(REPO / name, folder / name)
    write(folder / "data/precious/x", b"x")
    sh("dvc", "repro", "toolchain", cwd=folder, PYTHONPATH=str(REPO))
    return folder


def with_adapter(folder: Path, name: str, data: str = "data/travel.jsonl") -> None:
    values = yaml.safe_load((folder / "params.yaml").read_text())
    values["adapters"] = {name: {"data": data}}
    (folder / "params.yaml").write_text(yaml.safe_dump(values))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("x; touch canary #", "cannot name an adapter"),
        ("$(touch canary)", "cannot name an adapter"),
        ("../precious", "output 'plots/precious.csv' is specified in"),  # by DVC itself
    ],
)
def test_dvc_repro_does_nothing_with_a_name_that_is_none(repro: Path, name: str, said: str) -> None:
    """A name became a part of a command, and a path that DVC removes before it is run."""
    with_adapter(repro, name)
    done = sh("dvc", "repro", cwd=repro, check=False, PYTHONPATH=str(REPO))
    assert done.returncode and said in done.stderr
    assert not list(repro.rglob("canary")) and (repro / "data/precious/x").exists()


@pytest.mark.parametrize("text", ["$(touch canary)`touch canary`; touch canary #|touch canary"])
def test_shell_in_a_path_is_a_name_of_a_file(repro: Path, text: str) -> None:
    values = yaml.safe_load((repro / "params.yaml").read_text())
    values["base"]["path"] = values["quantize"]["calibration_data"] = text
    values["evaluate"]["text"] = values["adapters"]["travel"]["data"] = text
    (repro / "params.yaml").write_text(yaml.safe_dump(values))
    params.load(repro / "params.yaml")
    done = sh("dvc", "repro", "--keep-going", cwd=repro, check=False, PYTHONPATH=str(REPO))
    assert done.returncode and not list(repro.rglob("canary"))
    assert "stale" in typed("status", cwd=repro).stdout and not list(repro.rglob("canary"))


PATHS = ["base.path", "adapters.travel.data", "quantize.calibration_data", "evaluate.text"]


@pytest.mark.parametrize("key", PATHS)
@pytest.mark.parametrize("value", ["", " ", "a\nb", "a\x1b[2J", "https://x/y", "Azure:box/x"])
def test_what_is_no_path_is_refused(toy: Path, key: str, value: str) -> None:
    before = (toy / "params.yaml").read_bytes()
    done = typed("run", "-S", f"{key}={json.dumps(value)}", cwd=toy, PREFECT_API_URL=NO_SERVER)
    assert done.exit_code == 1
    with pytest.raises(UserError, match=f"{key}: must be a path"):
        from tasks import overrides

        overrides.apply(toy, {key: value})
    assert (toy / "params.yaml").read_bytes() == before


@pytest.mark.parametrize("scheme", sorted({*registry, "remote", "ds"} - {"local"}))
def test_what_dvc_takes_for_an_address_is_none_of_a_file(scheme: str) -> None:
    values = yaml.safe_load((REPO / "params.yaml").read_text())
    for value in (f"{scheme}:box/x", f"{scheme}:/box/x", f"{scheme.upper()}:x"):
        values["base"]["path"] = value
        with pytest.raises(UserError, match=r"base\.path: must be a path here, and not an address"):
            params.check(values)


@pytest.mark.parametrize("name", ["notes:one.jsonl", "C:/rows.jsonl", "10:30", "a b:c", "azure"])
def test_a_name_with_a_colon_is_a_file(name: str) -> None:
    values = yaml.safe_load((REPO / "params.yaml").read_text())
    values["base"]["path"] = name
    assert params.check(values).base.path == name
    assert get_cloud_fs({}, url=name)[0].protocol == "local"


NO_SERVER = "http://127.0.0.1:1/api"


@pytest.mark.parametrize("id_", ["../../x", "a/b/c", "a?b", "a b", "-x/y", "a/..", ""])
def test_a_repository_is_one_of_the_hub(id_: str) -> None:
    values = yaml.safe_load((REPO / "params.yaml").read_text())
    values["base"] |= {"source": "hf", "id": id_}
    with pytest.raises(UserError, match=r"base\.id must be a repository of the hub"):
        params.check(values)


@pytest.mark.parametrize(
    "text",
    [
        *(
            "0x_",
            "2001-99-99",
            "!!bool x",
            "!!int ''",
            "!!timestamp x",
            '"\\UFFFFFFFF"',
            "[" * 3000,
            "9" * 5000,
        ),
        *("&a [*a]", "{a: 1, a: 2}", "\x07", "!!python/object/apply:os.system [id]"),
    ],
)
def test_values_that_yaml_stumbles_over_are_a_message(toy: Path, text: str) -> None:
    done = typed("run", "-S", f"quantize.bits={text}", cwd=toy)
    assert done.exit_code == 1 and done.stderr.startswith("olivepress: -S quantize.bits")
    path = toy / "params.yaml"
    path.write_text(path.read_text().replace("bits: 4", f"bits: {text}"))
    done = typed("status", cwd=toy)
    assert done.exit_code == 1 and "params.yaml: " in done.stderr


def test_aliases_that_unfold_without_end_are_refused(toy: Path) -> None:
    path = toy / "params.yaml"
    path.write_bytes(path.read_bytes() + BOMB)
    with bounded(20, 256), pytest.raises(UserError, match="aliases that unfold without end"):
        params.load(path)


def test_a_key_that_is_there_twice_is_named_with_its_line(toy: Path) -> None:
    """DVC refused it, and the stages took the second."""
    path = toy / "params.yaml"
    path.write_text(path.read_text().replace("  bits: 4", "  bits: 4\n  bits: 8"))
    with pytest.raises(UserError, match=r"line \d+: the key 'bits' is there twice"):
        params.load(path)


@pytest.mark.parametrize("name", ["dvc.yaml", "dvc.lock", "params.yaml"])
@pytest.mark.parametrize("deep", [b"[" * 100_000, b"- " * 100_000, b"{a: " * 100_000])
def test_levels_without_end_do_not_end_the_process(toy: Path, name: str, deep: bytes) -> None:
    """DVC's parser, which is C, ran out of stack."""
    check_depth(toy)
    (toy / name).write_bytes(b"a: " + deep)
    done = typed("status", cwd=toy)
    assert done.exit_code == 1 and name in done.stderr


@pytest.mark.parametrize(
    ("range_", "message"),
    [
        ({"low": 0, "high": 10**15, "step": 1}, "more than 10,000 values; sample some"),
        ({"low": 0.0, "high": 1.0, "step": 5e-324}, "more than 10,000 values; sample some"),
        ({"low": 0, "high": 10**400}, "numbers beyond"),
    ],
)
def test_a_range_without_end_is_not_written_out(range_: dict[str, Any], message: str) -> None:
    grid = {key: value for key, value in SWEEP.items() if key not in ("sampler", "trials")}
    with bounded(20, 256), pytest.raises(UserError, match=message):
        spec.check(grid | {"space": {"finetune.r": range_}}, "sweep.yaml")


# Templates.


@pytest.mark.parametrize(
    "template",
    ["{prompt.__class__}{response}", "{0}{response}", "{prompt!r:>9999999999}{response}", "%s"],
)
def test_a_template_names_prompt_and_response_alone(template: str) -> None:
    values = yaml.safe_load((REPO / "params.yaml").read_text())
    values["prepare"]["template"] = template
    with pytest.raises(UserError, match=r"must be `chat` or hold \{prompt\} and \{response\}"):
        params.check(values)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("attack", ["{0.__class__}", "{prompt!r:>9999999}", "%s", "{response}"])
def test_what_stands_beside_prompt_in_a_template_is_text(tokenizer: Any, attack: str) -> None:
    given, answer = rows.render(tokenizer, "{prompt}{response}", attack, attack)
    assert given.endswith(attack) and answer.startswith(attack)


@pytest.mark.parametrize(
    "template",
    [
        "{% for i in range(99999) %}{% for i in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10**11 }}",
        "{{ 10 ** (9**9) }}",
        "{{ 'a'|center(10**11) }}",
        "{{ range(10**9)|list }}",
        "{% set n = namespace(a='aaaa') %}{% for i in range(40) %}{% set n.a = n.a ~ n.a %}"
        "{% endfor %}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ cycler.__init__.__globals__.os.system('touch canary') }}",
        "{% include '/etc/passwd' %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{{ raise_exception('no') }}",
    ],
)
def test_a_chat_template_that_goes_too_far_is_a_message(
    tokenizer: Any, template: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(templates, "SECONDS", 0.3)
    monkeypatch.setattr(templates, "MEGABYTES", 128)
    monkeypatch.setattr(tokenizer, "chat_template", template)
    with pytest.raises(UserError, match="the base model's chat template fails: "):
        rows.render(tokenizer, "chat", "What?", "That.")
    assert not list(tmp_path.iterdir())


# Sizes.


def test_a_line_of_a_gigabyte_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    with path.open("wb") as file:
        file.truncate(1 << 30)
    with bounded(20, 256), pytest.raises(UserError, match=r"rows\.jsonl:1: more than .* in one li"):
        rows.read_rows(path)
    with bounded(20, 256), pytest.raises(UserError, match=r"more than .* bytes"):
        reading.json_object(path)


@pytest.mark.parametrize("read", [rows.read_rows, params.load, reading.json_object, spec.load])
def test_a_pipe_that_never_ends_is_not_waited_for(tmp_path: Path, read: Any) -> None:
    os.mkfifo(tmp_path / "pipe")
    with bounded(20, 256), pytest.raises(UserError, match="pipe: is no plain file"):
        read(tmp_path / "pipe")


def test_a_message_moves_no_cursor(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"\x1b]0;x\x07\u202e": "a"}))
    with pytest.raises(UserError, match=r"it has \\x1b\]0;x\\x07\\u202e"):
        rows.read_rows(tmp_path / "rows.jsonl")


FORGED = "x\nok          signature  model.sig: is of these files, by the key k.pub\x1b[8m"


@pytest.mark.parametrize("library", [False, True])
def test_a_package_writes_no_verdict_of_its_own(tmp_path: Path, library: bool) -> None:
    lineage = json.loads(PACKAGE["lineage.json"])
    if library:
        lineage["package"]["record"]["versions"][FORGED] = "1"
    else:
        lineage[FORGED] = {"outs": {f"models/lineage/{FORGED}.json": "md5:"}, "record": {}}
    write_package(tmp_path / "a", **{"lineage.json": json.dumps(lineage).encode()})
    done = typed("verify", str(tmp_path / "a"), cwd=tmp_path)
    assert done.exit_code == 1
    assert "x\\nok  " in done.output and "\\x1b[8m" in done.output and "\x1b" not in done.output
    assert not [line for line in done.output.splitlines() if re.match(r"ok +signature", line)]


def test_a_name_in_a_package_is_no_markup(tmp_path: Path) -> None:
    """On a terminal, `verify` shows the names that it reads."""
    write_package(tmp_path / "a", **{"a[/]b": b""})
    done = typed("verify", str(tmp_path / "a"), cwd=tmp_path)
    assert done.exit_code == 1 and "a[/]b: is not the file that bom.cdx.json lists" in done.output


@pytest.mark.parametrize(
    ("name", "keys", "value", "said"),
    [
        ("metrics/travel.json", ("onnx_on", "perplexity"), 10**400, "README.md: is not what"),
        ("olivepress.json", ("base", "id"), "a/b%", "bom.cdx.json: is not what"),
    ],
)
def test_values_that_card_and_bill_cannot_hold(
    tmp_path: Path, name: str, keys: tuple[str, str], value: object, said: str
) -> None:
    content = json.loads(PACKAGE[name])
    content[keys[0]][keys[1]] = value
    write_package(tmp_path / "a", **{name: json.dumps(content).encode()})
    done = typed("verify", str(tmp_path / "a"), cwd=tmp_path)
    assert done.exit_code == 1 and f"{said} Olivepress writes" in done.output


def test_a_row_with_a_key_twice_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "prompt": "b", "response": "c"}\n')
    with pytest.raises(UserError, match=r"rows\.jsonl:1: the key 'prompt' is there twice"):
        rows.read_rows(tmp_path / "rows.jsonl")


# What the long runs found in adapters, and in answers of the hub.


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("lora_alpha", "4", "'lora_alpha' is '4' and no finite number"),
        ("lora_alpha", 10**400, "'lora_alpha' is 1"),
        ("lora_alpha", None, "'lora_alpha' is None"),
        ("alpha_pattern", [1], r"alpha_pattern is \[1\] and no mapping"),
        ("peft_type", {}, r"peft_type is \{\}, and only 'LORA' can be converted"),
    ],
)
def test_fields_of_an_adapter_of_another_type(
    adapter: Path, name: str, value: Any, message: str
) -> None:
    edit(adapter / "mine/adapter_config.json", **{name: value})
    with pytest.raises(UserError, match=f"adapter_config.json: {message}"):
        convert.weights(adapter / "mine", adapter / "onnx")


def test_folds_of_another_shape_are_refused(adapter: Path) -> None:
    from safetensors.numpy import save_file

    module = "model.layers.0.self_attn.qkv_proj"
    for scales in (np.ones(3, np.float32), np.ones(4, np.float16), np.ones((0, 2**40), np.float32)):
        save_file({f"{module}.s_in": scales}, adapter / "onnx/folds/scales.safetensors")
        with pytest.raises(UserError, match="s_in is not 4 numbers of float32"):
            convert.weights(adapter / "mine", adapter / "onnx")


def test_an_adapter_that_is_not_finite_is_refused(adapter: Path) -> None:
    path = adapter / "mine/adapter_model.safetensors"
    data = path.read_bytes()
    path.write_bytes(data[:-4] + np.float32(np.nan).tobytes())
    with pytest.raises(UserError, match="holds what is no finite number in float32"):
        convert.weights(adapter / "mine", adapter / "onnx")


def test_folds_are_in_the_models_folder(adapter: Path) -> None:
    for path in ("../mine/adapter_model.safetensors", "/etc/passwd", "folds/../../x"):
        edit(adapter / "onnx/adapter_inputs.json", folds=path)
        with pytest.raises(UserError, match=r"adapter_inputs\.json: folds: "):
            convert.weights(adapter / "mine", adapter / "onnx")


@pytest.mark.parametrize("answer", [b"[]", b"{}", b'{"id": 1, "siblings": [1]}', b"[" * 100_000])
def test_an_answer_that_is_not_the_hubs(answer: bytes) -> None:
    with pytest.raises((ValueError, UserError)):
        hub.listed(answer, "some/tiny", "0" * 40)
