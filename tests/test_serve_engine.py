"""The server's batches, adapters and turns, against what each sequence is by itself."""

from __future__ import annotations

import itertools
import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

import numpy as np
import onnxruntime as ort
import pytest

from serve.adapters import IDLE_STEPS, Adapter, Parameter, Shelf, Together, padded, read
from serve.batch import CHUNK, Batch, Row
from serve.engine import context_length
from serve.sampling import Sampler
from serve.scheduler import Busy, Piece, Scheduler, Sequence, Stopping
from stages.errors import UserError
from tests.serving import another_adapter, eventually

if TYPE_CHECKING:
    from exported import Lab

pytestmark = pytest.mark.usefixtures("one_thread")


def test_rows_of_a_batch_are_as_if_alone(served_package: Path, labs: Callable[[str], Lab]) -> None:
    """Other lengths, other adapters of other ranks, or none: the scores of each run by itself."""
    batch = Batch(served_package, 6, 256)
    shelf = Shelf(served_package, batch.parameters, kept=8)
    wide = shelf.get("two")
    smaller = Adapter(
        "smaller", wide.path, 2,
        {k: v[:, :2].copy() if k.endswith("A") else v[:2].copy() for k, v in wide.arrays.items()},
    )  # fmt: skip
    adapters = [None, shelf.get("one"), wide, smaller, shelf.get("one")]
    prompts = [list(range(10, 10 + length)) for length in (3, 40, 1, 17, 100)]
    alone = []
    for prompt, adapter in zip(prompts, adapters, strict=True):
        scores = [batch.read(5, prompt, 0, adapter)]
        for step in range(4):
            token = int(scores[-1].argmax())
            scores.append(batch.step([Row(5, token, len(prompt) + step, adapter)], {})[0])
        alone.append(scores)
    for slot, (prompt, adapter) in enumerate(zip(prompts, adapters, strict=True)):
        batch.read(slot, prompt, 0, adapter)
    for step in range(4):
        order = [3, 0, 4, 1, 2]  # of rows; slots need not be in order
        rows = [
            Row(slot, int(alone[slot][step].argmax()), len(prompts[slot]) + step, adapters[slot])
            for slot in order
        ]
        for slot, scores in zip(order, batch.step(rows, {}), strict=True):
            np.testing.assert_allclose(scores, alone[slot][step + 1], atol=2e-4)


def test_a_prompt_in_parts_while_others_are_answered(served_package: Path) -> None:
    """Steps for others leave a half-read prompt's cache as it was."""
    batch = Batch(served_package, 3, 256)
    prompt = list(range(4, 100))
    whole = batch.read(0, prompt, 0, None)
    batch.read(2, [7, 8, 9], 0, None)
    length = 3
    for start in range(0, len(prompt), 32):
        scores = batch.read(1, prompt[start : start + 32], start, None)
        read = min(start + 32, len(prompt))
        batch.step([Row(2, 5, length, None)], {1: read})
        length += 1
    np.testing.assert_allclose(scores, whole, atol=2e-4)
    batch.read(0, prompt, 0, None)
    rows = batch.step([Row(slot, 5, len(prompt), None) for slot in (0, 1)], {})
    np.testing.assert_allclose(rows[1], rows[0], atol=2e-4)


def test_a_sequence_that_moves_goes_on(served_package: Path) -> None:
    batch = Batch(served_package, 4, 256)
    prompt = list(range(4, 60))
    for slot in (0, 3):
        batch.read(slot, prompt, 0, None)
    expected = batch.step([Row(slot, 5, len(prompt), None) for slot in (0, 3)], {})
    batch.move(3, 1, len(prompt) + 1)
    again = batch.step([Row(slot, 6, len(prompt) + 1, None) for slot in (0, 1)], {})
    np.testing.assert_allclose(again[1], again[0], atol=2e-4)
    assert np.abs(again[0] - expected[0]).max() > 0.1


def test_adapters_together() -> None:
    """A side by side and B below each other; one that is idle for long makes room."""
    shapes = {
        "p.lora_A": Parameter((4, "rank"), np.dtype("float32")),
        "p.lora_B": Parameter(("rank", 6), np.dtype("float32")),
    }
    rng = np.random.default_rng(0)

    def make(name: str, rank: int) -> Adapter:
        arrays = {
            "p.lora_A": rng.normal(size=(4, rank)).astype(np.float32),
            "p.lora_B": rng.normal(size=(rank, 6)).astype(np.float32),
        }
        return Adapter(name, Path(), rank, arrays)

    one, two, x = make("one", 2), make("two", 3), rng.normal(size=(3, 1, 4)).astype(np.float32)
    together = Together(shapes)
    together.take({one, two})
    own = together.rows({0: two, 1: None, 2: one}, 3)
    got = (x @ together.arrays["p.lora_A"] * own) @ together.arrays["p.lora_B"]
    for row, adapter in ((0, two), (2, one)):
        want = x[row] @ adapter.arrays["p.lora_A"] @ adapter.arrays["p.lora_B"]
        np.testing.assert_allclose(got[row], want, rtol=1e-5, atol=1e-6)
    assert (got[1] == 0).all()
    version = together.version
    for _ in range(IDLE_STEPS):
        together.take({one})
    assert together.version == version and together.rank == 5
    together.take({one})
    assert together.rank == 2
    for _ in range(IDLE_STEPS + 2):
        together.take(set())
    assert together.rank == 0 and not together.arrays
    value = padded("p.lora_A", one.arrays["p.lora_A"], 5)
    assert value.shape == (4, 5) and (value[:, 2:] == 0).all()


def test_only_so_many_adapters_stay_in_memory(
    served_package: Path, labs: Callable[[str], Lab]
) -> None:
    shelf = Shelf(served_package, Batch(served_package, 1, 16).parameters, kept=2)
    for seed in range(3):
        path = another_adapter(labs("phi3"), served_package.parent / f"x{seed}.onnx_adapter", seed)
        shelf.add(f"x{seed}", path)
    assert shelf.loaded() == ["x1", "x2"]
    assert shelf.get("x1") is shelf.get("x1")
    shelf.get("x0")
    assert shelf.loaded() == ["x1", "x0"]


class Counting:
    """A model of which the test sees the calls; the next token is always the last plus one."""

    slots = 2

    def __init__(self) -> None:
        self.calls: list[tuple[str, Any]] = []
        self.go = threading.Semaphore(0)

    def _scores(self, token: int) -> np.ndarray:
        scores = np.zeros(20_000, np.float32)
        scores[token + 1] = 1
        return scores

    def read(self, slot: int, ids: list[int], start: int, adapter: Any) -> np.ndarray:
        self.go.acquire()
        self.calls.append(("read", (slot, start, len(ids))))
        return self._scores(ids[-1])

    def step(self, rows: list[Row], reading: dict[int, int]) -> np.ndarray:
        self.go.acquire()
        self.calls.append(("reading", reading))
        if any(row.token == 13 for row in rows):
            raise RuntimeError("thirteen")
        self.calls.append(("step", [row.slot for row in rows]))
        return np.stack([self._scores(row.token) for row in rows])

    def move(self, slot: int, to: int, length: int) -> None:
        self.calls.append(("move", (slot, to, length)))

    def free(self, slot: int) -> None:
        self.calls.append(("free", slot))


class Silent:
    """A writer that gives out nothing."""

    stopped = False

    def add(self, token: int) -> str:
        return ""

    rest = staticmethod(str)


def wanted(prompt: list[int], most: int, got: list[Piece]) -> Sequence:
    stops: frozenset[int] = frozenset()
    return Sequence(0, prompt, None, Sampler(), Silent(), stops, most, got.extend)  # type: ignore[arg-type]


def test_a_long_prompt_does_not_stop_others() -> None:
    """Between its parts, who is being answered gets a token each time."""
    model, short, long = Counting(), [], []  # type: ignore[var-annotated]
    scheduler = Scheduler(model, 4)
    scheduler.submit([wanted([1], 6, short)])
    model.go.release(2)
    eventually(lambda: len(short) == 2)
    scheduler.submit([wanted(list(range(100, 100 + 3 * CHUNK)), 2, long)])
    model.go.release(100)
    eventually(lambda: len(long) == 2 and len(short) == 6)
    kinds = [kind for kind, _ in model.calls]
    parts = [
        at for at, (kind, what) in enumerate(model.calls) if kind == "read" and what[2] == CHUNK
    ]
    assert len(parts) == 3
    assert all("step" in kinds[a:b] for a, b in itertools.pairwise(parts))
    told = [what for kind, what in model.calls if kind == "reading" and what]
    assert told[:2] == [{1: CHUNK}, {1: 2 * CHUNK}]
    assert [piece.choice.token for piece in short if piece.choice] == [2, 3, 4, 5, 6, 7]
    scheduler.stop()


def test_few_rows_lie_close_together() -> None:
    """When most have ended, the others move to lower slots and go on as they were."""
    model = Counting()
    model.slots = 8
    got: list[list[Piece]] = [[] for _ in range(8)]
    scheduler = Scheduler(model, 0)
    scheduler.submit([wanted([1000 * (i + 1)], 40 if i > 5 else 2, got[i]) for i in range(8)])
    model.go.release(1000)
    eventually(lambda: len(got[6]) == len(got[7]) == 40)
    moves = [what for kind, what in model.calls if kind == "move"]
    assert [(slot, to) for slot, to, _ in moves] == [(7, 0), (6, 1)]
    assert all(length == 2 for *_, length in moves)  # the prompt and one token
    last = [what for kind, what in model.calls if kind == "step"][-1]
    assert sorted(last) == [0, 1]
    for one, first in ((got[6], 7001), (got[7], 8001)):
        assert [piece.choice.token for piece in one if piece.choice] == [*range(first, first + 40)]
    scheduler.stop()


def test_order_bound_failure_and_end() -> None:
    """First come first served; beyond the bound Busy; a failing step ends its own; then no more."""
    model = Counting()
    order: list[int] = []
    got: list[list[Piece]] = [[] for _ in range(5)]

    def tells(number: int) -> Callable[[list[Piece]], None]:
        def tell(pieces: list[Piece]) -> None:
            order.append(number)
            got[number].extend(pieces)

        return tell

    asked = [wanted([1000 * (i + 1)], 3, []) for i in range(4)]
    for number, one in enumerate(asked):
        one.tell = tells(number)
    scheduler = Scheduler(model, 2)
    scheduler.submit(asked)  # two run, two wait
    with pytest.raises(Busy):
        scheduler.submit([wanted([5], 1, [])])
    model.go.release(1000)
    eventually(lambda: len(got[3]) == 3)
    assert list(dict.fromkeys(order)) == [0, 1, 2, 3]
    for number in range(4):
        said = [piece.choice.token for piece in got[number] if piece.choice]
        assert said == [1000 * (number + 1) + 1 + step for step in range(3)]
    eventually(lambda: scheduler.running == 0)
    assert sorted(what for kind, what in model.calls if kind == "free") == [0, 0, 1, 1]
    scheduler.submit([wanted([10], 9, got[4])])
    eventually(lambda: got[4] and got[4][-1].error is not None)
    assert "thirteen" in str(got[4][-1].error)
    assert scheduler.alive and scheduler.running == 0
    scheduler.stop()
    with pytest.raises(Stopping):
        scheduler.submit([wanted([1], 1, [])])


def test_what_fails_for_one_sequence_ends_it_alone() -> None:
    """A sampler or a writer that raises: an error for that one, and the others go on."""
    model, good, bad = Counting(), [], []  # type: ignore[var-annotated]
    model.go.release(1000)
    scheduler = Scheduler(model, 2)
    broken = wanted([50], 9, bad)
    broken.writer.add = mock.Mock(side_effect=ValueError("no text"))  # type: ignore[method-assign]
    scheduler.submit([broken, wanted([100], 5, good)])
    eventually(lambda: len(good) == 5 and bad)
    assert bad[-1].finish == "error" and "no text" in str(bad[-1].error)
    assert scheduler.alive
    scheduler.stop()


WRONG = {
    "nothing": ({}, "no parameters"),
    "NaN": ({"A": np.nan}, "no numbers"),
    "inf": ({"B": np.inf}, "no numbers"),
    "half": ({"dtype": np.float16}, "float16"),
    "alone": ({"only": "A"}, "no .*lora_B"),
    "ranks": ({"rank": 3}, "of its rank"),
}


@pytest.mark.parametrize(("change", "words"), WRONG.values(), ids=WRONG)
def test_an_adapter_that_would_harm_is_refused(
    served_package: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    parameters = Batch(served_package, 1, 16).parameters
    name = next(iter(sorted(parameters))).removesuffix("A")
    sizes = {key: parameters[name + key].shape for key in "AB"}
    arrays = {
        name + "A": np.ones((sizes["A"][0], 2), change.get("dtype", np.float32)),
        name + "B": np.ones(
            (change.get("rank", 2), sizes["B"][1]), change.get("dtype", np.float32)
        ),
    }
    for key in "AB":
        if key in change:
            arrays[name + key][0, 0] = change[key]
    if "only" in change:
        del arrays[name + "B"]
    if not change:
        arrays = {}
    adapter = ort.AdapterFormat()
    adapter.set_adapter_version(1)
    adapter.set_model_version(1)
    adapter.set_parameters({k: ort.OrtValue.ortvalue_from_numpy(v) for k, v in arrays.items()})
    path = tmp_path / "x.onnx_adapter"
    adapter.export_adapter(str(path))
    with pytest.raises(UserError, match=words):
        read("x", path, parameters)


def test_what_overflows_in_one_adapter_stays_in_its_rows(served_package: Path) -> None:
    batch = Batch(served_package, 2, 64)
    one = Shelf(served_package, batch.parameters, kept=2).get("one")
    huge = {k: v * 1e38 if k.endswith("A") else v for k, v in one.arrays.items()}
    bad = Adapter("bad", one.path, one.rank, huge)
    ids = [5, 6, 7]
    batch.read(0, ids, 0, one)
    alone = batch.step([Row(0, 8, 3, one)], {})[0]
    batch.read(0, ids, 0, one)
    batch.read(1, ids, 0, bad)
    beside = batch.step([Row(0, 8, 3, one), Row(1, 8, 3, bad)], {})
    np.testing.assert_allclose(beside[0], alone, atol=2e-4)
    assert not np.isfinite(beside[1]).all()


def test_longrope_is_served_up_to_its_first_length(served_package: Path, tmp_path: Path) -> None:
    folder = tmp_path / "package"
    shutil.copytree(served_package, folder)
    assert context_length(folder) == 256
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "longrope", "original_max_position_embeddings": 64}
    (folder / "config.json").write_text(json.dumps(config))
    assert context_length(folder) == 64
