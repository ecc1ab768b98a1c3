"""Adapters of a running server: found by name, read when first asked for, and several as one."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnxruntime as ort

from stages.errors import UserError
from stages.generation import SUFFIX
from stages.reading import ADAPTER_NAME, opened

BASE = "base"  # the name of the model without an adapter
ADAPTER_BYTES = 16 << 30
# After so many steps without a row of its own, an adapter is left out of the batch: each step reads
# all that is in it, and laying it out anew costs as much as a few steps.
IDLE_STEPS = 16


@dataclass(frozen=True)
class Parameter:
    """An input of the graph for an adapter's matrix."""

    shape: tuple[int | str, ...]
    """The rank is a text in it."""
    dtype: np.dtype


@dataclass(eq=False)
class Adapter:
    """The two matrices of each adapted projection, as the graph takes them.

    `arrays` has A (in_features, rank) and B (rank, out_features) by the names of the inputs; all
    have the rank of the largest, the others zeros in the ranks they lack.
    """

    name: str
    path: Path
    rank: int
    arrays: dict[str, np.ndarray] = field(repr=False)


def read(name: str, path: Path, parameters: Mapping[str, Parameter]) -> Adapter:
    """Read an .onnx_adapter file.

    Args:
        parameters: what the graph takes, by name.

    Raises:
        UserError: the file is no adapter, or one of another model, or has values that are no
            numbers.
    """
    with opened(path) as file:  # not a pipe, which would be waited for
        size = os.fstat(file.fileno()).st_size
    if size > ADAPTER_BYTES:
        raise UserError(f"{path}: {size} bytes are more than an adapter has")
    try:
        reader = ort.AdapterFormat.read_adapter(str(path))  # its parameters are views of it
        arrays = {key: value.numpy().copy() for key, value in reader.get_parameters().items()}
    except Exception as error:  # of the library, whatever C++ threw
        raise UserError(f"{path}: cannot be loaded: {str(error).strip()}") from None
    if not arrays:
        raise UserError(f"{path}: has no parameters")
    for key, value in arrays.items():
        _check(f"{path}: {key}", value, parameters.get(key))
        other = key.removesuffix("A") + "B" if key.endswith("A") else key.removesuffix("B") + "A"
        if (
            other not in arrays
            or arrays[other].shape[_rank_axis(other)] != value.shape[_rank_axis(key)]
        ):
            raise UserError(f"{path}: {key} has no {other} of its rank")
    rank = max(value.shape[_rank_axis(key)] for key, value in arrays.items())
    return Adapter(name, path, rank, {key: padded(key, it, rank) for key, it in arrays.items()})


def _check(what: str, value: np.ndarray, wanted: Parameter | None) -> None:
    if wanted is None or len(wanted.shape) != value.ndim:
        raise UserError(f"{what} {value.shape}: no input of this model")
    sizes = zip(wanted.shape, value.shape, strict=True)
    if any(isinstance(dim, int) and dim != size for dim, size in sizes):
        raise UserError(f"{what} is {value.shape}, and this model takes {wanted.shape}")
    if value.dtype != wanted.dtype:
        raise UserError(f"{what} is {value.dtype}, and this model takes {wanted.dtype}")
    if not np.isfinite(value).all():
        raise UserError(f"{what} has values that are no numbers")


def _rank_axis(name: str) -> int:
    return 1 if name.endswith("lora_A") else 0


def padded(name: str, value: np.ndarray, rank: int) -> np.ndarray:
    """A or B with zeros in the ranks that it lacks."""
    axis = _rank_axis(name)
    lack = [(0, rank - value.shape[axis] if each == axis else 0) for each in range(2)]
    return np.ascontiguousarray(np.pad(value, lack)) if any(map(sum, lack)) else value


class Shelf:
    """The adapters that can be asked for: files of the package, and those that were added.

    At most `kept` are in memory; the one that was asked for longest ago makes way. A file that is
    put into the package's `adapters` folder, or changed there, is seen at the next request. Safe to
    use from several threads.
    """

    def __init__(self, folder: Path, parameters: Mapping[str, Parameter], kept: int) -> None:
        self._folder, self._parameters, self._kept = folder, parameters, kept
        self._added: dict[str, Path] = {}
        self._removed: set[str] = set()
        self._loaded: OrderedDict[str, tuple[tuple[str, int, int, int], Adapter]] = OrderedDict()
        self._lock = threading.Lock()

    def paths(self) -> dict[str, Path]:
        """Files by name, those of the package first; one that cannot be a model's is left out."""
        found = {}
        for path in sorted(self._folder.glob(f"adapters/*{SUFFIX}")):
            name = path.name.removesuffix(SUFFIX)
            if can_be_named(name) and not path.is_symlink() and path.is_file():
                found[name] = path
        with self._lock:
            return {n: p for n, p in found.items() if n not in self._removed} | self._added

    def loaded(self) -> list[str]:
        """Names of those in memory."""
        with self._lock:
            return list(self._loaded)

    def get(self, name: str) -> Adapter:
        """An adapter, read from its file if it is not in memory or the file is another by now.

        Raises:
            KeyError: there is none of that name.
            UserError: its file cannot be read.
        """
        path = self.paths()[name]
        stamp = _stamp(path)
        with self._lock:
            if (known := self._loaded.get(name)) and known[0] == stamp:
                self._loaded.move_to_end(name)
                return known[1]
        adapter = read(name, path, self._parameters)
        self._keep(name, stamp, adapter)
        return adapter

    def _keep(self, name: str, stamp: tuple[str, int, int, int], adapter: Adapter) -> None:
        with self._lock:
            self._loaded[name] = (stamp, adapter)
            self._loaded.move_to_end(name)
            while len(self._loaded) > self._kept:
                self._loaded.popitem(last=False)

    def add(self, name: str, path: Path) -> Adapter:
        """Offer an adapter under a name.

        Raises:
            UserError: the name is taken or cannot be one; the file cannot be read.
        """
        if not can_be_named(name):
            raise UserError(f"{name!r} is no name for an adapter")
        if path.suffix != SUFFIX:
            raise UserError(f"{path}: expected a file {SUFFIX}; olivepress convert makes it")
        adapter, stamp = read(name, path, self._parameters), _stamp(path)
        if name in self.paths():
            raise UserError(f"there is an adapter {name} already")
        with self._lock:
            self._added[name] = path
        self._keep(name, stamp, adapter)
        return adapter

    def remove(self, name: str) -> None:
        """Offer an adapter no longer; its file stays.

        Raises:
            KeyError: there is none of that name.
        """
        self.paths()[name]
        with self._lock:
            if self._added.pop(name, None) is None:
                self._removed.add(name)
            self._loaded.pop(name, None)


def can_be_named(name: str) -> bool:
    return bool(ADAPTER_NAME.fullmatch(name)) and name != BASE


def _stamp(path: Path) -> tuple[str, int, int, int]:
    """What changes when a file does."""
    try:
        status = path.stat()
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read: {error}") from None
    return (str(path), status.st_ino, status.st_size, status.st_mtime_ns)


class Together:
    """Several adapters as one: A side by side, B below each other; one alone is not copied.

    An adapter stays for a while after its last row, unless another comes meanwhile.
    """

    def __init__(self, parameters: Mapping[str, Parameter]) -> None:
        self._parameters = parameters
        self._places: dict[Adapter, slice] = {}
        self._idle = 0  # steps since all that is laid out was wanted
        self.arrays: dict[str, np.ndarray] = {}
        self.rank = 0
        self.version = 0

    def take(self, wanted: set[Adapter]) -> None:
        """Have these laid out, unless they are."""
        there = self._places.keys()
        self._idle = 0 if wanted == there else self._idle + 1
        if wanted <= there and self._idle <= IDLE_STEPS:
            return
        self._lay_out([*(one for one in there if one in wanted), *(wanted - there)])

    def _lay_out(self, adapters: list[Adapter]) -> None:
        start, places = 0, {}
        for adapter in adapters:
            places[adapter] = slice(start, start + adapter.rank)
            start += adapter.rank
        arrays = dict(adapters[0].arrays) if len(adapters) == 1 else {}
        for name, wanted in self._parameters.items() if adapters else ():
            if name in arrays:
                continue
            axis = _rank_axis(name)
            sizes = [start if at == axis else int(size) for at, size in enumerate(wanted.shape)]
            whole = np.zeros(sizes, wanted.dtype)
            for adapter, place in places.items():
                if name in adapter.arrays:
                    whole[(slice(None), place) if axis else place] = adapter.arrays[name]
            arrays[name] = whole
        self._places, self._idle, self.arrays = places, 0, arrays
        self.rank, self.version = start, self.version + 1

    def rows(self, of: Mapping[int, Adapter | None], count: int) -> np.ndarray:
        """`lora_rows`: bool (count, 1, rank), true where a row's own adapter is."""
        own = np.zeros((count, 1, self.rank), bool)
        for row, adapter in of.items():
            if adapter:
                own[row, 0, self._places[adapter]] = True
        return own
