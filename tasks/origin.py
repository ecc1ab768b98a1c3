"""Whether a package is what it says it is: its files, signature, card, lineage and materials.

A package may come from anyone. Nothing in it is run or unpickled, what is read as a whole is small
(`stages.sums`), and what cannot be made sense of is a finding, not a traceback.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from stages import sums
from stages.errors import UserError
from stages.package import TRACE, trace
from stages.stage import PACKAGE
from stages.sums import SIGNATURE, SUMS, Told
from tasks import bridge, rebuild, signing, statements, store
from tasks.signing import Trusted
from tasks.statements import Finding, Package

APART = "to check a package of another commit or project, leave dvc.lock out with --no-project"


def verify_package(
    folder: Path,
    *,
    root: Path | None = None,
    trusted: Trusted | None = None,
    signature: Path | None = None,
    signed: bool = False,
    again: bool = False,
    told: Told = lambda done, total, name: None,
    on_line: Callable[[str], None] = lambda line: None,
) -> list[Finding]:
    """Check a package; it is sound if no finding says `failed`.

    Args:
        folder: the package.
        root: the project whose dvc.lock should record it, which is the working directory; None for
            a package of which no project is at hand.
        trusted: whose signature is wanted.
        signature: its file; None for the one in the package or beside it.
        signed: whether a package fails that is not signed, or whose signature was not checked.
        again: make it again from the recorded commit, and compare; if all else is sound.
        told: progress of the reading.
        on_line: what the stages print when it is made again.
    """
    package = Package(folder, sums.check(folder, told))
    _files(package)
    _signature(package, trusted or Trusted(), signature, signed)
    if statements.check_contents(package):
        statements.check_materials(package)
        statements.check_card(package)
        statements.check_lineage(package)
    _lock(package, root)
    if again:
        _again(package, root, on_line)
    return package.findings


def _files(package: Package) -> None:
    """Each file against SHA256SUMS."""
    files = package.checked.files.values()
    good = f"{len(files)} files, {sum(file.size for file in files) / 1e6:,.1f} MB"
    with package.check("files", SUMS, good) as say:
        for name, problem in sorted(package.checked.problems.items()):
            say(problem, name)


def _signature(package: Package, trusted: Trusted, path: Path | None, wanted: bool) -> None:
    path = path or signing.of_package(package.folder)
    unchecked = "failed" if wanted else "not checked"
    name = path.name if path else SIGNATURE
    with package.check("signature", name, f"is of these files, by {_whom(trusted)}") as say:
        if not path:
            say("not signed", verdict="failed" if trusted else unchecked)
        elif not trusted:
            say("signed, but by whom was not checked: give --key PUBLIC", verdict=unchecked)
        elif not package.checked.plain:
            say("not read, as the package has what no package has")
        else:
            signing.check(package.folder, path, trusted)


def _whom(trusted: Trusted) -> str:
    return f"the key {trusted.key}" if trusted.key else f"{trusted.identity} of {trusted.issuer}"


def _lock(package: Package, root: Path | None) -> None:
    """The whole package, and its lineage, against dvc.lock."""
    with package.check("dvc.lock", TRACE, "the package is the one that dvc.lock records") as say:
        if not root:
            return say("no project: nothing to compare with", verdict="not checked")
        known = bridge.recorded(root, PACKAGE.as_posix())
        if not known:
            raise UserError(f"dvc.lock records no package; {APART}")
        here = {name: digest.md5 for name, digest in package.checked.files.items()}
        whole, listed = known
        if store.folder_md5(here) != whole:
            say(f"is not the one that dvc.lock records; {APART}", package.folder.name)
            for name in sorted(listed.keys() | here) if listed else []:
                if (listed or {}).get(name) != here.get(name):
                    say(f"is not what dvc.lock records of {PACKAGE}", name)
        adapters = list(package.manifest.get("adapters", []))
        for stage, entry in trace(adapters).items() if package.lineage else []:
            said = package.lineage.get(stage, {})
            for part in ("cmd", "deps", "params", "outs"):
                if said.get(part) != entry[part]:
                    say(f"{stage}: {part} are not those that dvc.lock records")
    return None


def _again(package: Package, root: Path | None, on_line: Callable[[str], None]) -> None:
    """Make it again and compare."""
    with package.check("rebuild", TRACE, "made again, it is the same byte for byte") as say:
        if not root:
            raise UserError("only in its project can a package be made again")
        if package.failed:
            return say("not made again, as it is not sound", verdict="not checked")
        record = package.lineage["package"]["record"]
        for name, message in rebuild.differences(root, package.folder, record, on_line):
            say(message, name)
    return None
