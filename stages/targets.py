"""The linear layers that an adapter may change: `finetune` and `export` check them by one rule."""

from __future__ import annotations

import json
import re
from pathlib import Path

from stages.errors import UserError

LAYER = re.compile(r"\.(layers|h)\.\d+\.")  # inside a decoder's block, so not the head


def target_shapes(model: Path, target_modules: list[str]) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of every linear of the blocks, by its full name.

    Args:
        model: Hugging Face folder, quantized by Olive or float; only headers are read.
        target_modules: each the last part of the name of at least one linear.

    Raises:
        UserError: a target names no linear; lists the names there are.
    """
    shapes = linear_shapes(model)
    names = sorted({name.rpartition(".")[2] for name in shapes})
    for target in target_modules:
        if target not in names:
            raise UserError(
                f"params.yaml: finetune.target_modules: {target} is no linear layer of the model; "
                f"it has {', '.join(names)}"
            )
    return shapes


def linear_shapes(model: Path) -> dict[str, tuple[int, int]]:
    """(out_features, in_features) of the linears of the blocks, from the checkpoint's headers."""
    from safetensors import safe_open

    config = json.loads((model / "config.json").read_text("utf-8"))
    quantization = config.get("quantization_config")
    shapes = {}
    for path in sorted(model.glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            for key in file.keys():  # noqa: SIM118 (not a dict)
                name, _, kind = key.rpartition(".")
                shape = file.get_slice(key).get_shape()
                if not LAYER.search(name) or len(shape) != 2:
                    continue
                if kind == "weight":
                    shapes[name] = (shape[0], shape[1])
                elif kind == "qweight" and quantization is not None:
                    override = (quantization["overrides"] or {}).get(name, {})
                    bits = override.get("bits", quantization["bits"])
                    shapes[name] = (shape[0], shape[1] * 8 // bits)
    return shapes
