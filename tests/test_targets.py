"""`olivepress export`: each target's graph and adapters, as far as a CPU can tell, and its page."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import chdir
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import yaml
from exported import QUANTIZE, Lab

from conftest import init_project, typed
from stages import params, recipes
from stages import quantize as stage_quantize
from stages.errors import UserError
from stages.params import Quantize
from stages.stage import write_json

REPO = Path(__file__).resolve().parents[1]
IDS = [5, 9, 100, 77]
HALVES = ["cuda", "dml", "webgpu", "NvTensorRtRtx"]

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def lab(labs: Callable[[str], Lab]) -> Lab:
    return labs("phi3")


def lay_out(lab: Lab, folder: Path, **quantize: object) -> Path:
    """A project that holds the lab's models, quantized anew where `quantize` says how."""
    project = init_project(folder)
    values = yaml.safe_load((project / "params.yaml").read_text("utf-8"))
    values["export"]["accuracy_level"] = 1
    (project / "params.yaml").write_text(yaml.safe_dump(values), "utf-8")
    models = project / "models"
    models.mkdir()
    shutil.copytree(lab.folder / "base", models / "base")
    (models / "base/LICENSE").write_text("MIT\n")
    shutil.copytree(lab.adapter, models / "adapters/travel")
    (project / "data/prepared/travel").mkdir(parents=True)
    text = "<|user|>{prompt}<|end|><|assistant|>"
    write_json(project / "data/prepared/travel/report.json", {"prompt_template": text})
    if quantize:
        settings = Quantize(algorithm="rtn", **{**QUANTIZE, **quantize})
        stage_quantize.quantize(models / "base", Path(), models / "quantized", settings)
    else:
        shutil.copytree(lab.quantized, models / "quantized")
    return project


@pytest.fixture(scope="module")
def projects(lab: Lab, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """By whether the quantized model is symmetric; each with the CPU target's export."""
    folder = tmp_path_factory.mktemp("targets")
    made = {
        symmetric: lay_out(lab, folder / str(symmetric), symmetric=symmetric)
        for symmetric in (False, True)
    }
    for project in made.values():
        write(project, "cpu", Path("exports/cpu"))
    return made


def write(project: Path, target: str, out: Path, adapter: str | None = None) -> list[str]:
    with chdir(project):
        out.parent.mkdir(exist_ok=True)
        return recipes.write(target, params.load(), out, adapter)


def scores(folder: Path, adapter: str | None) -> np.ndarray:
    """On the CPU, with nothing fused; onnxruntime 1.27 crashes on float16 if it may optimize."""
    options = ort.SessionOptions()
    options.log_severity_level = 3
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(folder / "model.onnx", options)
    feed = {"input_ids": np.array([IDS]), "attention_mask": np.ones((1, len(IDS)), np.int64)}
    for value in session.get_inputs():
        if value.name == "position_ids":
            feed[value.name] = np.arange(len(IDS))[None]
        elif value.name.startswith("past_key_values"):
            dtype = np.float16 if "float16" in value.type else np.float32
            feed[value.name] = np.zeros([1, value.shape[1], 0, value.shape[3]], dtype)
    if adapter:
        reader = ort.AdapterFormat.read_adapter(str(folder / f"adapters/{adapter}.onnx_adapter"))
        feed |= {name: value.numpy() for name, value in reader.get_parameters().items()}
    return session.run(["logits"], feed)[0].astype(np.float32)


def assert_near(found: np.ndarray, expected: np.ndarray) -> None:
    assert np.linalg.norm(found - expected) < 0.01 * np.linalg.norm(expected)


@pytest.mark.parametrize("target", HALVES)
def test_a_target_says_what_the_cpu_says(projects, target):
    """Its graph passes onnx's checker, all of it is of the types that the target's kernels take."""
    project = projects[target == "NvTensorRtRtx"]
    out, cpu = project / "exports" / target, project / "exports/cpu"
    assert write(project, target, Path("exports", target)) == ["travel"]
    for adapter in (None, "travel"):
        assert_near(scores(out, adapter), scores(cpu, adapter))
    far = scores(out, "travel") - scores(out, None)
    assert np.linalg.norm(far) > 0.1 * np.linalg.norm(scores(out, None)), "the adapter must matter"

    model = onnx.load(out / "model.onnx", load_external_data=False)
    ops = {(node.domain, node.op_type) for node in model.graph.node}
    names = {name for _, name in ops}
    types = {
        onnx.TensorProto.DataType.Name(each.data_type)
        for each in model.graph.initializer
        if each.name != "lora_rows"
    }
    if target == "NvTensorRtRtx":  # TensorRT knows ONNX's operators, and attention
        assert {name for domain, name in ops if domain} == {"GroupQueryAttention"}
        assert types == {"INT4", "FLOAT16"}
    else:
        assert {"MatMulNBits", "GroupQueryAttention"} <= names
        assert types == {"UINT8", "FLOAT16"}
    assert ("RotaryEmbedding" in names) == (target == "dml")  # its attention has none of its own
    empty = [i.name for i in model.graph.initializer if 0 in i.dims]
    assert bool(empty) == (target == "cuda")
    for node in model.graph.node:  # onnxruntime knows it under ONNX's own domain
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    with chdir(out):
        onnx.checker.check_model(model)

    config = json.loads((out / "genai_config.json").read_text())
    (option,) = config["model"]["decoder"]["session_options"]["provider_options"]
    assert list(option) == [target]
    assert (out / "LICENSE").read_text() == "MIT\n"
    assert json.loads((out / "inference_model.json").read_text())["Name"].endswith(target.lower())


def test_the_command_changes_nothing_but_its_folder(lab, tmp_path):
    project = lay_out(lab, tmp_path / "project")
    before = {path: path.read_bytes() for path in project.rglob("*") if path.is_file()}
    done = typed("export", "--target", "CUDA", "--json", cwd=project)
    assert done.exit_code == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["folder"] == "exports/cuda" and said["adapters"] == ["travel"]
    assert said["provider"] == "CUDAExecutionProvider" and said["not_tried"] is None
    new = {path for path in project.rglob("*") if path.is_file()} - before.keys()
    assert {path.relative_to(project).parts[:2] for path in new} == {("exports", "cuda")}
    assert all(path.read_bytes() == content for path, content in before.items())
    again = typed("export", "--target", "cuda", cwd=project)
    assert again.exit_code == 1
    assert "exports/cuda: is there already; remove it, or name another with --out" in again.stderr


@pytest.mark.parametrize("target", ["cpu", "webgpu"])
def test_an_adapter_that_is_built_in_answers_where_none_is_chosen(projects, tmp_path, target):
    project = projects[False]
    write(project, target, tmp_path / "out", "travel")
    assert_near(scores(tmp_path / "out", None), scores(project / "exports/cpu", "travel"))
    name = json.loads((tmp_path / "out/inference_model.json").read_text())["Name"]
    assert name.endswith(f"-olivepress-travel-{target}")


def test_a_target_is_tried_on_the_cpu_in_arithmetic_that_the_cpu_has(projects, tmp_path):
    out = tmp_path / "out"
    with chdir(projects[False]):
        fast = params.load()
        export = fast.export.model_copy(update={"accuracy_level": 4})
        recipes.write("webgpu", fast.model_copy(update={"export": export}), out)
    nodes = onnx.load(out / "model.onnx", load_external_data=False).graph.node
    assert {a.i for n in nodes for a in n.attribute if a.name == "accuracy_level"} == {4}
    before = sorted(out.iterdir())
    assert recipes.try_on_cpu(out) is None
    assert sorted(out.iterdir()) == before
    assert "No such file" in (recipes.try_on_cpu(tmp_path) or "")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "--target: which? olivepress export --list names them"),
        (
            ("--target", "tpu"),
            "--target tpu: no such target; choose one of cpu, cuda, dml, webgpu, NvTensorRtRtx",
        ),
        (("--target", "qnn"), "--target QNN: not reachable from here: Qualcomm's NPU takes"),
        (("--target", "dml", "--out", "models"), "models: is there already"),
        (
            ("--target", "dml", "--adapter", "x", "--out", "other"),
            "--adapter x: no trained adapter; there are: travel",
        ),
        (
            ("--target", "NvTensorRtRtx"),
            "takes quantize.symmetric true: TensorRT knows no zero points",
        ),
    ],
)
def test_what_cannot_be_is_one_line(projects, args, message):
    done = typed("export", *args, cwd=projects[False])
    assert done.exit_code == 1 and done.stdout == ""
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("olivepress:")]
    assert message in line
    assert not [path for path in projects[False].rglob("*") if ".tmp-" in path.name]


def test_eight_bits_are_refused_where_they_cannot_be(lab, tmp_path):
    project = lay_out(lab, tmp_path / "project", bits=8, symmetric=True)
    with pytest.raises(UserError, match=r"NvTensorRtRtx takes quantize\.bits 4, not 8"):
        write(project, "NvTensorRtRtx", tmp_path / "out")
    write(project, "dml", tmp_path / "eight")
    write(project, "cpu", tmp_path / "cpu")
    assert_near(scores(tmp_path / "eight", "travel"), scores(tmp_path / "cpu", "travel"))


def test_nothing_is_quantized_yet(toy):
    done = typed("export", "--target", "cuda", cwd=toy)
    assert done.exit_code == 1
    assert "models/quantized is not there yet; olivepress run makes it" in done.stderr
    assert not (toy / "exports/cuda").exists()


def test_a_head_that_a_target_leaves_float_is_no_mistake():
    export = params.Export(device="cpu", provider="cpu", lm_head="int8", accuracy_level=4)
    assert recipes.settings("NvTensorRtRtx", export).lm_head == "float"
    found = recipes.settings("dml", export)
    assert (found.device, found.provider, found.lm_head) == ("gpu", "dml", "int8")


def rows(text: str, header: str) -> list[list[str]]:
    """The cells of the Markdown table that begins with this header."""
    lines = text[text.index(header) :].split("\n\n", maxsplit=1)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines]


def test_the_page_and_the_list_say_what_the_table_says(tmp_path):
    text = (REPO / "docs/targets.md").read_text("utf-8")
    table = recipes.table()
    assert rows(text, "| target |") == [list(row.values()) for row in table]
    assert rows(text, "| provider | what it takes |") == [
        list(i) for i in recipes.ELSEWHERE.items()
    ]
    assert [row["target"] for row in table] == list(recipes.PROVIDERS)
    said = json.loads(typed("export", "--list", "--json", cwd=tmp_path).stdout)
    assert [list(row.values()) for row in said["targets"]] == rows(text, "| target |")
    assert said["not_reachable"] == recipes.ELSEWHERE
    listed = re.sub(r"\s+", " ", typed("export", "--list", cwd=tmp_path).stdout)
    for row in table:
        assert all(f"{key} {value}" in listed for key, value in list(row.items())[1:])
