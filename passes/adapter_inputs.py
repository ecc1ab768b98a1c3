"""Adapter weights as inputs of an ONNX graph: one model serves any LoRA adapter, or none."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx
from olive.hardware.accelerator import AcceleratorSpec
from olive.model import ONNXModelHandler
from olive.passes import Pass
from olive.passes.pass_config import BasePassConfig, PassConfigParam
from onnx import GraphProto, NodeProto, TensorProto, helper, numpy_helper

CONTRACT = "adapter_inputs.json"
ZERO = "lora_zero"
ROWS = "lora_rows"  # an input of the graph: which rows of a batch get which ranks of x A
# What one projection is made of where the other side packs or splits it, in the order of its rows.
PARTS = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
PROJECTION = re.compile(r"(/model/layers\.(\d+)/\w+/(\w+))/MatMul(NBits)?")


class NotInGraph(ValueError):
    """A module to adapt has no projection of its own in the ONNX graph."""


@dataclass
class Source:
    """One linear of the PyTorch model that adds to a projection of the graph."""

    module: str
    """Its name in the PyTorch model."""
    rows: tuple[int, int]
    """Output features of the module that are used: lora_B.weight[rows[0] : rows[1]]."""
    columns: tuple[int, int]
    """Where in the projection's output they go."""


@dataclass
class Projection:
    """y = x W of the graph, to become y = x W + (x A) B."""

    node: NodeProto
    name: str
    """For instance model.layers.0.attn.qkv_proj."""
    out_features: int


class AdapterInputs(Pass):
    """Add (x A where rows, else 0) B to each adapted projection; A, B and rows are graph inputs.

    A is (in_features, rank) and B (rank, out_features), in the graph's own floating type; the rank
    may differ from input to input and call to call. Both have an initializer of rank 0 by the same
    name, which makes the input optional and the projection what it was. B holds alpha / r.

    `lora_rows`, one input for all projections, is bool (batch_size, 1, rank), by default a single
    true. With the A of several adapters side by side, and their B below each other, true where a
    row's own adapter is gives each row of a batch another adapter (or none) in one call. The rank
    must then be the same for all projections. It chooses and does not multiply, so that what
    overflows in one adapter stays in its own rows.

    The graph's weights are not read or written. `adapter_inputs.json` beside the model says what
    an adapter must be: see `contract`.
    """

    @classmethod
    def _default_config(cls, accelerator_spec: AcceleratorSpec) -> dict[str, PassConfigParam]:
        return {
            "target_modules": PassConfigParam(
                type_=list[str], required=True, description="Last parts of the adapted names."
            ),
            "modules": PassConfigParam(
                type_=dict[str, tuple[int, int]],
                required=True,
                description="(out_features, in_features) of each linear of the PyTorch model.",
            ),
        }

    def _run_for_config(
        self, model: ONNXModelHandler, config: type[BasePassConfig], output_model_path: str
    ) -> ONNXModelHandler:
        """Edit the graph, in place if `output_model_path` is the model's own folder.

        Raises:
            NotInGraph: a target module is not in the graph.
        """
        path = Path(model.model_path)
        folder = Path(output_model_path)
        if folder.resolve() != path.parent.resolve():
            shutil.copytree(path.parent, folder, dirs_exist_ok=True)
        proto = onnx.load(path, load_external_data=False)
        sources = placed(proto.graph, config.modules, config.target_modules)
        dtype = next(i for i in proto.graph.input if i.name.startswith("past_key_values"))
        elem_type = dtype.type.tensor_type.elem_type
        nodes, inputs = [], []
        if sources:
            add_rows(proto.graph, elem_type)
        for node in proto.graph.node:
            nodes.append(node)
            if node.name in sources:
                projection, parts = sources[node.name]
                in_features = config.modules[parts[0].module][1]
                nodes += add_update(proto.graph, projection, in_features, elem_type)
                inputs.append(contract(projection, parts, in_features))
        del proto.graph.node[:]
        proto.graph.node.extend(nodes)
        onnx.save(proto, folder / path.name)
        numpy_name = helper.tensor_dtype_to_np_dtype(elem_type).name
        about = {"dtype": numpy_name, "inputs": inputs, "rows": ROWS}
        text = json.dumps(about, indent=2, sort_keys=True)
        (folder / CONTRACT).write_text(text + "\n", "utf-8")
        return ONNXModelHandler(str(folder), onnx_file_name=path.name)


def contract(projection: Projection, parts: list[Source], in_features: int) -> dict:
    """What the two inputs of a projection must be.

    A is the `lora_A.weight` of the sources, transposed, side by side; B has the rows of their
    `lora_B.weight`, transposed and times alpha / r, in each source's own ranks and columns, and 0
    elsewhere.
    """
    return {
        "A": f"{projection.name}.lora_A",
        "B": f"{projection.name}.lora_B",
        "in_features": in_features,
        "out_features": projection.out_features,
        "sources": [asdict(part) for part in parts],
    }


def projections(graph: GraphProto) -> dict[tuple[int, str], Projection]:
    """The linears of the layers, by the layer's number and the last part of the name."""
    widths = {
        value.name: value.type.tensor_type.shape.dim[-1].dim_value
        for value in graph.value_info
        if value.type.tensor_type.shape.dim
    }
    found = {}
    for node in graph.node:
        if match := PROJECTION.fullmatch(node.name):
            name = match[1][1:].replace("/", ".")
            found[int(match[2]), match[3]] = Projection(node, name, widths[node.output[0]])
    return found


def placed(
    graph: GraphProto, modules: dict[str, tuple[int, int]], target_modules: list[str]
) -> dict[str, tuple[Projection, list[Source]]]:
    """For each node that is adapted, its projection and the PyTorch modules it comes from.

    Raises:
        NotInGraph: a target module is not in the graph.
    """
    found = projections(graph)
    sources: dict[str, tuple[Projection, list[Source]]] = {}
    for module in modules:
        if module.rpartition(".")[2] in target_modules:
            for projection, source in places(found, modules, module):
                sources.setdefault(projection.node.name, (projection, []))[1].append(source)
    for _, parts in sources.values():
        parts.sort(key=lambda part: part.columns)
    return sources


def places(
    found: dict[tuple[int, str], Projection], modules: dict[str, tuple[int, int]], module: str
) -> Iterator[tuple[Projection, Source]]:
    """Where in the graph the output features of one PyTorch module are."""
    out_features = modules[module][0]
    parent, _, leaf = module.rpartition(".")
    layer = next(int(part) for part in parent.split(".") if part.isdigit())
    whole = next((w for w, parts in PARTS.items() if leaf in parts), None)
    if projection := found.get((layer, leaf)):
        yield projection, Source(module, (0, out_features), (0, out_features))
    elif leaf in PARTS and all((layer, part) in found for part in PARTS[leaf]):
        start = 0
        for part in PARTS[leaf]:
            projection = found[layer, part]
            end = start + projection.out_features
            yield projection, Source(module, (start, end), (0, end - start))
            start = end
    elif whole and (projection := found.get((layer, whole))):
        before = PARTS[whole][: PARTS[whole].index(leaf)]
        start = sum(modules[f"{parent}.{part}"][0] for part in before)
        yield projection, Source(module, (0, out_features), (start, start + out_features))
    else:
        raise NotInGraph(f"{module} is not among the projections of the ONNX graph")


def add_rows(graph: GraphProto, elem_type: int) -> None:
    """Add the input `lora_rows`, with its default, and the 0 that it chooses elsewhere."""
    shape: list[int | str] = ["lora_batch_size", 1, "lora_rank"]
    graph.input.append(helper.make_tensor_value_info(ROWS, TensorProto.BOOL, shape))
    graph.initializer.append(numpy_helper.from_array(np.ones((1, 1, 1), bool), ROWS))
    zero = np.zeros((), helper.tensor_dtype_to_np_dtype(elem_type))
    graph.initializer.append(numpy_helper.from_array(zero, ZERO))


def add_update(
    graph: GraphProto, projection: Projection, in_features: int, elem_type: int
) -> list[NodeProto]:
    """Add the inputs A and B; return the nodes that follow the projection's own."""
    name, node = projection.name, projection.node
    a, b, rank = f"{name}.lora_A", f"{name}.lora_B", f"{name}.rank"
    shapes: dict[str, list[int | str]] = {
        a: [in_features, rank],
        b: [rank, projection.out_features],
    }
    for tensor, shape in shapes.items():
        graph.input.append(helper.make_tensor_value_info(tensor, elem_type, shape))
        dims = [0 if isinstance(dim, str) else dim for dim in shape]
        graph.initializer.append(TensorProto(name=tensor, data_type=elem_type, dims=dims))
    prefix = node.name.rpartition("/")[0]
    output, base = node.output[0], f"{prefix}/base"
    node.output[0] = base
    return [
        helper.make_node("MatMul", [node.input[0], a], [f"{prefix}/xA"], f"{prefix}/lora_A/MatMul"),
        helper.make_node(
            "Where", [ROWS, f"{prefix}/xA", ZERO], [f"{prefix}/own"], f"{prefix}/lora_rows/Where"
        ),
        helper.make_node(
            "MatMul", [f"{prefix}/own", b], [f"{prefix}/xAB"], f"{prefix}/lora_B/MatMul"
        ),
        helper.make_node("Add", [base, f"{prefix}/xAB"], [output], f"{prefix}/lora/Add"),
    ]
