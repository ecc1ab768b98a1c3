"""What every stage shares: its start, its outputs, its progress and its record of what it did."""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import mmap
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

from stages import params as parameters
from stages.errors import NO_MEMORY, UserError, lack
from stages.params import Params
from stages.reading import json_object

MODELS = Path("models")
BASE = MODELS / "base"
QUANTIZED = MODELS / "quantized"
ADAPTERS = MODELS / "adapters"
ONNX = MODELS / "onnx"
PACKAGE = MODELS / "package"
LINEAGE = MODELS / "lineage"
TOOLCHAIN = MODELS / "toolchain.json"
PREPARED = Path("data/prepared")
METRICS = Path("metrics")
PLOTS = Path("plots")
os.umask(UMASK := os.umask(0))  # it cannot be read; once, as another thread may write meanwhile
COMMIT = "OLIVEPRESS_COMMIT"  # environment variable: the JSON of `commit`
TORCH_MB = 500  # of PyTorch, transformers and Olive, before there is a model
CALLER = "OLIVEPRESS_CALLER"  # environment variable: id of the process that looks after this one
NOT_LOCK = ["--", ":(top)", ":(exclude)dvc.lock"]  # to Git: all files but it

# Libraries whose version can change the bytes of an output. Prefect, DVC and pytest cannot.
LIBRARIES = [
    "accelerate",
    "datasets",
    "numpy",
    "olive-ai",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-genai",
    "peft",
    "safetensors",
    "tokenizers",
    "torch",
    "transformers",
]

# Environment of every stage. No call that the user did not ask for: `fetch` goes online by itself
# when base.source says so.
ENVIRONMENT = {
    "OLIVE_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "TQDM_DISABLE": "1",
}


LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None

SHELLS = {"ash", "bash", "dash", "fish", "ksh", "sh", "zsh"}


# The same library under other names, for a GPU.
EDITIONS = {
    "onnxruntime": ["onnxruntime-gpu", "onnxruntime-directml"],
    "onnxruntime-genai": ["onnxruntime-genai-cuda", "onnxruntime-genai-directml"],
}


# What of params.yaml a stage's memory depends on.
MEMORY = {
    "quantize": "lower quantize.calibration_samples or quantize.calibration_seq_len",
    "finetune": "lower finetune.batch_size or finetune.max_seq_len, or set "
    "finetune.gradient_checkpointing",
    "evaluate": "lower evaluate.max_rows or evaluate.text_tokens",
}


def less_memory(stage: str) -> str:
    """What to do when a stage's memory ran out, after the words that say so."""
    less = MEMORY.get(stage.partition("@")[0])
    elsewhere = "free some, or choose a smaller model: olivepress doctor says what it needs"
    return f": {less}; or {elsewhere}" if less else f": {elsewhere}"


def versions() -> dict[str, str]:
    """Installed versions of `LIBRARIES` and Python's minor version, without build tags (+cpu).

    A library is under the name of the edition that is installed.
    """
    found = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in LIBRARIES:
        editions = [name, *EDITIONS.get(name, [])]
        there = {edition: _version(edition) for edition in editions}
        installed = {edition: version for edition, version in there.items() if version}
        if not installed:
            raise UserError(f"{' or '.join(editions)} is not installed; run make install")
        found |= installed
    return found


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name).split("+")[0]
    except importlib.metadata.PackageNotFoundError:
        return None


def progress(done: int, total: int, note: str = "") -> None:
    """One line that a person can read and that the flow turns into a progress bar."""
    print(f"progress {done}/{total} {note}".rstrip(), flush=True)


@contextmanager
def new_output(path: Path) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it becomes `path` only when nothing was raised.

    Yields a path that does not exist yet: make it a file or a folder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    for left in path.parent.glob(f".{path.name}.tmp-*"):  # of a run that was killed
        remove(left)
    with replacing(path) as temporary:
        yield temporary
        if not temporary.exists():
            raise RuntimeError(f"nothing was written to {path}")
        _open_to_readers(temporary)


@contextmanager
def replacing(path: Path, ready: Callable[[], object] = lambda: None) -> Iterator[Path]:
    """A temporary sibling of `path` to write to; it becomes `path` only when nothing was raised.

    Whoever reads `path` meanwhile, or after a kill or a power cut, has all of the one before or of
    this one; a folder may also be missing.

    Args:
        ready: called when all of it is on the disk, before it takes its place.
    """
    temporary = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        yield temporary
        inner = temporary.rglob("*") if temporary.is_dir() else []
        for each in [*inner, temporary]:
            if not each.is_symlink():
                _to_disk(each)
        ready()
        if temporary.is_dir() or path.is_dir():
            remove(path)
        os.replace(temporary, path)
        _to_disk(path.parent)
    finally:
        remove(temporary)


def _to_disk(path: Path) -> None:
    """Have the disk hold a file or a folder's names: else its name may be there first."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _open_to_readers(path: Path) -> None:
    """Give files the mode that `open` gives; safetensors makes them readable by the owner only."""
    for file in [path] if path.is_file() else path.rglob("*"):
        if file.is_file():
            file.chmod(0o666 & ~UMASK)


def of_time(path: str) -> bool:
    """Whether a stage's output says when or how fast it was made, which is never the same twice."""
    return path.startswith(f"{LINEAGE}/") or Path(path).parent == METRICS


def remove(path: Path) -> None:
    """Remove a file, a link or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def as_json(value: object) -> str:
    """Sorted, indented, with a final newline: equal values are equal text."""
    return json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n"


def write_json(path: Path, value: object) -> None:
    path.write_text(as_json(value), "utf-8")


def read_json(path: Path) -> dict:
    """The object in a JSON file that a stage wrote.

    Raises:
        UserError: as `stages.reading.json_object`: it is missing or damaged.
    """
    return json_object(path)


def killed_with_parent() -> None:
    """Have Linux kill this process when the thread that started it ends.

    It holds beyond exec and takes no lock, so it may be called between fork and exec.
    """
    if LIBC:
        pr_set_pdeathsig = 1
        LIBC.prctl(pr_set_pdeathsig, signal.SIGKILL)


def die_with_parent() -> None:
    """End this process when the one that started it ends, so that nothing goes on writing.

    Where a shell stays between the two, it also ends when the shell loses its own parent.

    Raises:
        SystemExit: that one has ended already, while this one imported its libraries.
    """
    killed_with_parent()
    end_with_parent()
    if _orphaned():
        sys.exit("what started this has ended, so this ends too")


def _orphaned() -> bool:
    """Whether the process that started this one had ended before this one watched it.

    DVC does not say which process it is. But what it starts is in its process group, and a process
    that takes over an orphan is in another.
    """
    if caller := os.environ.get(CALLER):
        import psutil

        return int(caller) not in [one.pid for one in psutil.Process().parents()]
    group = os.getpgrp()
    by_dvc = "DVC_STAGE" in os.environ and group != os.getpid()
    return by_dvc and any(os.getpgid(pid) != group for pid in _watched())


def end_with_parent() -> None:
    """As `die_with_parent`, within half a second, whichever thread it was that started this."""
    first = _watched()

    def watch() -> None:
        while _watched() == first:
            time.sleep(0.5)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _watched() -> tuple[int, ...]:
    """Process id of the parent; and of its parent, if /proc says that the parent is a shell.

    DVC starts a stage through $SHELL. Debian's sh waits for it; bash makes way, and then the
    grandparent is the user's own shell, which may end before a run in the background does.
    """
    parent = os.getppid()
    try:
        status = Path(f"/proc/{parent}/stat").read_text()  # pid (name) state parent ...
    except OSError:
        return (parent,)
    name, _, fields = status.partition("(")[2].rpartition(")")
    return (parent, int(fields.split()[1])) if name in SHELLS else (parent,)


def commit() -> dict:
    """Git's commit, and whether tracked files differ from it, but for dvc.lock, which runs write.

    A job on a cluster has no repository: the environment says what it was sent from.
    """
    if sent_from := os.environ.get(COMMIT):
        return json.loads(sent_from)
    return {
        "git_commit": _git("rev-parse", "HEAD"),
        "git_dirty": bool(_git("status", "--porcelain", "--untracked-files=no", *NOT_LOCK)),
    }


def _git(*args: str) -> str | None:
    done = subprocess.run(["git", *args], capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def _check_toolchain() -> None:
    if not TOOLCHAIN.exists():
        raise UserError(f"{TOOLCHAIN} is missing; run `olivepress run` or `dvc repro` first")
    recorded, installed = read_json(TOOLCHAIN), versions()
    for name, version in installed.items():
        if recorded.get(name) != version:
            raise UserError(
                f"{TOOLCHAIN} says {name} {recorded.get(name)}, installed is {version}; "
                "run `olivepress run` or `dvc repro --force toolchain`"
            )


def _check_memory(megabytes: int) -> None:
    """Have libraries begin only where there is room for them.

    SciPy's OpenBLAS, for one, asks for its buffers again and again, and for ever.

    Raises:
        OSError: the process may not have so much.
    """
    if megabytes and hasattr(mmap, "MAP_PRIVATE"):
        mmap.mmap(-1, megabytes << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS).close()


def record(stage: str, started: float) -> dict:
    """When, how long, by what and from which commit; inputs and parameters are in dvc.lock."""
    return {
        "stage": stage,
        "started": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
        "seconds": round(time.time() - started, 2),
        "run_id": os.environ.get("OLIVEPRESS_RUN_ID"),
        **commit(),
        "platform": platform.platform(),
        "versions": versions(),
    }


def data_read(stage: str, params: Params, adapter: str | None) -> dict[str, str]:
    """SHA-256 of the data file that a stage read, in hex, by its path; DVC records its MD5."""
    from stages.card import portable
    from stages.sums import sha256

    path = {
        "fetch": params.base.path if params.base.source == "builtin" else None,
        "prepare": params.adapters[adapter].data if adapter else None,
        "quantize": params.quantize.calibration_data,
        "measure": params.evaluate.text,
        "evaluate": params.evaluate.text,
    }.get(stage)
    return {portable(path): sha256(Path(path))} if path and Path(path).is_file() else {}


def run(main: Callable[..., None], stage: str, megabytes: int = 0) -> None:
    """Entry point of a stage module: `main(params)`, or `main(params, adapter)` for one adapter.

    Exits 0, or 1 with one message on standard error for a user's mistake or a full disk.

    Args:
        megabytes: what the libraries that it loads take.
    """
    die_with_parent()
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    parser = argparse.ArgumentParser(prog=f"python -m stages.{stage}")
    per_adapter = main.__code__.co_argcount == 2
    if per_adapter:
        parser.add_argument("--adapter", required=True, help="a name under adapters:")
    args = parser.parse_args()
    started = time.time()
    try:
        _check_memory(megabytes)
        values = parameters.load()
        if stage != "toolchain":
            _check_toolchain()
        if per_adapter:
            if args.adapter not in values.adapters:
                raise UserError(f"params.yaml: adapters.{args.adapter}: no such adapter")
            main(values, args.adapter)
        else:
            main(values)
        if stage != "package":  # it keeps its record inside the package
            adapter = args.adapter if per_adapter else None
            name = f"{stage}@{adapter}" if adapter else stage
            with new_output(LINEAGE / f"{name}.json") as out:
                data = data_read(stage, values, adapter)
                write_json(out, record(name, started) | {"data": data})
    except UserError as error:
        sys.exit(f"{stage}: {error}")
    except Exception as error:
        if said := lack(error):
            sys.exit(
                f"{stage}: {said}" + (less_memory(stage) if said.startswith(NO_MEMORY) else "")
            )
        raise
