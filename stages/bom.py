"""The bill of materials of a package: CycloneDX 1.6 JSON, with all that the model was made from.

It is written by CycloneDX's own library, but for `modelCard`, which the library has no class for
yet, and follows from the package's files alone: its serial number is a UUID of its content, and it
has no time. README.md, lineage.json and the figures are not in it, as they say when and how fast.
"""

from __future__ import annotations

import json
import re
import uuid
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.stage import LIBRARIES, as_json

if TYPE_CHECKING:
    from cyclonedx.model import HashType
    from cyclonedx.model.component import Component

BOM = "bom.cdx.json"
PINNED = re.compile(r"([A-Za-z0-9._-]+)==([^\s;]+)")
ROOT, BASE_REF = "package", "base"
FILE, DATA, LIBRARY = "file:", "data:", "library:"  # begin the bom-ref of each
PURPOSE = "olivepress:used_by"
# Figures that are the same each time, by what they are called in an evaluation.
FIGURES = {"perplexity": "perplexity", "exact_answer_rate": "exact answer rate"}


def libraries(lock: str, toolchain: dict[str, str]) -> dict[str, str]:
    """Name -> version: what the lock pins, and the versions found of what `toolchain` looks at."""
    pinned = {m[1]: m[2] for m in map(PINNED.match, lock.splitlines()) if m}
    return {name: v for name, v in pinned.items() if name not in LIBRARIES} | toolchain


def write(
    manifest: dict[str, Any],
    *,
    metrics: dict[str, dict],
    lineage: dict[str, dict],
    sums: dict[str, str],
    base: dict[str, dict[str, str]],
    used: dict[str, str],
) -> str:
    """The text of bom.cdx.json.

    Args:
        manifest: as olivepress.json.
        metrics: adapter -> its figures, as `evaluate` writes them.
        lineage: as lineage.json.
        sums: file of the package -> SHA-256 in hex; of those that follow from the inputs.
        base: file of the base model -> algorithm, `SHA-256` or `MD5` -> digest in hex.
        used: library -> version.
    """
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.lifecycle import LifecyclePhase, PredefinedLifecycle
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output import make_outputter
    from cyclonedx.schema import OutputFormat, SchemaVersion

    datasets = data_of(lineage)
    model = _model(manifest, base)
    taught = set(manifest["adapters"].values())
    files = [_file(name, {"SHA-256": sums[name]}, model=name in taught) for name in sums]
    data = [_data(path, about) for path, about in datasets.items()]
    tools = [_library(name, version) for name, version in used.items()]
    bom = Bom(
        serial_number=uuid.UUID(int=0),
        metadata=BomMetaData(
            component=model,
            lifecycles=[PredefinedLifecycle(LifecyclePhase.BUILD)],
            tools=ToolRepository(
                components=[Component(name="olivepress", type=ComponentType.APPLICATION)]
            ),
        ),
        components=[*files, *data, *tools],
    )
    bom.register_dependency(model, [*files, *data, *tools])
    for name, path in manifest["adapters"].items():
        with_data = [one for one in data if one.name == manifest["data"][name]]
        bom.register_dependency(next(one for one in files if one.name == path), with_data)
    outputter = make_outputter(bom, OutputFormat.JSON, SchemaVersion.V1_6)
    written = json.loads(outputter.output_as_string())
    del written["metadata"]["timestamp"]
    written["metadata"]["component"]["modelCard"] = _card(metrics, datasets)
    return numbered(written)


def numbered(written: dict[str, Any]) -> str:
    """A BOM as text, with a serial number that follows from all the rest of it."""
    rest = {key: value for key, value in written.items() if key != "serialNumber"}
    serial = uuid.uuid5(uuid.NAMESPACE_URL, json.dumps(rest, sort_keys=True, ensure_ascii=False))
    return as_json(rest | {"serialNumber": f"urn:uuid:{serial}"})


def read(written: dict[str, Any]) -> tuple[dict[str, str], dict[str, dict], dict[str, str]]:
    """(sums, base, used) of a BOM, as `write` takes them.

    Raises:
        KeyError, TypeError, ...: it has not the form of one that is written here.
    """

    def hashes(component: dict[str, Any]) -> dict[str, str]:
        return {one["alg"]: one["content"] for one in component["hashes"]}

    parts = written["components"]
    ancestor = written["metadata"]["component"]["pedigree"]["ancestors"][0]
    return (
        {c["name"]: hashes(c)["SHA-256"] for c in parts if c["bom-ref"].startswith(FILE)},
        {c["name"]: hashes(c) for c in ancestor.get("components", [])},
        {c["name"]: c["version"] for c in parts if c["bom-ref"].startswith(LIBRARY)},
    )


def data_of(lineage: dict[str, dict]) -> dict[str, dict[str, Any]]:
    """Each data file that a stage read: path -> `hashes` by algorithm, and stages, `used_by`.

    That is what no stage made and is no code. A folder, with a digest of its listing, is no data
    file either: of base.source local it is the base model.
    """
    made = [out for entry in lineage.values() for out in entry.get("outs", {})]
    found: dict[str, dict[str, Any]] = {}
    for stage, entry in lineage.items():
        sha256 = (entry.get("record") or {}).get("data") or {}
        for path, digest in entry.get("deps", {}).items():
            inside = any(path == out or path.startswith(f"{out}/") for out in made)
            if inside or path.endswith((".py", ".lock")) or digest.endswith(".dir"):
                continue
            hashes = {"MD5": digest.removeprefix("md5:")}
            about = found.setdefault(path, {"hashes": hashes, "used_by": []})
            about["used_by"].append(stage)
            if path in sha256:
                about["hashes"]["SHA-256"] = sha256[path]
    return found


def _model(manifest: dict[str, Any], base: dict[str, dict[str, str]]) -> Component:
    """The package as a component, with the base model as its ancestor."""
    from cyclonedx.model import ExternalReference, ExternalReferenceType, Property, XsUri
    from cyclonedx.model.component import Component, ComponentType, Pedigree
    from packageurl import PackageURL

    origin = manifest["base"]
    known = {key: str(origin[key]) for key in ("source", "content") if origin[key]}
    hub, links = None, []
    if origin["source"] == "hf":
        owner, _, name = origin["id"].rpartition("/")
        hub = PackageURL("huggingface", owner or None, name, origin["revision"])
        address = f"https://huggingface.co/{origin['id']}/tree/{origin['revision']}"
        links = [ExternalReference(type=ExternalReferenceType.DISTRIBUTION, url=XsUri(address))]
    ancestor = Component(
        name=origin["id"],
        version=origin["revision"],
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=BASE_REF,
        purl=hub,
        external_references=links,
        properties=[Property(name=f"olivepress:{key}", value=known[key]) for key in known],
        components=[_file(name, base[name], prefix="base:") for name in base],
    )
    return Component(
        name=f"{Path(origin['id']).name} with {', '.join(sorted(manifest['adapters']))}",
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=ROOT,
        description="A quantized ONNX model for onnxruntime-genai with LoRA adapters",
        pedigree=Pedigree(ancestors=[ancestor]),
    )


def _file(
    name: str, digests: dict[str, str], *, model: bool = False, prefix: str = FILE
) -> Component:
    from cyclonedx.model.component import Component, ComponentType

    kind = ComponentType.MACHINE_LEARNING_MODEL if model else ComponentType.FILE
    return Component(name=name, type=kind, bom_ref=f"{prefix}{name}", hashes=_hashes(digests))


def _hashes(digests: dict[str, str]) -> list[HashType]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm(name), content=value) for name, value in digests.items()]


def _data(path: str, about: dict[str, Any]) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    return Component(
        name=path,
        type=ComponentType.DATA,
        bom_ref=f"{DATA}{path}",
        hashes=_hashes(about["hashes"]),
        properties=[Property(name=PURPOSE, value=stage) for stage in about["used_by"]],
    )


def _library(name: str, version: str) -> Component:
    from cyclonedx.model.component import Component, ComponentType
    from packageurl import PackageURL

    python = name == "python"
    return Component(
        name=name,
        version=version,
        type=ComponentType.PLATFORM if python else ComponentType.LIBRARY,
        bom_ref=f"{LIBRARY}{name}",
        purl=PackageURL("generic" if python else "pypi", None, name, version),
    )


def _card(metrics: dict[str, dict], datasets: dict[str, dict]) -> dict[str, Any]:
    """modelCard: what it is for, the data, and the figures that are the same each time."""
    figures = [
        {"type": FIGURES[key], "value": str(value), "slice": f"adapter {adapter}, {model}"}
        for adapter, found in sorted(metrics.items())
        for model in ("base", "quantized", "quantized_lora", "onnx_off", "onnx_on")
        for key, value in sorted((found.get(model) or {}).items())
        if key in FIGURES and value is not None
    ]
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "transformer",
            "datasets": [{"ref": f"{DATA}{path}"} for path in sorted(datasets)],
        },
        "quantitativeAnalysis": {"performanceMetrics": figures},
    }
