"""What a machine has, and what a candidate needs."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

from stages.params import Params
from tasks import doctor
from tasks.pool import gpu


@dataclass(frozen=True)
class Has:
    """A machine, or what is asked of one. Sizes in GB of 10^9 bytes."""

    gpus: int
    memory_gb: float
    disk_gb: float

    def __str__(self) -> str:
        gpus = f"{self.gpus} GPU, " if self.gpus else ""
        return f"{gpus}{self.memory_gb:.1f} GB of memory and {self.disk_gb:.1f} GB of disk"

    def lacks(self, needs: Has) -> list[str]:
        """What of the needs this machine does not have, in words."""
        found = []
        if self.gpus < needs.gpus:
            found.append("a GPU")
        for name, unit in (("memory_gb", "GB of memory"), ("disk_gb", "GB of free disk")):
            here, wanted = getattr(self, name), getattr(needs, name)
            if here < wanted:
                found.append(f"{wanted:.1f} {unit} (it has {here:.1f})")
        return found


def this_machine(root: Path) -> Has:
    import psutil

    memory = psutil.virtual_memory().total / doctor.GB
    return Has(gpu.count(), memory, shutil.disk_usage(root).free / doctor.GB)


def needs_of(root: Path, values: Params) -> Has:
    """What a run with these parameters needs, as far as the model's size is known here."""
    size = doctor.parameters(root, values.base) or 0
    return Has(
        gpus=int(values.export.device == "gpu"),
        memory_gb=doctor.memory_needed(size) / doctor.GB,
        disk_gb=doctor.disk_needed(values.base, size) / doctor.GB,
    )
