"""A step of many sequences in one call of ONNX Runtime on the CPU, each with its own adapter.

onnxruntime-genai's own Generator takes a batch that begins and ends together and has one adapter,
and its Engine takes none. Here each sequence has a slot in one cache of keys and values, may come
and go at any step, and `lora_rows` (passes/adapter_inputs.py) gives each its own adapter.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from serve.adapters import Adapter, Parameter, Together
from stages.errors import UserError
from stages.generation import read_config
from stages.reading import Missing, json_object

CHUNK = 256  # tokens of a prompt that are read in one call, so that others need not wait for all
TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}
ERRORS_ONLY = 3  # it warns of each adapter input that it is no constant


@dataclass
class Row:
    """What one sequence wants of a step."""

    slot: int
    token: int
    """The one that was chosen last."""
    length: int
    """Tokens of the sequence that are in the cache."""
    adapter: Adapter | None


class Batch:
    """A model with a cache for `slots` sequences of `context` tokens.

    Keys and values are in one piece of memory for each layer, (slots, heads, context, head_size),
    which GroupQueryAttention reads and appends to in place. The system gives it memory page by page
    as sequences grow into it.

    Raises:
        UserError: the model cannot be loaded, or its graph is none that this can run.
    """

    def __init__(self, folder: Path, slots: int, context: int) -> None:
        config = read_config(folder)
        decoder = config["model"]["decoder"]
        self.slots, self.context = slots, context
        self._session = _session(folder / decoder["filename"], decoder["session_options"])
        inputs = {each.name: each for each in self._session.get_inputs()}
        outputs = {each.name: each for each in self._session.get_outputs()}
        optional = {each.name: each for each in self._session.get_overridable_initializers()}
        self._positions = "position_ids" in inputs
        self._caches = _caches(inputs, outputs, slots, context)
        self.vocabulary = int(outputs["logits"].shape[-1])
        self._dtype = TYPES[outputs["logits"].type]
        self._own = _rows_input(folder)
        if optional and self._own not in optional:
            raise UserError(
                f"{folder}: exported by an earlier version, whose adapters cannot share a batch; "
                "olivepress run exports it again"
            )
        self.parameters = {
            name: Parameter(tuple(it.shape), np.dtype(TYPES[it.type]))
            for name, it in optional.items()
            if name != self._own
        }
        self._rows = self._session.io_binding()
        self._bound: tuple[int, Any] | None = None
        self._together = Together(self.parameters)

    def read(
        self, slot: int, ids: Sequence[int], start: int, adapter: Adapter | None
    ) -> np.ndarray:
        """Take some tokens of a prompt into a slot's cache.

        Args:
            ids: at most `CHUNK`.
            start: how many tokens of the sequence the cache has.

        Returns:
            Scores of the token after the last: float32 (vocabulary,).
        """
        count = len(ids)
        binding = self._session.io_binding()
        for cache in self._caches:
            cache.bind(binding, slot, 1)
        held = [np.array([ids], np.int64), np.ones((1, start + count), np.int64)]
        bind(binding, "input_ids", held[0])
        bind(binding, "attention_mask", held[1])
        if self._positions:
            held.append(np.arange(start, start + count, dtype=np.int64)[None])
            bind(binding, "position_ids", held[2])
        if adapter:
            for name, value in adapter.arrays.items():
                bind(binding, name, value)
        logits = np.empty((1, count, self.vocabulary), self._dtype)
        bind_output(binding, "logits", logits)
        self._session.run_with_iobinding(binding)
        return logits[0, -1].astype(np.float32, copy=False)

    def step(self, rows: Sequence[Row], reading: Mapping[int, int]) -> np.ndarray:
        """Add a token to each of some sequences.

        Slots between them take part and are not looked at: what is written for one goes where its
        next token will be written over it.

        Args:
            reading: slots whose prompt is only partly read, with how many tokens of it they have.

        Returns:
            Scores of each one's next token: float32 (len(rows), vocabulary).
        """
        count = 1 + max(row.slot for row in rows)
        ids = np.zeros((count, 1), np.int64)
        lengths = np.array([reading.get(slot, 0) for slot in range(count)], np.int64)
        for row in rows:
            ids[row.slot], lengths[row.slot] = row.token, row.length
        mask = (np.arange(lengths.max() + 1) <= lengths[:, None]).astype(np.int64)
        self._together.take({row.adapter for row in rows if row.adapter})
        self._bind(count)
        bind(self._rows, "input_ids", ids)
        bind(self._rows, "attention_mask", mask)
        if self._positions:
            positions = lengths[:, None]
            bind(self._rows, "position_ids", positions)
        if self._together.rank:
            own = self._together.rows({row.slot: row.adapter for row in rows}, count)
            bind(self._rows, self._own, own)
        logits = np.empty((count, 1, self.vocabulary), self._dtype)
        bind_output(self._rows, "logits", logits)
        self._session.run_with_iobinding(self._rows)
        return logits[[row.slot for row in rows], 0].astype(np.float32, copy=False)

    def move(self, slot: int, to: int, length: int) -> None:
        """Have the sequence of a slot, so many tokens of it, in another that is free."""
        for cache in self._caches:
            cache.values[to, :, :length] = cache.values[slot, :, :length]
        self.free(slot)

    def free(self, slot: int) -> None:
        """Give a slot's memory back to the system."""
        for cache in self._caches:
            cache.free(slot)

    def _bind(self, count: int) -> None:
        """Bind what changes seldom: the caches of so many slots, and the adapters."""
        wanted = (count, self._together.version)
        if self._bound == wanted:
            return
        self._rows.clear_binding_inputs()
        self._rows.clear_binding_outputs()
        for cache in self._caches:
            cache.bind(self._rows, 0, count)
        for name, value in self._together.arrays.items():
            bind(self._rows, name, value)
        self._bound = wanted


class Cache:
    """Keys, or values, of one layer."""

    def __init__(self, name: str, output: str, shape: tuple[int, ...], dtype: Any) -> None:
        self.name, self.output = name, output
        self.shape, self.dtype = shape, np.dtype(dtype)
        self.slot_bytes = int(np.prod(shape[1:])) * self.dtype.itemsize
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, shape[0] * self.slot_bytes, flags=flags)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):  # 2 MB at a time would be most of it at once
            self._memory.madvise(mmap.MADV_NOHUGEPAGE)
        self.values = np.frombuffer(self._memory, dtype).reshape(shape)
        self._address = self.values.ctypes.data

    def bind(self, binding: Any, slot: int, count: int) -> None:
        """Have the graph read and write `count` slots from `slot` on, in place."""
        address = self._address + slot * self.slot_bytes
        shape = (count, *self.shape[1:])
        binding.bind_input(self.name, "cpu", 0, self.dtype.type, shape, address)
        binding.bind_output(self.output, "cpu", 0, self.dtype.type, shape, address)

    def free(self, slot: int) -> None:
        page = mmap.PAGESIZE
        first = -(-slot * self.slot_bytes // page) * page  # rounded up
        last = (slot + 1) * self.slot_bytes // page * page
        if last > first and hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED, first, last - first)


def _session(path: Path, settings: dict[str, Any]) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.log_severity_level = ERRORS_ONLY
    options.intra_op_num_threads = int(settings.get("intra_op_num_threads") or 0)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # of the library, whatever C++ threw
        raise UserError(f"{path}: cannot be loaded: {str(error).strip()}") from None


def _rows_input(folder: Path) -> str:
    """The input that says which rows of a batch an adapter is for; empty if there is none."""
    try:
        return str(json_object(folder / "adapter_inputs.json").get("rows", ""))
    except Missing:
        return ""


def _caches(inputs: dict, outputs: dict, slots: int, context: int) -> list[Cache]:
    """The caches of all layers, by their names in the graph."""
    found = []
    for name, each in inputs.items():
        if not name.startswith("past_key_values."):
            continue
        output = name.replace("past_key_values", "present")
        _, heads, _, head_size = each.shape
        if output not in outputs:
            raise UserError(f"the graph has {name} and no {output}")
        found.append(Cache(name, output, (slots, heads, context, head_size), TYPES[each.type]))
    if not found or not {"input_ids", "attention_mask"} <= inputs.keys():
        raise UserError("the graph is no decoder with a cache of keys and values")
    return found


def bind(binding: Any, name: str, value: np.ndarray) -> None:
    """Have the graph read an array, which must stay where it is."""
    binding.bind_input(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)


def bind_output(binding: Any, name: str, value: np.ndarray) -> None:
    binding.bind_output(name, "cpu", 0, value.dtype.type, value.shape, value.ctypes.data)
