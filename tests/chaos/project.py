"""The clones that are killed in: real stages on the built-in model's files, and quick ones."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

from conftest import REPO, init_project, sh
from lab import commit, content, copy_project
from tasks import overrides

# As in the project: a stage per adapter, a plot, a metric, and a last one that reads whole folders.
QUICK = """
stages:
  fetch:
    cmd: python stage.py fetch models/base
    deps: [stage.py, in.txt]
    outs: [models/base]
  quantize:
    cmd: python stage.py quantize models/quantized plots/quantize.csv
    deps: [stage.py, models/base]
    params: [quantize.bits]
    outs: [models/quantized]
    plots: [plots/quantize.csv]
  measure:
    cmd: python stage.py measure metrics/text.json
    deps: [stage.py, models/quantized]
    metrics: [metrics/text.json]
  finetune:
    foreach: ${adapters}
    do:
      cmd: python stage.py finetune models/adapters/${key}
      deps: [stage.py, models/quantized]
      params: [finetune.max_steps]
      outs: ["models/adapters/${key}"]
  package:
    cmd: python stage.py package models/package
    deps: [stage.py, models/quantized, models/adapters, metrics]
    outs: [models/package]
"""
# Writes in pieces, so that most kills find half a file; the content follows from what is read. Two
# import for a second longer, so that a kill also comes before they look for who started them, and
# one that goes on without is slow, so that it is seen.
STAGE = """
import hashlib, os, sys, time
from pathlib import Path
started_by = os.getppid()
from stages.stage import die_with_parent, new_output

if sys.argv[1] in ("quantize", "package"):
    time.sleep(1)
die_with_parent()
reads = {"fetch": "in.txt", "quantize": "models/base", "measure": "models/quantized",
         "finetune": "models/quantized", "package": "models"}
seen = hashlib.sha256(Path("params.yaml").read_bytes())
for path in sorted(Path(reads[sys.argv[1]]).rglob("*")) or [Path(reads[sys.argv[1]])]:
    if path.is_file() and ".tmp-" not in str(path):
        seen.update(path.read_bytes())
for name in sys.argv[2:]:
    with new_output(Path(name)) as out:
        folder = out if "." in Path(name).name else out / "weights"
        folder.parent.mkdir(exist_ok=True)
        with open(folder, "w") as file:
            file.write('{"a": "')
            for piece in range(8):
                print("progress", piece, 8, sep=" ", flush=True)
                file.write(hashlib.sha256(seen.digest() + bytes([piece])).hexdigest() * 500)
                file.flush()
                time.sleep(0.05 if os.getppid() == started_by else 2)
            file.write('"}')
"""
# A run from scratch in a minute on two cores; the gates are for models that are taught longer.
SMALL = {
    "finetune.max_steps": 12,
    "quantize.calibration_samples": 8,
    "quantize.algorithm": "rtn",
    "evaluate.max_rows": 4,
    "evaluate.text_tokens": 512,
    "evaluate.speed_tokens": 8,
    "evaluate.max_new_tokens": 8,
    "gates.max_adapter_perplexity_ratio": None,
    "gates.min_exact_answer_rate": None,
}
RECORDS = {"README.md", "lineage.json", "SHA256SUMS"}  # of a package: they say when, and how fast
FOLDERS = ("models", "metrics", "plots", "data/prepared")


def make(folder: Path, kind: str) -> Path:
    """A clone with the pipeline of this kind, `quick` or `real`."""
    if kind == "real":
        copy_project(folder)
        base = Path(f"{folder}.base")  # the built-in model takes longest to make; once will do
        shutil.rmtree(base, ignore_errors=True)
        sh("dvc", "repro", "fetch", cwd=folder)
        shutil.move(folder / "models/base", base)
        (folder / "dvc.lock").unlink()
        overrides.apply(folder, {**SMALL, "base.source": "local", "base.path": str(base)})
    else:
        init_project(folder)
        files = {"dvc.yaml": QUICK, "stage.py": STAGE, "in.txt": "hello\n"}
        for name, text in files.items():
            (folder / name).write_text(text)
        shutil.copy(REPO / ".gitignore", folder)
        shutil.copy(REPO / "prefect.yaml", folder)
        shutil.copytree(REPO / "flows", folder / "flows")
    commit(folder, "start")
    return folder


def made(folder: Path) -> dict[str, str]:
    """sha256 of every output but of what says when it was made, and how fast."""
    found: dict[str, str] = {}
    for name in FOLDERS:
        if (folder / name).is_dir():
            found |= {f"{name}/{path}": it for path, it in content(folder / name).items()}
    for path in list(found):
        parts = Path(path).parts
        if parts[:2] == ("models", "lineage") or (parts[1] == "package" and parts[-1] in RECORDS):
            del found[path]
        elif "metrics" in (parts[0], parts[-2]):  # the package has them too
            figures = _without_speed(json.loads((folder / path).read_text()))
            found[path] = hashlib.sha256(json.dumps(figures).encode()).hexdigest()
    return found


def _without_speed(figures: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in figures.items() if key != "speed"}


def damaged(folder: Path) -> list[str]:
    """Objects of DVC's cache whose bytes are not those of their name."""
    return [
        str(path.relative_to(folder))
        for path in (folder / ".dvc/cache/files/md5").glob("??/*")
        if hashlib.md5(path.read_bytes()).hexdigest() != path.parent.name + path.stem
        and ".tmp" not in path.name
    ]
