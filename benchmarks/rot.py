"""Damage every file of a run, one at a time: `olivepress verify` names it and brings it back.

    olivepress run && python benchmarks/rot.py

Works in the project of the working directory and leaves it as it was. A fault keeps the time and
the mode of the file; a flipped byte its size too.
"""

from __future__ import annotations

import argparse
import collections
import hashlib
import os
import random
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tasks import bridge, integrity
from tasks.content import objects
from tasks.repair import repair
from tasks.verify import check

OTHERS = {".git", ".prefect", "tmp", "__pycache__"}


def written(path: Path, content: bytes) -> None:
    """Change a file behind everybody's back: inode, time and mode stay."""
    before = path.stat()
    path.chmod(0o644)
    with path.open("r+b") as file:
        file.write(content)
        file.truncate()
    path.chmod(before.st_mode)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def flip(path: Path, chance: random.Random) -> None:
    """Change one byte to any other."""
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= chance.randrange(1, 256)
    written(path, bytes(content))


def truncate(path: Path, chance: random.Random) -> None:
    written(path, path.read_bytes()[: chance.randrange(path.stat().st_size)])


def swap(path: Path, chance: random.Random) -> None:
    """Give it the content of another file beside it, or in another folder of the cache."""
    ours, place = path.read_bytes(), path.parent
    while True:
        others = [one for one in sorted(place.rglob("*")) if one.is_file()]
        others = [one for one in others if one.read_bytes() != ours]
        if others:
            return written(path, chance.choice(others).read_bytes())
        place = place.parent


def delete(path: Path, chance: random.Random) -> None:
    path.unlink()


FAULTS = {fault.__name__: fault for fault in (flip, truncate, swap, delete)}


def files(root: Path) -> dict[str, list[Path]]:
    """What is recorded, by kind: outputs, inputs, objects and records of the cache."""
    found = integrity.records(root)
    recorded = [(one.maker, root / name) for one in found.files for name in one.there]
    kinds = {
        "output": [path for maker, path in recorded if maker],
        "input": [path for maker, path in recorded if not maker],
        "object": list(objects(found.cache)),
        "record": [run.path for run in found.runs],
    }
    return {kind: sorted(p for p in paths if p.stat().st_size) for kind, paths in kinds.items()}


def content(root: Path) -> dict[str, str]:
    """SHA-256 and mode of every file of a project but what DVC and Prefect keep for themselves."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and not OTHERS & set(name.parts):
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
            found[str(name)] = f"{digest} {path.stat().st_mode:o}"
    return found


def trial(root: Path, path: Path, fault: Callable[[Path, random.Random], None], seed: str) -> str:
    """What went wrong with one file; empty if it was named, and nothing else, and brought back."""
    before = content(root)
    fault(path, random.Random(seed))
    name = path.relative_to(root).as_posix()
    named = [found.path for found in check(root).findings]
    if named != [name]:
        return f"named was {named or 'nothing'}"
    mending = repair(root)
    if not mending.after.sound:
        return f"not mended: {[done.how for done in mending.done]}"
    after = content(root)
    changed = [one for one in before | after if before.get(one) != after.get(one)]
    return f"other bytes: {changed}" if changed else ""


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser("rot.py", description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("--fault", choices=[*FAULTS, "all"], default="flip")
    parser.add_argument("--kind", choices=["output", "input", "object", "record"])
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    root, started = bridge.find_root(), time.monotonic()
    tried: collections.Counter[tuple[str, str]] = collections.Counter()
    wrong: collections.Counter[tuple[str, str]] = collections.Counter()
    for name in FAULTS if args.fault == "all" else [args.fault]:
        for kind, paths in files(root).items():
            if args.kind not in (None, kind) or (kind == "input" and name != "flip"):
                continue  # an input of another size is one that was edited
            for path in paths:
                tried[name, kind] += 1
                if said := trial(root, path, FAULTS[name], f"{args.seed} {path.name}"):
                    wrong[name, kind] += 1
                    print(f"{name} {path.relative_to(root)}: {said}", flush=True)
    print("| fault | files | damaged | named and brought back |\n|---|---|---:|---:|")
    for (name, kind), count in tried.items():
        print(f"| {name} | {kind}s | {count} | {count - wrong[name, kind]} |")
    print(f"in {time.monotonic() - started:.0f} s, seed {args.seed}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
