"""What a package says of itself, against its files: materials, card and lineage."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from cyclonedx.exception import CycloneDxException

from stages import bom, foundry, sums
from stages.card import card, parameters
from stages.errors import UserError, on_one_line
from stages.generation import provider
from stages.package import CARD, MANIFEST, TRACE, volatile, writer
from stages.stage import BASE, LINEAGE, METRICS, ONNX, TOOLCHAIN, as_json
from stages.sums import SUMS, Checked
from tasks import store

MOST_LISTED = 1_000  # in a bill of materials, of some 300; its library takes n² time, here 2 s
MOST_PARAMETERS = 1 << 18  # characters of JSON, of some thousand; YAML takes 4 s to write them
OF_PACKAGE = (MANIFEST, foundry.FILE, SUMS)  # written by `package`, and always the same
MOST_TEXT = 1 << 20  # characters of a prompt put into the template that it is for
# What Python and the bill's library raise when they are given what Olivepress never writes.
NONSENSE = (
    *(ValueError, LookupError, TypeError, AttributeError, StopIteration),
    *(ArithmeticError, CycloneDxException),
)


@dataclass(frozen=True)
class Finding:
    """What one check found of one file."""

    check: str
    verdict: Literal["ok", "failed", "not checked"]
    message: str
    path: str | None = None
    """In the package, or in the project."""


@dataclass
class Package:
    """A package that is being checked, and what was found so far."""

    folder: Path
    checked: Checked
    findings: list[Finding] = field(default_factory=list)
    manifest: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    metrics: dict[str, Any] = field(default_factory=dict)

    @property
    def failed(self) -> bool:
        return any(finding.verdict == "failed" for finding in self.findings)

    @contextmanager
    def check(self, name: str, path: str, good: str) -> Iterator[Callable[..., None]]:
        """One check; it has failed if its body says so, or cannot make sense of what it reads."""
        before = len(self.findings)

        def say(message: str, where: str = path, verdict: Any = "failed") -> None:
            self.findings.append(Finding(name, verdict, on_one_line(message), on_one_line(where)))

        try:
            yield say
        except UserError as error:
            say(str(error))
        except NONSENSE as error:
            say(f"is not what Olivepress writes: {type(error).__name__}: {str(error)[:200]}")
        except RecursionError:
            say("is nested too deeply")
        if len(self.findings) == before:
            say(good, verdict="ok")


def check_contents(package: Package) -> bool:
    """Read what the package says of itself; whether all of it can be read."""
    figures = [name for name in package.checked.files if name.startswith("metrics/")]
    read: dict[str, Any] = {}
    with package.check("contents", MANIFEST, "can be read, with lineage and figures") as say:
        for name in (MANIFEST, TRACE, *figures):
            try:
                read[name] = _json(package, name)
            except UserError as error:
                say(str(error), name)
                return False
        package.manifest, package.lineage = read[MANIFEST], read[TRACE]
        package.metrics = {Path(name).stem: read[name] for name in figures}
        if package.metrics.keys() != package.manifest["adapters"].keys():
            say("names other adapters than metrics/ has figures of")
            return False
        if foundry.FILE in package.checked.files:  # packages had none at first
            asked = _json(package, foundry.FILE)["PromptTemplate"]["prompt"]
            if asked != package.manifest["prompt_template"].replace("{prompt}", foundry.SLOT):
                say(f"asks otherwise than {MANIFEST}", foundry.FILE)
        return True
    return False


def _json(package: Package, name: str) -> dict[str, Any]:
    """A JSON object of the package.

    Raises:
        UserError: it is none.
    """
    try:
        value = json.loads(sums.read_small(package.folder / name))
    except (ValueError, RecursionError):
        raise UserError("is not JSON") from None
    if not isinstance(value, dict):
        raise UserError("is not a JSON object")
    return value


def check_materials(package: Package) -> None:
    """bom.cdx.json: lists these files, and is what follows from them, digit for digit."""
    files, lineage = package.checked.files, package.lineage
    with package.check("materials", bom.BOM, "lists these files and what made them") as say:
        written = _json(package, bom.BOM)
        listed, base, used = bom.read(written)
        lasting = {n: d.sha256 for n, d in files.items() if not volatile(n) and n != SUMS}
        for name in sorted(listed.keys() | lasting):
            if listed.get(name) != lasting.get(name):
                say(f"is not the file that {bom.BOM} lists", name)
        for name in (name for name in base if name in files and name.startswith("LICENSE")):
            if base[name]["SHA-256"] != files[name].sha256:
                say("is not that of the base model", name)
        md5s = {name: digests["MD5"] for name, digests in base.items()}
        if f"md5:{store.folder_md5(md5s)}" != lineage["fetch"]["outs"][BASE.as_posix()]:
            say(f"lists another base model than {TRACE}")
        versions = lineage["package"]["record"]["versions"]
        for name in (name for name in versions if used.get(name) != versions[name]):
            say(f"lists {name} {used.get(name)}, and {TRACE} {versions[name]}")
        found = sums.read_small(package.folder / bom.BOM)
        if bom.numbered(written).encode() != found:
            say("was changed: its serial number is not that of its content")
        elif package.manifest["writer"] != writer():
            say("written by another version; only its files compared", verdict="not checked")
        elif found != _bom(package, listed, base, used).encode():
            say(f"is not what follows from {MANIFEST}, {TRACE} and metrics/")


def _bom(package: Package, listed: dict[str, str], base: Any, used: dict[str, str]) -> str:
    """What bom.cdx.json should be.

    Raises:
        ValueError: too much is listed to be true.
    """
    if len(listed) + len(base) + len(used) > MOST_LISTED:
        raise ValueError(f"it lists more than {MOST_LISTED} things")
    return bom.write(
        package.manifest,
        metrics=package.metrics,
        lineage=package.lineage,
        sums=listed,
        base=base,
        used=used,
    )


def check_card(package: Package) -> None:
    """README.md: what follows from the package's own figures."""
    with package.check("card", CARD, "says what the figures of the package say") as say:
        if package.manifest["writer"] != writer():
            return say("written by another version of the card", verdict="not checked")
        for figures in package.metrics.values():
            prompt = figures["answers"][0]["prompt"]
            if len(prompt) * figures["prompt_template"].count("{prompt}") > MOST_TEXT:
                raise UserError("its prompt is too long")
        if len(json.dumps(parameters(package.lineage))) > MOST_PARAMETERS:
            raise UserError("its parameters are too many")
        sums.read_small(package.folder / "genai_config.json")
        text = card(package.manifest, package.metrics, package.lineage, provider(package.folder))
        if text.encode() != sums.read_small(package.folder / CARD):
            say("is not what the figures in metrics/ and lineage.json give")
    return None


def check_lineage(package: Package) -> None:
    """lineage.json: the outputs of its stages are the files of the package, its records theirs."""
    files, lineage = package.checked.files, package.lineage
    made = {name: digest.md5 for name, digest in files.items()}
    apart = ("adapters/", "metrics/", "LICENSE")
    onnx = {
        name: md5
        for name, md5 in made.items()
        if not name.startswith(apart) and not volatile(name) and name not in OF_PACKAGE
    }
    with package.check("lineage", TRACE, "its stages made the files that are here") as say:

        def expect(stage: str, out: str, md5: str | None, where: str) -> None:
            if lineage[stage]["outs"][out] != f"md5:{md5}":
                say(f"not what {TRACE} says that {stage} made", where)

        expect("export", ONNX.as_posix(), store.folder_md5(onnx), ", ".join(sorted(onnx)))
        for name, path in package.manifest["adapters"].items():
            expect(f"convert@{name}", f"models/{path}", made.get(path), path)
            figures = f"metrics/{name}.json"
            expect(f"evaluate@{name}", f"{METRICS}/{name}.json", made.get(figures), figures)
        for stage in (stage for stage in lineage if stage != "package"):
            if lineage[stage]["outs"][f"{LINEAGE}/{stage}.json"] != _md5(lineage[stage]["record"]):
                say(f"the record of {stage} is not the one that {stage} wrote")
        versions = lineage["package"]["record"]["versions"]
        if lineage["toolchain"]["outs"][TOOLCHAIN.as_posix()] != _md5(versions):
            say("names other versions than toolchain found")


def _md5(value: object) -> str:
    """As dvc.lock has it of a file that a stage wrote as JSON."""
    return "md5:" + hashlib.md5(as_json(value).encode(), usedforsecurity=False).hexdigest()
