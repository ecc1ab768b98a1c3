"""Export the quantized model to ONNX for onnxruntime-genai, with inputs for an adapter."""

from __future__ import annotations

import json
import logging
import math
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages import stage
from stages.errors import UserError
from stages.params import Export, Params
from stages.targets import target_shapes

if TYPE_CHECKING:
    from numpy import ndarray

PROVIDERS = {
    "cpu": "CPUExecutionProvider",
    "cuda": "CUDAExecutionProvider",
    "dml": "DmlExecutionProvider",
    "webgpu": "WebGpuExecutionProvider",
    "NvTensorRtRtx": "NvTensorRTRTXExecutionProvider",
}
# DirectML (microsoft/onnxruntime#21483) and WebGPU (seen) refuse a product over an inner dimension
# of 0, and for TensorRT nobody says; so there an adapter input is by default of rank 1, and zero.
NO_EMPTY = {"dml", "webgpu", "NvTensorRtRtx"}
LM_HEAD: dict[str, dict[str, Any]] = {
    "float": {"int4_nodes_to_exclude": ["/lm_head/MatMul"]},
    "int8": {"int4_algo_config": "rtn_last"},
    "int4": {"int4_algo_config": "rtn"},
}


def main(params: Params) -> None:
    """Write models/onnx."""
    with stage.new_output(stage.ONNX) as out:
        export(stage.QUANTIZED, out, params.export, params.finetune.target_modules)


def export(model: Path, out: Path, params: Export, target_modules: list[str]) -> None:
    """Write a folder that onnxruntime-genai loads, and `adapter_inputs.json`.

    The weights of a quantized model are copied bit for bit.

    Args:
        model: Hugging Face folder, quantized by Olive or float.
        out: folder to write.
        params: the `export` section.
        target_modules: last parts of the names of the linear layers that an adapter may change.

    Raises:
        UserError: the builder does not know the architecture, the provider cannot run these
            weights, or a target module does not exist.
    """
    config = json.loads((model / "config.json").read_text("utf-8"))
    quantization = config.get("quantization_config")
    modules = target_shapes(model, target_modules)
    if quantization is not None:
        check_quantized(params, quantization)
    elif params.lm_head != "float":
        print(f"the model is float, and so its head stays float, not {params.lm_head}")

    from olive.hardware.accelerator import AcceleratorSpec
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict

    from passes.adapter_inputs import CONTRACT, AdapterInputs, NotInGraph
    from passes.folding import FOLDS

    device = AcceleratorSpec(params.device, PROVIDERS[params.provider])
    stage.progress(0, 3, "building the graph")
    onnx_model = build(HfModelHandler(str(model)), out, params, quantization, device)
    stage.progress(1, 3, "adding adapter inputs")
    pass_config = {"target_modules": target_modules, "modules": modules}
    adapter_inputs = create_pass_from_dict(AdapterInputs, pass_config, True, device)
    try:
        adapter_inputs.run(onnx_model, str(out))
    except NotInGraph as error:
        raise UserError(f"params.yaml: finetune.target_modules: {error}") from error
    if params.provider in NO_EMPTY:
        set_defaults(out / "model.onnx", {})
    tidy(out)
    if (model / FOLDS).exists():
        shutil.copytree((model / FOLDS).parent, (out / FOLDS).parent)
        contract = stage.read_json(out / CONTRACT) | {"folds": FOLDS.as_posix()}
        stage.write_json(out / CONTRACT, contract)
    stage.progress(2, 3, "trying the model")
    check(out, params)
    stage.progress(3, 3, "exported")


def check_quantized(params: Export, quantization: dict) -> None:
    """Refuse what the builder or the kernels cannot do with these weights.

    Raises:
        UserError: names the setting to change.
    """
    if params.provider == "NvTensorRtRtx":
        if quantization["bits"] != 4:
            raise UserError(
                "params.yaml: export.provider NvTensorRtRtx takes quantize.bits 4, not "
                f"{quantization['bits']}"
            )
        if params.lm_head != "float":
            raise UserError(
                "params.yaml: export.provider NvTensorRtRtx takes export.lm_head float, not "
                f"{params.lm_head}: the builder leaves it float there"
            )
        if not quantization["symmetric"]:
            raise UserError(
                "params.yaml: export.provider NvTensorRtRtx takes quantize.symmetric true: "
                "TensorRT knows no zero points"
            )


def build(model: Any, out: Path, params: Export, quantization: dict | None, device: Any) -> Any:
    """Run Olive's ModelBuilder with a cache folder of its own."""
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx import model_builder

    from passes.streaming import StreamingModelBuilder

    # They say of every node that it is not quantized, and that 2 GB are better read from a file.
    logging.getLogger("onnxruntime.quantization.matmul_nbits_quantizer").setLevel(logging.WARNING)
    logging.getLogger("neural_compressor").setLevel(logging.ERROR)
    extra: dict[str, Any] = {"hf_remote": False, "hf_token": "false"}
    if params.provider == "NvTensorRtRtx":
        extra["disable_qkv_fusion"] = True  # Olive fuses to MatMulNBits in a graph without others
    config: dict[str, Any] = {"extra_options": extra}
    if quantization is not None:
        config |= {"precision": "int4", "int4_accuracy_level": params.accuracy_level}
        config |= LM_HEAD[params.lm_head]
    else:
        config["precision"] = "fp32" if params.provider == "cpu" else "fp16"
    builder = create_pass_from_dict(StreamingModelBuilder, config, True, device)
    with tempfile.TemporaryDirectory() as cache:
        # It would use, and on failure clean, the user's own Hugging Face cache.
        model_builder.HF_HUB_CACHE = cache
        try:
            return builder.run(model, str(out))
        except NotImplementedError as error:
            raise UserError(
                f"export: onnxruntime-genai cannot build this model: {error}"
            ) from error


def set_defaults(path: Path, values: dict[str, ndarray]) -> None:
    """Give the adapter inputs of a model these defaults, or zeros of rank 1 in place of rank 0."""
    import onnx

    model = onnx.load(path, load_external_data=False)
    for initializer in model.graph.initializer:
        if initializer.name in values:
            value = values[initializer.name]
            initializer.dims[:], initializer.raw_data = value.shape, value.tobytes()
        elif 0 in initializer.dims:
            initializer.dims[:] = [dim or 1 for dim in initializer.dims]
            dtype = onnx.helper.tensor_dtype_to_np_dtype(initializer.data_type)
            initializer.raw_data = bytes(dtype.itemsize * math.prod(initializer.dims))
    onnx.save(model, path)


def tidy(out: Path) -> None:
    """Set what the builder leaves open in genai_config.json."""
    path = out / "genai_config.json"
    config = json.loads(path.read_text("utf-8"))
    config["search"]["past_present_share_buffer"] = False
    if not config["model"]["decoder"]["session_options"]["provider_options"]:
        # As many as there are cores. genai's own choice is half the processors: on 2 cores without
        # hyper-threads that took 1.4 times as long for a token (benchmarks/NOTES.md).
        config["model"]["decoder"]["session_options"]["intra_op_num_threads"] = 0
    stage.write_json(path, config)


def check(out: Path, params: Export) -> None:
    """Run one token, where the provider is this machine's CPU."""
    if params.provider != "cpu":
        return
    import numpy as np
    import onnxruntime_genai as og

    model = og.Model(str(out))
    generator = og.Generator(model, og.GeneratorParams(model))
    generator.append_tokens([0])
    if not np.isfinite(generator.get_logits()).all():
        raise UserError(f"{out}: the exported model gives no finite logits")


if __name__ == "__main__":
    stage.run(main, "export", stage.TORCH_MB)
