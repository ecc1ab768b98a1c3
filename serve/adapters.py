"""Adapters of a running server: found by name, read when first asked for, and several as one."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from stages.errors import UserError
from stages.generation import SUFFIX, adapters_of
from stages.reading import ADAPTER_NAME

# After so many steps without a row of its own, an adapter is left out of the batch: each step reads
# all that is in it, and laying it out anew costs as much as a few steps.
IDLE_STEPS = 16


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

    @property
    def bytes(self) -> int:
        return sum(each.nbytes for each in self.arrays.values())


def read(name: str, path: Path, parameters: Mapping[str, list[Any]]) -> Adapter:
    """Read an .onnx_adapter file.

    Args:
        parameters: shapes that the graph takes, by name; the rank is a text in them.

    Raises:
        UserError: the file is no adapter, or one of another model.
    """
    try:
        file = ort.AdapterFormat.read_adapter(str(path))  # its parameters are views of it
        arrays = {key: value.numpy().copy() for key, value in file.get_parameters().items()}
    except Exception as error:  # of the library, whatever C++ threw
        raise UserError(f"{path}: cannot be loaded: {str(error).strip()}") from None
    for key, value in arrays.items():
        shape = parameters.get(key)
        if shape is None or len(shape) != value.ndim:
            raise UserError(f"{path}: {key} {value.shape}: no input of this model")
        if any(
            isinstance(dim, int) and dim != got for dim, got in zip(shape, value.shape, strict=True)
        ):
            raise UserError(f"{path}: {key} is {value.shape}, and this model takes {shape}")
    rank = max((value.shape[_rank_axis(key)] for key, value in arrays.items()), default=0)
    return Adapter(name, path, rank, {key: padded(key, it, rank) for key, it in arrays.items()})


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

    def __init__(self, folder: Path, parameters: Mapping[str, list[Any]], kept: int) -> None:
        self._folder, self._parameters, self._kept = folder, parameters, kept
        self._added: dict[str, Path] = {}
        self._removed: set[str] = set()
        self._loaded: OrderedDict[str, tuple[tuple[int, ...], Adapter]] = OrderedDict()
        self._lock = threading.Lock()

    def paths(self) -> dict[str, Path]:
        """Files by name, those of the package first."""
        found = {n: p for n, p in adapters_of(self._folder).items() if n not in self._removed}
        return found | self._added

    def loaded(self) -> list[Adapter]:
        with self._lock:
            return [adapter for _, adapter in self._loaded.values()]

    def get(self, name: str) -> Adapter:
        """An adapter, read from its file if it is not in memory or the file is another by now.

        Raises:
            KeyError: there is none of that name.
            UserError: its file cannot be read.
        """
        path = self.paths()[name]
        with self._lock:
            try:
                status = path.stat()
            except OSError as error:
                raise UserError(f"{path}: cannot be read: {error.strerror}") from None
            stamp = (status.st_ino, status.st_size, status.st_mtime_ns)
            known = self._loaded.get(name)
            if known is None or known[0] != stamp or known[1].path != path:
                self._loaded[name] = (stamp, read(name, path, self._parameters))
            self._loaded.move_to_end(name)
            while len(self._loaded) > self._kept:
                self._loaded.popitem(last=False)
            return self._loaded[name][1]

    def add(self, name: str, path: Path) -> Adapter:
        """Offer an adapter under a name.

        Raises:
            UserError: the name is taken or cannot be one; the file cannot be read.
        """
        if not ADAPTER_NAME.fullmatch(name) or name == "base":
            raise UserError(f"{name!r} is no name for an adapter")
        if name in self.paths():
            raise UserError(f"there is an adapter {name} already")
        if path.suffix != SUFFIX:
            raise UserError(f"{path}: expected a file {SUFFIX}; olivepress convert makes it")
        self._added[name] = path
        try:
            return self.get(name)
        except UserError:
            del self._added[name]
            raise

    def remove(self, name: str) -> None:
        """Offer an adapter no longer; its file stays.

        Raises:
            KeyError: there is none of that name.
        """
        self.paths()[name]
        self._removed.add(name)
        self._added.pop(name, None)
        with self._lock:
            self._loaded.pop(name, None)


class Together:
    """Several adapters as one: A side by side, B below each other; one alone is not copied.

    An adapter stays for a while after its last row, unless another comes meanwhile.
    """

    def __init__(self, parameters: Mapping[str, list[Any]]) -> None:
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
        start, self._places, self._idle = 0, {}, 0
        for adapter in adapters:
            self._places[adapter] = slice(start, start + adapter.rank)
            start += adapter.rank
        self.rank, self.version = start, self.version + 1
        self.arrays = dict(adapters[0].arrays) if len(adapters) == 1 else {}
        for name, shape in self._parameters.items() if adapters else ():
            if name in self.arrays:
                continue
            axis = _rank_axis(name)
            sizes = [start if at == axis else size for at, size in enumerate(shape)]
            whole = np.zeros(sizes, next(iter(adapters[0].arrays.values())).dtype)
            for adapter, place in self._places.items():
                if name in adapter.arrays:
                    whole[(slice(None), place) if axis else place] = adapter.arrays[name]
            self.arrays[name] = whole

    def rows(self, of: Mapping[int, Adapter | None], count: int) -> np.ndarray:
        """`lora_rows`: (count, 1, rank) with 1 where a row's own adapter is."""
        own = np.zeros((count, 1, self.rank), next(iter(self.arrays.values())).dtype)
        for row, adapter in of.items():
            if adapter:
                own[row, 0, self._places[adapter]] = 1
        return own
