"""A package that `olivepress verify` finds sound, without a model: its checks read all of it."""

from __future__ import annotations

import hashlib
from typing import Any

from stages import bom, foundry
from stages.card import NAMES, card
from stages.package import CARD, MANIFEST, TRACE, writer
from stages.stage import BASE, LINEAGE, METRICS, ONNX, TOOLCHAIN, as_json
from tasks import store

ADAPTER = "adapters/travel.onnx_adapter"
DATA = "data/travel.jsonl"
PROMPT = "<|user|>{prompt}"
VERSIONS = {"onnxruntime-genai": "0.14.1", "python": "3.12.3"}
STAGES = {
    "toolchain": {},
    "fetch": {},
    "prepare@travel": {},
    "quantize": {"quantize.algorithm": "rtn", "quantize.bits": 4},
    "export": {"export.lm_head": "int8"},
    "convert@travel": {},
    "evaluate@travel": {},
}
FIGURES: dict[str, Any] = {
    **{key: {"perplexity": 2.0, "exact_answer_rate": 0.5} for key in NAMES},
    "answers": [{"prompt": "What?", "onnx_off": "a | b", "onnx_on": "That."}],
    "prompt_template": PROMPT,
    "size_mb": {"base": 4.0, "onnx": 2.0, "adapter": 0.1},
    "rows": 7,
    "not_measured": False,
    "agreement": {"top1": 0.99, "tokenizer": 1.0},
    "speed": {
        "adapter_on": {"tokens_per_second": 90.0, "time_to_first_token_ms": 7.0},
        "adapter_off": {"tokens_per_second": 99.0},
        "peak_rss_mb": 300.0,
    },
}


def make(genai_config: dict[str, Any]) -> dict[str, bytes]:
    """Name -> content of every file but the sums."""
    onnx = {"genai_config.json": as_json(genai_config).encode(), "model.onnx": b"a model"}
    files = onnx | {ADAPTER: b"an adapter", "metrics/travel.json": as_json(FIGURES).encode()}
    base = {"config.json": {"MD5": _md5(b"{}"), "SHA-256": _sha256(b"{}")}}
    made = {
        "toolchain": {TOOLCHAIN.as_posix(): _md5(as_json(VERSIONS).encode())},
        "fetch": {BASE.as_posix(): store.folder_md5({"config.json": _md5(b"{}")})},
        "export": {ONNX.as_posix(): store.folder_md5({n: _md5(data) for n, data in onnx.items()})},
        "convert@travel": {f"models/{ADAPTER}": _md5(files[ADAPTER])},
        "evaluate@travel": {f"{METRICS}/travel.json": _md5(files["metrics/travel.json"])},
    }
    lineage = {name: _entry(name, made.get(name, {})) for name in STAGES}
    lineage["package"] = {"record": {"versions": VERSIONS, "run_id": None}}
    manifest = {
        "format": 1,
        "writer": writer(),
        "adapters": {"travel": ADAPTER},
        "data": {"travel": DATA},
        "prompt_template": PROMPT,
        "base": {
            "source": "hf",
            "id": "some/model",
            "revision": "0" * 40,
            "content": lineage["fetch"]["outs"][BASE.as_posix()],
        },
    }
    asked = {"Name": "model", "PromptTemplate": {"prompt": PROMPT.replace("{prompt}", "{Content}")}}
    files |= {MANIFEST: as_json(manifest).encode(), foundry.FILE: as_json(asked).encode()}
    about = {"metrics": {"travel": FIGURES}, "lineage": lineage}
    listed = {name: _sha256(data) for name, data in files.items() if not name.startswith("metrics")}
    materials = bom.write(manifest, **about, sums=listed, base=base, used=VERSIONS)
    text = card(manifest, **about, provider="cuda")
    return files | {
        bom.BOM: materials.encode(),
        CARD: text.encode(),
        TRACE: as_json(lineage).encode(),
    }


def _entry(name: str, outs: dict[str, str]) -> dict[str, Any]:
    """As lineage.json has a stage."""
    reads = {DATA: f"md5:{_md5(b'rows')}"} if name.startswith("prepare") else {}
    record = {"seconds": 1.0, "data": {DATA: _sha256(b"rows")} if reads else {}}
    outs = outs | {f"{LINEAGE}/{name}.json": _md5(as_json(record).encode())}
    return {
        "cmd": f"python -m stages.{name}",
        "deps": reads,
        "params": STAGES[name],
        "outs": {path: f"md5:{md5}" for path, md5 in outs.items()},
        "record": record,
    }


def _md5(data: bytes) -> str:
    return hashlib.md5(data, usedforsecurity=False).hexdigest()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
