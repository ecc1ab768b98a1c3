"""Turn a trained adapter into the file that onnxruntime loads beside models/onnx."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from stages import stage
from stages.errors import UserError, shortened
from stages.fetch import check_space
from stages.params import Params
from stages.reading import json_object, tensors

if TYPE_CHECKING:
    from numpy import ndarray

SIDES = {"s_in": "A", "s_out": "B"}  # of the scales: which half of an update they go into
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


Count = Annotated[int, Field(ge=0, le=1 << 24)]


class Source(BaseModel, strict=True):
    """A linear of the model, and where its update goes in the projection."""

    module: str
    rows: Annotated[list[Count], Field(min_length=2, max_length=2)]
    columns: Annotated[list[Count], Field(min_length=2, max_length=2)]


class Input(BaseModel, strict=True):
    """A projection of the exported model that takes an adapter."""

    A: str
    B: str
    in_features: Count
    out_features: Count
    sources: Annotated[list[Source], Field(min_length=1)]

    @model_validator(mode="after")
    def fits(self) -> Input:
        for source in self.sources:
            (first, end), (left, right) = source.rows, source.columns
            if not 0 <= end - first == right - left <= right <= self.out_features:
                raise ValueError(f"rows and columns of {source.module} do not fit each other")
        return self


class Contract(BaseModel, strict=True, extra="allow"):
    """What of adapter_inputs.json is read here."""

    dtype: Literal["float32", "float16"]
    inputs: list[Input]
    folds: Annotated[str, Field(pattern=r"^\w[\w.-]*(/\w[\w.-]*)*$")] | None = None
    """Path in the folder, of the scales that the quantizer folded."""


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

    values = weights(adapter, model)
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


def weights(adapter: Path, model: Path) -> dict[str, ndarray]:
    """The adapter as the inputs of the model, by their names.

    Raises:
        UserError: as `convert`.
    """
    import numpy as np

    contract = read_contract(model)
    config = read_config(adapter)
    adapted = read_tensors(adapter / "adapter_model.safetensors", contract)
    if config.get("base_model_name_or_path") != str(stage.QUANTIZED):
        adapted = over_folds(adapted, model, contract)
    stage.progress(1, 3, "adapter read")
    values = {}
    for entry in contract["inputs"]:
        with np.errstate(all="ignore"):  # looked at below
            a, b = inputs(entry, adapted, config)
            # onnxruntime reads the memory as it lies, so a transposed view would be read wrong.
            values[entry["A"]] = a.astype(contract["dtype"], order="C")
            values[entry["B"]] = b.astype(contract["dtype"], order="C")
        for name in (entry["A"], entry["B"]):
            if not np.isfinite(values[name]).all():
                raise UserError(
                    f"{adapter}: {name} holds what is no finite number in {contract['dtype']}; "
                    "train it again"
                )
    return values


def read_contract(model: Path) -> dict:
    """adapter_inputs.json, as passes/adapter_inputs.py writes it.

    Raises:
        UserError: it is missing or damaged, or names a file outside of the folder.
    """
    path = model / "adapter_inputs.json"
    try:
        return Contract.model_validate(json_object(path)).model_dump(exclude_none=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise UserError(f"{path}: {where}: {first['msg']}; `olivepress run` restores it") from None


def read_config(adapter: Path) -> dict:
    """PEFT's adapter_config.json, where the weights lie beside it.

    Raises:
        UserError: one of the two is missing; it is not a plain LoRA's.
    """
    path = adapter / "adapter_config.json"
    for needed in (path, adapter / "adapter_model.safetensors"):
        if not needed.is_file():
            pickled = (adapter / "adapter_model.bin").exists()
            hint = "; a pickle is not read: save it as safetensors" if pickled else ""
            raise UserError(f"{needed}: not there; expected a folder that PEFT wrote{hint}")
    config = json_object(path)
    for field, allowed in PLAIN_LORA.items():
        if config.get(field) not in allowed:
            raise UserError(
                f"{path}: {field} is {shortened(config.get(field))}, and only {allowed[0]!r} can "
                "be converted: an adapter input holds the A and B of a linear"
            )
    patterns = config.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{path}: alpha_pattern is {shortened(patterns)} and no mapping")
    for name, alpha in {"lora_alpha": config.get("lora_alpha"), **patterns}.items():
        if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not abs(alpha) < 3e38:
            raise UserError(f"{path}: {shortened(name)} is {shortened(alpha)} and no finite number")
    return config


def read_tensors(path: Path, contract: dict) -> dict[str, ndarray]:
    """The adapter's tensors by "MODULE.lora_A" and "MODULE.lora_B", each as the contract wants it.

    Raises:
        UserError: a tensor of another module, of another kind, type or shape, or one is missing.
    """
    shapes: dict[str, tuple[Any, Any]] = {}
    for entry in contract["inputs"]:
        for source in entry["sources"]:
            module = source["module"]
            rows = max(source["rows"][1], shapes.get(f"{module}.lora_B", (0,))[0])
            shapes[f"{module}.lora_A"] = ("r", entry["in_features"])
            shapes[f"{module}.lora_B"] = (rows, "r")
    found = {}
    with tensors(path) as file:
        for key in sorted(file.keys()):
            name = key.removeprefix(PREFIX).removesuffix(".weight")
            if name not in shapes:
                modules = sorted({n.rpartition(".")[0].rpartition(".")[2] for n in shapes})
                raise UserError(
                    f"{path}: {key} has no input in the ONNX model, which takes lora_A and lora_B "
                    f"of {', '.join(modules)}; see finetune.target_modules"
                )
            part = file.get_slice(key)
            dtype, shape = part.get_dtype(), tuple(part.get_shape())
            if dtype not in ("F32", "F16"):
                raise UserError(f"{path}: {key} is {dtype}; save the adapter as float32 or float16")
            wanted = shapes[name]
            if not _fits(shape, wanted):
                raise UserError(
                    f"{path}: {key} is {shape}, and the ONNX model takes "
                    f"({wanted[0]}, {wanted[1]}): it was trained on another model"
                )
            found[name] = file.get_tensor(key)
    for name in shapes:
        if name not in found:
            raise UserError(f"{path}: {PREFIX}{name}.weight is missing; the ONNX model takes it")
    return found


def _fits(shape: tuple[int, ...], wanted: tuple[Any, Any]) -> bool:
    """Whether a tensor has the shape that is wanted, where `r` is any rank."""
    same = len(shape) == 2 and all(w in ("r", s) for w, s in zip(wanted, shape, strict=True))
    return same and 0 not in shape


def over_folds(adapted: dict[str, ndarray], model: Path, contract: dict) -> dict[str, ndarray]:
    """An update of the float model as one of the model with scales folded in.

    (B / s_out) (A s_in) for B A, with the scales that the quantizer folded; see `FoldScales` in
    passes/folding.py.

    Args:
        adapted: as `read_tensors` gives them.
        model: the ONNX model's folder.
        contract: its adapter_inputs.json.
    """
    if "folds" not in contract:
        return adapted
    path = model / contract["folds"]
    found = dict(adapted)
    with tensors(path) as file:
        for name in file.keys():  # noqa: SIM118 (not a dict)
            module, _, side = name.rpartition(".")
            key = f"{module}.lora_{SIDES.get(side)}"
            if key not in found:
                continue
            part = file.get_slice(name)
            size = found[key].shape[1 if side == "s_in" else 0]
            if part.get_dtype() != "F32" or part.get_shape() != [size]:
                raise UserError(f"{path}: {name} is not {size} numbers of float32")
            s = file.get_tensor(name)
            found[key] = found[key] * s if side == "s_in" else found[key] / s[:, None]
    return found


def inputs(entry: dict, adapted: dict[str, ndarray], config: dict) -> tuple[ndarray, ndarray]:
    """A (in_features, rank) and B (rank, out_features) of one projection; B holds the scale.

    The rank is the sum of the sources' ranks.

    Raises:
        UserError: a source's A and B differ in rank.
    """
    import numpy as np

    a_parts, b_parts = [], []
    for source in entry["sources"]:
        module = source["module"]
        a, b = adapted[f"{module}.lora_A"], adapted[f"{module}.lora_B"]
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
    config = json_object(model / "genai_config.json")
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
