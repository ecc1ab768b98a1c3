"""Turn a trained adapter into the file that onnxruntime loads beside models/onnx."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import stage
from stages.errors import UserError
from stages.fetch import check_space
from stages.params import Params

if TYPE_CHECKING:
    from numpy import ndarray

PREFIX = "base_model.model."  # of every tensor's name in a PEFT checkpoint
# Fields of adapter_config.json that must have one of these values: anything else trains more than
# the A and B of a linear layer, or computes with them in another way.
PLAIN_LORA: dict[str, tuple] = {
    "peft_type": ("LORA",),
    "use_dora": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "modules_to_save": (None, []),
    "trainable_token_indices": (None, []),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
    "layer_replication": (None, []),
    "fan_in_fan_out": (False, None),
}


def main(params: Params, adapter: str) -> None:
    """Convert models/adapters/NAME to models/adapters/NAME.onnx_adapter."""
    out = stage.ADAPTERS / f"{adapter}.onnx_adapter"
    with stage.new_output(out) as path:
        convert(stage.ADAPTERS / adapter, stage.ONNX, path)


def convert(adapter: Path, model: Path, out: Path) -> None:
    """Write the adapter as `model`/adapter_inputs.json says, and try it.

    Args:
        adapter: folder with PEFT's adapter_config.json and adapter_model.safetensors. Where its
            base_model_name_or_path is not models/quantized it was trained on the float model.
        model: ONNX model folder that `export` wrote.
        out: file to write, in onnxruntime's adapter format.

    Raises:
        UserError: the folder holds no adapter, or one that is not a plain LoRA or does not fit the
            model; names the first field or tensor that does not. There is too little space.
    """
    import onnxruntime

    contract = json.loads((model / "adapter_inputs.json").read_text("utf-8"))
    config = read_config(adapter)
    for field, allowed in PLAIN_LORA.items():
        if config.get(field) not in allowed:
            raise UserError(
                f"{adapter}/adapter_config.json: {field} is {config.get(field)!r}, and only "
                f"{allowed[0]!r} can be converted: an adapter input holds the A and B of a linear"
            )
    tensors = read_tensors(adapter / "adapter_model.safetensors", contract)
    if config.get("base_model_name_or_path") != str(stage.QUANTIZED):
        tensors = over_folds(tensors, model, contract)
    stage.progress(1, 3, "adapter read")
    values = {}
    for entry in contract["inputs"]:
        a, b = inputs(entry, tensors, config)
        # onnxruntime reads the memory as it lies, so a transposed view would be read wrong.
        values[entry["A"]] = a.astype(contract["dtype"], order="C")
        values[entry["B"]] = b.astype(contract["dtype"], order="C")
    check_space(out.parent, sum(value.nbytes for value in values.values()))
    adapter_format = onnxruntime.AdapterFormat()
    adapter_format.set_adapter_version(1)
    adapter_format.set_model_version(1)
    adapter_format.set_parameters(
        {k: onnxruntime.OrtValue.ortvalue_from_numpy(v) for k, v in sorted(values.items())}
    )
    adapter_format.export_adapter(str(out))
    stage.progress(2, 3, "adapter written")
    check(out, model, values)
    stage.progress(3, 3, "adapter tried")


def read_config(adapter: Path) -> dict:
    """PEFT's adapter_config.json, where the weights lie beside it."""
    path = adapter / "adapter_config.json"
    for needed in (path, adapter / "adapter_model.safetensors"):
        if not needed.is_file():
            pickled = (adapter / "adapter_model.bin").exists()
            hint = "; a pickle is not read: save it as safetensors" if pickled else ""
            raise UserError(f"{needed}: not there; expected a folder that PEFT wrote{hint}")
    try:
        return json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise UserError(f"{path}: not JSON: {error}") from None


def read_tensors(path: Path, contract: dict) -> dict[str, ndarray]:
    """The adapter's tensors by "MODULE.lora_A" and "MODULE.lora_B", each as the contract wants it.

    Raises:
        UserError: a tensor of another module, of another kind, type or shape, or one is missing.
    """
    from safetensors import safe_open

    shapes: dict[str, tuple[Any, Any]] = {}
    for entry in contract["inputs"]:
        for source in entry["sources"]:
            module = source["module"]
            rows = max(source["rows"][1], shapes.get(f"{module}.lora_B", (0,))[0])
            shapes[f"{module}.lora_A"] = ("r", entry["in_features"])
            shapes[f"{module}.lora_B"] = (rows, "r")
    found = {}
    with safe_open(path, "numpy") as file:
        for key in sorted(file.keys()):
            name = key.removeprefix(PREFIX).removesuffix(".weight")
            if name not in shapes:
                modules = sorted({n.rpartition(".")[0].rpartition(".")[2] for n in shapes})
                raise UserError(
                    f"{path}: {key} has no input in the ONNX model, which takes lora_A and lora_B "
                    f"of {', '.join(modules)}; see finetune.target_modules"
                )
            dtype = file.get_slice(key).get_dtype()
            if dtype not in ("F32", "F16"):
                raise UserError(f"{path}: {key} is {dtype}; save the adapter as float32 or float16")
            found[name] = file.get_tensor(key)
    for name, wanted in shapes.items():
        if name not in found:
            raise UserError(f"{path}: {PREFIX}{name}.weight is missing; the ONNX model takes it")
        shape = found[name].shape
        fits = len(shape) == 2 and all(w in ("r", s) for w, s in zip(wanted, shape, strict=True))
        if not fits:
            raise UserError(
                f"{path}: {PREFIX}{name}.weight is {shape}, and the ONNX model takes "
                f"({wanted[0]}, {wanted[1]}): it was trained on another model"
            )
    return found


def over_folds(tensors: dict[str, ndarray], model: Path, contract: dict) -> dict[str, ndarray]:
    """An update of the float model as one of the model with scales folded in.

    (B / s_out) (A s_in) for B A, with the scales that the quantizer folded; see `FoldScales` in
    passes/folding.py.

    Args:
        tensors: as `read_tensors` gives them.
        model: the ONNX model's folder.
        contract: its adapter_inputs.json.
    """
    from safetensors.numpy import load_file

    scales = load_file(model / contract["folds"]) if "folds" in contract else {}
    found = dict(tensors)
    for name, s in scales.items():
        module, _, side = name.rpartition(".")
        a, b = f"{module}.lora_A", f"{module}.lora_B"
        if a in found and side == "s_in":
            found[a] = found[a] * s
        elif b in found and side == "s_out":
            found[b] = found[b] / s[:, None]
    return found


def inputs(entry: dict, tensors: dict[str, ndarray], config: dict) -> tuple[ndarray, ndarray]:
    """A (in_features, rank) and B (rank, out_features) of one projection; B holds the scale.

    The rank is the sum of the sources' ranks.

    Raises:
        UserError: a source's A and B differ in rank.
    """
    import numpy as np

    a_parts, b_parts = [], []
    for source in entry["sources"]:
        module = source["module"]
        a, b = tensors[f"{module}.lora_A"], tensors[f"{module}.lora_B"]
        if a.shape[0] != b.shape[1]:
            raise UserError(
                f"{PREFIX}{module}: lora_A has rank {a.shape[0]}, lora_B has rank {b.shape[1]}"
            )
        part = np.zeros((a.shape[0], entry["out_features"]), np.float32)
        rows = b[slice(*source["rows"])].astype(np.float32)
        part[:, slice(*source["columns"])] = rows.T * scale(config, module, a.shape[0])
        a_parts.append(a.T)
        b_parts.append(part)
    return np.concatenate(a_parts, 1), np.concatenate(b_parts, 0)


def scale(config: dict, module: str, rank: int) -> float:
    """alpha / r, or alpha / sqrt(r) for rank-stabilised LoRA (arXiv 2312.03732)."""
    alpha = config["lora_alpha"]
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if module == pattern or module.endswith(f".{pattern}"):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def check(adapter: Path, model: Path, values: dict[str, ndarray]) -> None:
    """Read the file back, and run one token with it if the model is for this machine's CPU."""
    import numpy as np
    import onnxruntime

    reader = onnxruntime.AdapterFormat.read_adapter(str(adapter))  # owns what it returns
    back = reader.get_parameters()
    if sorted(back) != sorted(values) or not all(
        np.array_equal(back[k].numpy(), v) for k, v in values.items()
    ):
        raise RuntimeError(f"{adapter} does not hold what was written to it")
    config = json.loads((model / "genai_config.json").read_text("utf-8"))
    if config["model"]["decoder"]["session_options"]["provider_options"]:
        return
    import onnxruntime_genai as og

    loaded = og.Model(str(model))
    adapters = og.Adapters(loaded)
    adapters.load(str(adapter), "adapter")
    search = og.GeneratorParams(loaded)
    search.set_search_options(max_length=2)
    generator = og.Generator(loaded, search)
    generator.set_active_adapter(adapters, "adapter")
    generator.append_tokens([config["model"]["bos_token_id"]])
    if not np.isfinite(generator.get_logits()).all():
        raise UserError(f"{adapter}: the model gives no finite logits with it; train it again")


if __name__ == "__main__":
    stage.run(main, "convert")
