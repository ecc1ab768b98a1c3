"""The targets that a model can be exported for, beside the one that the pipeline packages."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import stage
from stages.card import BESIDE, GENAI
from stages.errors import UserError
from stages.export import PROVIDERS
from stages.params import Export, Params


@dataclass(frozen=True)
class Recipe:
    """One target. Its name is the value of export.provider, and genai's name of the provider."""

    device: str
    """As export.device has it."""
    runs_on: str
    precision: str
    """Of a quantized model; a float one is float16 but on the CPU."""
    install: str
    """Python packages that run it."""
    checked: str
    """What tests/test_targets.py does, and what was done by hand where it says so."""
    unchecked: str
    """What nobody looked at."""


# The graph as it is tried on the CPU: with accuracy_level 1. With 4 and float16 onnxruntime 1.27
# gives NaN there for a prompt of 16 tokens.
TRIED = "tried.onnx"
HALF = "4 or 8 bits, the rest float16"
ON_CPU = (
    "onnx's checker passes; on the CPU, with accuracy_level 1 and onnxruntime's optimizations off, "
    "it gives the scores of the CPU target to 1 %, without an adapter and with"
)
RECIPES = {
    "cpu": Recipe(
        "cpu",
        "any CPU",
        "4 or 8 bits, the rest float32",
        "onnxruntime-genai",
        "runs; its scores are those of PyTorch",
        "nothing",
    ),
    "cuda": Recipe(
        "gpu",
        "NVIDIA GPU",
        HALF,
        f"{GENAI['cuda']} 0.14 and {BESIDE['cuda'][0]}, CUDA 12 and cuDNN 9",
        f"{ON_CPU}; by hand, on an H100: the CPU's perplexity to 0.2 %, the same likeliest token "
        "in 99 of 100 places, with adapters switched on and off",
        "a smaller GPU",
    ),
    "dml": Recipe(
        "gpu",
        "GPU with DirectX 12, Windows",
        HALF,
        GENAI["dml"],
        ON_CPU,
        "the GPU and Windows: its kernels, speed and memory",
    ),
    "webgpu": Recipe(
        "gpu",
        "GPU with Vulkan, Metal or DirectX 12",
        HALF,
        "onnxruntime-webgpu in place of onnxruntime, of its version, and onnxruntime-genai",
        f"{ON_CPU}; by hand, the same graph in float32 on a GPU in software (Vulkan, Linux): the "
        "CPU's tokens, with adapters switched on and off",
        "float16 on a real GPU, its speed and memory",
    ),
    "NvTensorRtRtx": Recipe(
        "gpu",
        "NVIDIA RTX GPU",
        "4 bits without zero points (quantize.symmetric true), head and the rest float16",
        "onnxruntime-genai-winml, on Windows (not tried)",
        ON_CPU,
        "the GPU: whether TensorRT takes this graph, and each group_size; speed and memory",
    ),
}
# Providers that onnxruntime-genai runs and its builder does not write for. Each has a toolchain of
# its own, and none of these takes the adapter inputs.
ELSEWHERE = {
    "QNN": "Qualcomm's NPU takes a graph of fixed shapes, compiled by Qualcomm's SDK (qairt-dev; "
    "Olive's QairtPipelinePass or EPContextBinaryGenerator)",
    "OpenVINO": "Intel's CPU, GPU and NPU take OpenVINO's own format (openvino, optimum-intel; "
    "Olive's OpenVINOOptimumConversion and OpenVINOEncapsulation)",
    "VitisAI": "AMD's NPU takes a model that AMD's model_generate makes (part of Ryzen AI; Olive's "
    "VitisGenerateModelLLM)",
}


def table() -> list[dict[str, str]]:
    """What each target is, by the names that `olivepress export --list` prints."""
    return [
        {
            "target": name,
            "provider": PROVIDERS[name],
            "runs on": recipe.runs_on,
            "precision": recipe.precision,
            "install": recipe.install,
            "checked here": recipe.checked,
            "not checked here": recipe.unchecked,
        }
        for name, recipe in RECIPES.items()
    ]


def named(target: str) -> str:
    """The target as it is written in `RECIPES`; letters may be small or large.

    Raises:
        UserError: there is none; says what is needed instead, where that is known.
    """
    known = {name.lower(): name for name in (*RECIPES, *ELSEWHERE)}
    name = known.get(target.lower(), target)
    if name in ELSEWHERE:
        raise UserError(
            f"--target {name}: not reachable from here: {ELSEWHERE[name]}, and no adapters; choose "
            f"one of {', '.join(RECIPES)}"
        )
    if name not in RECIPES:
        raise UserError(f"--target {target}: no such target; choose one of {', '.join(RECIPES)}")
    return name


def settings(target: str, export: Export) -> Export:
    """The `export` section of params.yaml, made to fit a target."""
    changes: dict[str, Any] = {"device": RECIPES[target].device, "provider": target}
    if target in ("cuda", "dml"):
        changes["accuracy_level"] = 1  # their kernels do not read it; see TRIED for those that do
    if target == "NvTensorRtRtx":
        changes["lm_head"] = "float"  # the builder leaves it
    return Export(**{**export.model_dump(), **changes})


def write(target: str, params: Params, out: Path, default: str | None = None) -> list[str]:
    """Write a folder that onnxruntime-genai loads on the target, with adapters/NAME.onnx_adapter.

    Args:
        out: folder to write; it does not exist yet.
        default: adapter that answers where none is chosen, for runtimes that know no adapters.

    Returns:
        names of the adapters in it: those of params.yaml that are trained.

    Raises:
        UserError: models/quantized or the default adapter is not there yet; the target cannot take
            these weights.
    """
    if not (stage.QUANTIZED / "config.json").exists():
        raise UserError(f"{stage.QUANTIZED} is not there yet; olivepress run makes it")
    trained = [name for name in params.adapters if (stage.ADAPTERS / name).is_dir()]
    if default is not None and default not in trained:
        known = ", ".join(trained) or "none yet; olivepress run trains them"
        raise UserError(f"--adapter {default}: no trained adapter; there are: {known}")
    from stages.convert import convert, weights
    from stages.export import export, set_defaults

    export(stage.QUANTIZED, out, settings(target, params.export), params.finetune.target_modules)
    (out / "adapters").mkdir()
    for name in trained:
        convert(stage.ADAPTERS / name, out, out / "adapters" / f"{name}.onnx_adapter")
    if default is not None:
        set_defaults(out / "model.onnx", weights(stage.ADAPTERS / default, out))
    describe(target, params, out, default)
    return trained


def describe(target: str, params: Params, out: Path, default: str | None) -> None:
    """Write inference_model.json, where `prepare` has said what a prompt is; copy the licence."""
    from stages import foundry, tokenizer
    from stages.card import base_of
    from stages.package import copy

    for path in stage.BASE.glob("LICENSE*"):
        copy(path, out / path.name)
    report = next(stage.PREPARED.glob("*/report.json"), None)
    if report and stage.BASE.exists():
        template = stage.read_json(report)["prompt_template"]
        about = {"base": base_of(params), "prompt_template": template}
        found = foundry.inference_model(about, target, tokenizer.load(stage.BASE), default)
        stage.write_json(out / foundry.FILE, found)


def try_on_cpu(folder: Path) -> str | None:
    """Read a question with each adapter on this machine's CPU, whatever the model is for.

    In a process of its own: onnxruntime 1.27 crashes on float16 when it may optimize, and may in
    other ways.

    Returns:
        why it cannot be tried, or None: all scores are finite.
    """
    command = [sys.executable, "-m", "stages.recipes", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    (folder / TRIED).unlink(missing_ok=True)
    if done.returncode == 0:
        return None
    last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
    return last[0]


def main(folder: Path) -> None:
    """As `try_on_cpu` says; exits with a message where that fails."""
    import numpy as np
    import onnx
    import onnxruntime_genai as og

    try:
        graph = onnx.load(folder / "model.onnx", load_external_data=False)
        for attribute in (a for node in graph.graph.node for a in node.attribute):
            if attribute.name == "accuracy_level":
                attribute.i = 1
        onnx.save(graph, folder / TRIED)
        config = og.Config(str(folder))
        config.clear_providers()
        off = {"session_options": {"graph_optimization_level": "ORT_DISABLE_ALL"}}
        config.overlay(json.dumps({"model": {"decoder": off | {"filename": TRIED}}}))
        model = og.Model(config)
        question = og.Tokenizer(model).encode("What is this, and what can it do for me?")
        adapters = og.Adapters(model)
        for path in (None, *sorted(folder.glob("adapters/*.onnx_adapter"))):
            generator = og.Generator(model, og.GeneratorParams(model))
            if path:
                adapters.load(str(path), path.stem)
                generator.set_active_adapter(adapters, path.stem)
            generator.append_tokens(question)
            if not np.isfinite(generator.get_output("logits")).all():
                sys.exit(f"no finite scores{f' with {path.name}' if path else ''}")
    except (OSError, RuntimeError) as error:
        sys.exit(" ".join(str(error).split()))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
