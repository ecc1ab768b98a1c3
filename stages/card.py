"""The model card: what a package is, how well it does and how it is run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from stages.params import REMOTE, Params

NAMES = {
    "base": "base model, PyTorch float32",
    "quantized": "quantized, PyTorch",
    "quantized_lora": "quantized + LoRA, PyTorch",
    "onnx_off": "this package, adapter off",
    "onnx_on": "**this package, adapter on**",
}
# The distribution of onnxruntime-genai that runs a provider; the plain one runs the others.
GENAI = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}
# pip takes the newest, which from 1.27 on is built for CUDA 13, and onnxruntime-genai-cuda for 12.
BESIDE = {"cuda": ["onnxruntime-gpu==1.26.0"]}
WITH = {"cuda": " with CUDA 12 and cuDNN 9 installed"}
# Plain onnxruntime-genai: nothing of Olivepress is needed to run a package.
SNIPPET = """\
import onnxruntime_genai as og

model = og.Model(".")
tokenizer = og.Tokenizer(model)
adapters = og.Adapters(model)
adapters.load("adapters/{adapter}.onnx_adapter", "{adapter}")
prompt = tokenizer.encode({prompt!r})
params = og.GeneratorParams(model)
params.set_search_options(max_length=len(prompt) + {tokens}, do_sample=False)
generator = og.Generator(model, params)
generator.set_active_adapter(adapters, "{adapter}")  # leave out for the base model
generator.append_tokens(prompt)
while not generator.is_done():
    generator.generate_next_token()
print(tokenizer.decode(generator.get_sequence(0)[len(prompt):]))
"""


def card(manifest: dict[str, Any], metrics: dict[str, dict], lineage: dict, provider: str) -> str:
    """README.md: YAML front matter as the Hugging Face hub reads it, then Markdown.

    It follows from other files of the package alone, so that it can be checked against them.
    """
    adapters = sorted(metrics)
    base = manifest["base"]
    front = {
        "library_name": "onnxruntime-genai",
        "pipeline_tag": "text-generation",
        "tags": ["onnx", "onnxruntime-genai", "olive", "lora", *quantization(lineage)],
    }
    if base["source"] == "hf":
        front |= {"base_model": base["id"], "base_model_relation": "quantized"}
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=True)}---",
        f"# {origin(base)} with {', '.join(adapters)}",
        "A quantized ONNX model for onnxruntime-genai with LoRA adapters, each of which can be "
        "switched on for a call. `lineage.json` and `bom.cdx.json` say what each part was made "
        "from, and `sha256sum -c SHA256SUMS` whether all is there.",
        "## Use",
        f"`pip install {genai(provider, lineage)}`{WITH.get(provider, '')}, then in this folder:",
        f"```python\n{snippet(adapters[0], metrics[adapters[0]])}```",
        *(section(name, metrics[name], lineage, manifest["data"][name]) for name in adapters),
        "## Parameters",
        f"```yaml\n{yaml.safe_dump(parameters(lineage), sort_keys=True)}```",
        "## Licence",
        "The base model's licence holds for this package too, and so do the terms of the data that "
        "the adapters were taught with.",
    ]
    return "\n\n".join(parts) + "\n"


def base_of(params: Params) -> dict[str, str | None]:
    """Where the base model is from, with no folder of the user's."""
    base = params.base
    return {
        "source": base.source,
        "id": base.id if base.source in REMOTE else portable(base.path),
        "revision": base.revision if base.source in REMOTE else None,
    }


def origin(base: Mapping[str, str | None]) -> str:
    """The base model, as `base_of` has it, in a few words."""
    name = str(base["id"])
    return {
        "builtin": "The built-in base model",
        "local": Path(name).name,
        "hf": f"{name} at {(base['revision'] or '')[:12]}",
        "azureml": name.partition("/models/")[2].replace("/versions/", " version "),
    }[str(base["source"])]


def portable(path: str) -> str:
    """The path within the project; of one elsewhere the last part, and no folder of the user's."""
    full = Path(os.path.normpath(Path.cwd() / path))
    inside = full.is_relative_to(Path.cwd())
    return full.relative_to(Path.cwd()).as_posix() if inside else full.name


def genai(provider: str, lineage: dict) -> str:
    """The requirements that run the package, of the version that made it."""
    versions = lineage["package"]["record"]["versions"]
    made = next(versions[name] for name in versions if name.startswith("onnxruntime-genai"))
    return " ".join(
        [f"{GENAI.get(provider, 'onnxruntime-genai')}=={made}", *BESIDE.get(provider, [])]
    )


def snippet(adapter: str, metrics: dict) -> str:
    """Python that answers the first example of the evaluation."""
    prompt = metrics["prompt_template"].replace("{prompt}", metrics["answers"][0]["prompt"])
    return SNIPPET.format(adapter=adapter, prompt=prompt, tokens=64)


def section(name: str, metrics: dict, lineage: dict, data: str) -> str:
    """One adapter: its data, figures before and after, speed, examples."""
    digest = lineage.get(f"prepare@{name}", {}).get("deps", {}).get(data, "not recorded")
    size = metrics["size_mb"]
    lines = [
        f"## Adapter {name}",
        "",
        f"Taught with `{data}` ({digest}), measured on {metrics['rows']} rows kept from it.",
        "",
        "| model | perplexity | exact answers |",
        "|---|---:|---:|",
        *(
            f"| {text} | {shown(metrics[key], 'perplexity', '.3f')} | "
            f"{shown(metrics[key], 'exact_answer_rate', '.1%')} |"
            for key, text in NAMES.items()
        ),
        "",
        f"On disk: base {size['base']:,.1f} MB, ONNX {size['onnx']:,.1f} MB, adapter "
        f"{size['adapter']:,.2f} MB.",
        "",
        *(not_measured() if metrics["not_measured"] else measured(metrics)),
    ]
    return "\n".join(lines)


def measured(metrics: dict) -> list[str]:
    """Agreement, speed and answers of the ONNX model."""
    agreement, speed = metrics["agreement"], metrics["speed"]
    return [
        f"PyTorch and ONNX choose the same token {agreement['top1']:.1%} of the time, and their "
        f"tokenizers cut {agreement['tokenizer']:.1%} of the prompts alike. On the machine that "
        f"made it: {speed['adapter_on']['tokens_per_second']:,.0f} tokens/s with the adapter, "
        f"{speed['adapter_off']['tokens_per_second']:,.0f} without, first token after "
        f"{speed['adapter_on']['time_to_first_token_ms']:,.1f} ms, "
        f"{speed['peak_rss_mb']:,.0f} MB of memory.",
        "",
        "| prompt | adapter off | adapter on |",
        "|---|---|---|",
        *(
            f"| {cell(a['prompt'])} | {cell(a['onnx_off'])} | {cell(a['onnx_on'])} |"
            for a in metrics["answers"]
        ),
    ]


def not_measured() -> list[str]:
    """What a reader must know of a model that was never run."""
    return [
        "**The ONNX model was not run where it was made**, on a machine that lacks what it is for. "
        "Try it on its own device before you rely on it."
    ]


def shown(figures: dict | None, key: str, form: str) -> str:
    """A figure as text: it may not be measured, or null where it is no finite number."""
    if figures is None:
        return "not measured"
    return "not finite" if figures[key] is None else format(figures[key], form)


def cell(text: str) -> str:
    """Text that stays inside its cell of a Markdown table."""
    return " ".join(text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").split())


def parameters(lineage: dict) -> dict[str, dict]:
    """Values of quantize, finetune and export as dvc.lock has them, so those that were used."""
    return {
        stage: entry["params"]
        for stage, entry in lineage.items()
        if entry.get("params") and stage.partition("@")[0] in ("quantize", "finetune", "export")
    }


def quantization(lineage: dict) -> list[str]:
    """Tags for algorithm and bits."""
    used = lineage.get("quantize", {}).get("params", {})
    algorithm = used.get("quantize.algorithm", "none")
    return [] if algorithm == "none" else [algorithm, f"int{used['quantize.bits']}"]
