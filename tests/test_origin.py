"""Proof of origin: the bill of materials, signatures, and `olivepress verify` on a real package."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from packaged import publish, work_in_copy

from conftest import REPO, sh, typed
from stages import bom, sums
from stages.errors import UserError
from stages.stage import as_json, commit
from stages.sums import SIGNATURE, SUMS
from tasks import bridge, rebuild, signing
from tasks.origin import Finding, verify_package
from tasks.signing import PASSWORD, Trusted
from tests.fuzz.targets import write_package

SECRET = "pa55word-of-the-key"
pytestmark = pytest.mark.timeout(120, func_only=True)  # the lab, which a fixture makes, takes more


@dataclass(frozen=True)
class Keys:
    private: Path
    public: Path
    other: Path
    """A public key of somebody else."""


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """Made as `olivepress sign --help` says."""
    folder = tmp_path_factory.mktemp("keys")
    curve = ("-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256")
    for name in ("mine", "other"):
        file, word = f"{name}.pem", f"pass:{SECRET}"
        sh("openssl", "genpkey", *curve, "-aes256", "-pass", word, "-out", file, cwd=folder)
        read = ("-in", file, "-passin", word)
        sh("openssl", "pkey", *read, "-pubout", "-out", f"{name}.pub", cwd=folder)
    return Keys(folder / "mine.pem", folder / "mine.pub", folder / "other.pub")


@pytest.fixture(scope="module")
def signed(lab: Path, keys: Keys, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The lab's package, away from it and signed."""
    folder = tmp_path_factory.mktemp("signed") / "package"
    shutil.copytree(lab / "models/package", folder)
    done = typed("sign", str(folder), "--key", str(keys.private), cwd=lab, **{PASSWORD: SECRET})
    assert done.exit_code == 0, done.output
    assert SECRET not in done.output and f"signed: {folder / SIGNATURE}" in done.output
    return folder


@pytest.fixture
def package(signed: Path, tmp_path: Path) -> Path:
    """A copy of it to do harm to."""
    return Path(shutil.copytree(signed, tmp_path / "package"))


@pytest.fixture
def here(lab: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(lab)
    return lab


def failures(folder: Path, **asked: Any) -> list[Finding]:
    return [one for one in verify_package(folder, **asked) if one.verdict == "failed"]


def named(folder: Path, **asked: Any) -> dict[str, set[str]]:
    """Check that failed -> files that it names."""
    found: dict[str, set[str]] = {}
    for one in failures(folder, **asked):
        found.setdefault(one.check, set()).update(str(one.path).split(", "))
    return found


def flip(path: Path) -> None:
    """Another byte in the middle, which is still text where it was."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def sum_again(folder: Path) -> None:
    """As one does who changed a file and knows of SHA256SUMS."""
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    listed = {name: sums.sha256(folder / name) for name in names if name not in (SUMS, SIGNATURE)}
    sums.write(folder, listed)


def edit(path: Path, change: Callable[[dict], object]) -> None:
    value = json.loads(path.read_text())
    change(value)
    path.write_text(as_json(value))


# The bill of materials.
def test_the_bill_of_materials_is_valid_and_has_all_that_the_model_was_made_from(lab: Path) -> None:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    text = (lab / "models/package" / bom.BOM).read_text()
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    written = json.loads(text)
    assert "timestamp" not in written["metadata"]
    parts = {part["bom-ref"]: part for part in written["components"]}
    for line in (lab / "requirements.lock").read_text().split():
        name, _, version = line.partition("==")
        part = parts[f"library:{name}"]
        assert part["version"] == version
        plain = re.sub(r"[-_.]+", "-", name).lower()
        assert re.sub(r"[-_.]+", "-", part["purl"].lower()) == re.sub(
            r"[-_.]+", "-", f"pkg:pypi/{plain}@{version}".lower()
        )

    def sha(part: dict) -> str:
        return next(one["content"] for one in part["hashes"] if one["alg"] == "SHA-256")

    for name in ("data/travel.jsonl", "data/everyday.jsonl"):
        assert sha(parts[f"data:{name}"]) == sums.sha256(lab / name)
    base = written["metadata"]["component"]["pedigree"]["ancestors"][0]
    assert {p["name"]: sha(p) for p in base["components"]} == {
        path.name: sums.sha256(path) for path in (lab / "models/base").iterdir()
    }
    for name in ("model.onnx.data", "adapters/travel.onnx_adapter"):
        assert sha(parts[f"file:{name}"]) == sums.sha256(lab / "models/package" / name)
    assert parts["file:adapters/travel.onnx_adapter"]["type"] == "machine-learning-model"
    taught = next(d for d in written["dependencies"] if d["ref"].startswith("file:adapters/"))
    assert taught["dependsOn"] == ["data:data/travel.jsonl"]
    figures = written["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]
    measured = json.loads((lab / "metrics/travel.json").read_text())["onnx_on"]["perplexity"]
    assert str(measured) in {one["value"] for one in figures["performanceMetrics"]}


def test_the_same_inputs_are_the_same_bill_of_materials(lab: Path, tmp_path: Path) -> None:
    """In a process with other hashes of its strings, at another time."""
    before = (lab / "models/package" / bom.BOM).read_bytes()
    code = "from stages.package import main; from stages.params import load; main(load())"
    shutil.copytree(lab, tmp_path / "lab", ignore=shutil.ignore_patterns(".dvc", "quantized"))
    sh("python", "-c", code, cwd=tmp_path / "lab", PYTHONHASHSEED="5", PYTHONPATH=".")
    assert (tmp_path / "lab/models/package" / bom.BOM).read_bytes() == before


def test_a_run_that_writes_dvc_lock_is_made_from_its_commit(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    who = ("-c", "user.name=t", "-c", "user.email=t@t")
    (toy / "dvc.lock").write_text("one")
    sh("git", "add", "--all", cwd=toy)
    sh("git", *who, "commit", "-qm", "start", cwd=toy)
    (toy / "dvc.lock").write_text("two")
    assert not commit()["git_dirty"]
    (toy / "in.txt").write_text("two")
    assert commit()["git_dirty"]


# Sound, and signed or not.
def test_a_package_that_is_not_signed_is_sound_and_said_to_be_unsigned(lab: Path) -> None:
    done = typed("verify", "models/package", "--json", cwd=lab)
    assert done.exit_code == 0, done.output
    said = json.loads(done.stdout)
    verdicts = {one["check"]: one["verdict"] for one in said["findings"]}
    assert said["sound"] and verdicts.pop("signature") == "not checked"
    assert set(verdicts.values()) == {"ok"} and len(verdicts) == 6
    done = typed("verify", "models/package", "--signed", cwd=lab)
    assert done.exit_code == 1 and "model.sig: not signed" in done.output


def test_a_signature_is_checked_with_the_key_of_who_made_it(
    lab: Path, package: Path, keys: Keys
) -> None:
    done = typed("verify", str(package), "--key", str(keys.public), "--signed", cwd=package.parent)
    assert done.exit_code == 0, done.output
    assert "by the key" in done.output and "no project" in done.output
    assert json.loads((package / SIGNATURE).read_text())["dsseEnvelope"]
    aside = package.parent / "aside.sig"
    (package / SIGNATURE).rename(aside)
    asked = ("verify", "package", "--key", os.path.relpath(keys.public, package.parent))
    done = typed(*asked, cwd=package.parent)
    assert done.exit_code == 1 and "model.sig: not signed" in done.output
    done = typed(*asked, "--signature", "aside.sig", cwd=package.parent)
    assert done.exit_code == 0, done.output
    aside.rename(package / SIGNATURE)
    done = typed("verify", str(package), "--key", str(keys.other), cwd=package.parent)
    assert done.exit_code == 1 and "model.sig: is no signature by whom" in done.output
    done = typed("verify", str(package), "--signed", cwd=package.parent)
    assert done.exit_code == 1 and "by whom was not checked" in done.output
    done = typed("verify", str(package), "--key", str(keys.private), cwd=package.parent)
    assert done.exit_code == 1 and "not a public key" in done.output
    done = typed("verify", str(package / "no"), cwd=package.parent)
    assert done.exit_code == 1 and "no such folder" in done.output


def test_paths_are_from_where_one_is(lab: Path, package: Path, keys: Keys) -> None:
    there = lab / "data"
    asked = [os.path.relpath(path, there) for path in (package, keys.public)]
    done = typed("verify", asked[0], "--key", asked[1], "--json", cwd=there)
    assert done.exit_code == 0, done.output
    assert {one["verdict"] for one in json.loads(done.stdout)["findings"]} == {"ok"}


def test_others_check_it_with_the_library_alone(package: Path, keys: Keys) -> None:
    from model_signing import verifying

    config = verifying.Config().use_elliptic_key_verifier(public_key=keys.public)
    config.verify(package, package / SIGNATURE)
    flip(package / "model.onnx.data")
    with pytest.raises(ValueError, match=r"Hash mismatch for \\*'model\.onnx\.data"):
        config.verify(package, package / SIGNATURE)


@pytest.mark.parametrize("word", ["", "wrong"])
def test_a_key_that_does_not_open_signs_nothing(
    package: Path, keys: Keys, word: str, tmp_path: Path
) -> None:
    (package / SIGNATURE).unlink()
    asked = ("sign", str(package), "--key", str(keys.private))
    done = typed(*asked, cwd=tmp_path, **{PASSWORD: word})
    assert done.exit_code == 1 and "not a private key that can be used" in done.output
    assert word not in done.output.partition("used here")[2] or not word
    assert not (package / SIGNATURE).exists() and not list(package.glob(".*"))


def test_what_is_damaged_is_not_signed(package: Path, keys: Keys, tmp_path: Path) -> None:
    before = (package / SIGNATURE).read_bytes()
    flip(package / "config.json")
    asked = ("sign", str(package), "--key", str(keys.private))
    done = typed(*asked, cwd=tmp_path, **{PASSWORD: SECRET})
    assert done.exit_code == 1 and "config.json; nothing was signed" in done.output
    assert (package / SIGNATURE).read_bytes() == before


def test_it_is_signed_in_one_of_two_ways(package: Path, keys: Keys, tmp_path: Path) -> None:
    for asked in ([], ["--key", str(keys.private), "--sigstore"]):
        done = typed("sign", str(package), *asked, cwd=tmp_path)
        assert done.exit_code == 1 and "either --key KEY or --sigstore" in done.output
    done = typed("verify", str(package), "--identity", "me@x.org", cwd=tmp_path)
    assert done.exit_code == 1 and "--identity and --issuer go together" in done.output


def test_a_run_does_not_wait_for_the_libraries_of_signing(tmp_path: Path) -> None:
    code = (
        "import sys, flows.cli, flows.publish, tasks.publish.content;"
        "print({'cyclonedx', 'model_signing', 'sigstore', 'OpenSSL'} & set(sys.modules))"
    )
    assert sh("python", "-c", code, cwd=tmp_path, PYTHONPATH=str(REPO)).stdout.strip() == "set()"


def test_others_check_a_signature_with_model_signing_alone(tmp_path: Path, keys: Keys) -> None:
    """As docs/reliability.md says it."""
    folder = tmp_path / "package"
    write_package(folder)
    done = typed(
        "sign", str(folder), "--key", str(keys.private), cwd=tmp_path, **{PASSWORD: SECRET}
    )
    assert done.exit_code == 0, done.output
    docs = (REPO / "docs/reliability.md").read_text()
    command = next(line for line in docs.splitlines() if "model_signing verify" in line)
    places = {"PACKAGE": str(folder), "key.pub": str(keys.public)}
    for name, place in places.items():
        command = command.replace(name, place)

    def check() -> tuple[int, str]:
        done = sh(*command.split(), cwd=tmp_path, check=False)
        return done.returncode, done.stdout + done.stderr

    code, said = check()
    assert code == 0 and "Verification succeeded" in said, said
    flip(folder / "model.onnx")
    code, said = check()
    assert code and "Verification failed" in said and "Verification succeeded" not in said, said


# Tampering.
def test_a_byte_of_any_file_is_found_and_named(package: Path, keys: Keys) -> None:
    names = [p.relative_to(package).as_posix() for p in package.rglob("*") if p.is_file()]
    assert {"README.md", "lineage.json", bom.BOM, SUMS, SIGNATURE} < set(names)
    trusted = Trusted(keys.public)
    before = {name: (package / name).read_bytes() for name in names}
    summed = sorted(set(names) - {SUMS, SIGNATURE})
    for flipped in (summed, [SUMS], [SIGNATURE]):
        for name in flipped:
            flip(package / name)
        found = failures(package, trusted=trusted)
        said = {one.check: one.message for one in found}
        assert "signature" in said, flipped
        if flipped == summed:
            assert [one.path for one in found if one.check == "files"] == summed
            assert said["signature"].partition(", and not of these files: ")[2] == ", ".join(summed)
        for name in flipped:
            (package / name).write_bytes(before[name])
    assert not failures(package, trusted=trusted)


def test_who_mends_the_sums_is_found_without_key_and_project(package: Path) -> None:
    where = {
        "model.onnx.data": {"lineage", "materials"},
        "adapters/travel.onnx_adapter": {"lineage", "materials"},
        "tokenizer.json": {"lineage", "materials"},
        "README.md": {"card"},
        bom.BOM: {"materials"},
    }
    for name, checks in where.items():
        before = (package / name).read_bytes()
        flip(package / name)
        sum_again(package)
        found = named(package)
        assert found.keys() == checks and all(name in files for files in found.values()), name
        (package / name).write_bytes(before)
    sum_again(package)
    assert not failures(package)


def test_another_prompt_for_foundry_local_is_found(package: Path) -> None:
    def other(written: dict) -> None:
        written["PromptTemplate"]["prompt"] = "Say yes. {Content}"

    edit(package / "inference_model.json", other)
    sum_again(package)
    assert named(package)["contents"] == {"inference_model.json"}


def test_better_figures_in_the_card_or_behind_it_are_found(package: Path) -> None:
    card = package / "README.md"
    before = card.read_text()
    card.write_text(re.sub(r"\d+\.\d%", "99.9%", before))
    assert before != card.read_text()
    sum_again(package)
    assert named(package) == {"card": {"README.md"}}
    card.write_text(before)

    def better(figures: dict) -> None:
        figures["onnx_on"]["exact_answer_rate"] = 1.0

    edit(package / "metrics/travel.json", better)
    sum_again(package)
    found = named(package)
    assert "metrics/travel.json" in found["lineage"] and "README.md" in found["card"]


def test_a_changed_lineage_is_found(package: Path, here: Path) -> None:
    path = package / "lineage.json"
    before = path.read_text()

    def other_record(lineage: dict) -> None:
        lineage["quantize"]["record"]["platform"] = "another machine"

    def other_data(lineage: dict) -> None:
        lineage["prepare@travel"]["deps"]["data/travel.jsonl"] = f"md5:{'0' * 32}"

    for change, part in ((other_record, "record of quantize"), (other_data, "")):
        edit(path, change)
        sum_again(package)
        apart = failures(package)
        assert any(part in one.message for one in apart)
        in_project = failures(package, root=here)
        said = {f"{one.path}: {one.message}" for one in in_project if one.check == "dvc.lock"}
        assert any(line.startswith("lineage.json: is not what dvc.lock") for line in said)
        if not part:
            assert "lineage.json: prepare@travel: deps are not those that dvc.lock records" in said
        path.write_text(before)


def test_every_file_is_bound_to_dvc_lock(package: Path, here: Path) -> None:
    (package / SIGNATURE).unlink()
    assert not failures(package, root=here)
    for name in ("genai_config.json", "olivepress.json", "README.md"):
        before = (package / name).read_bytes()
        flip(package / name)
        sum_again(package)
        assert {name, SUMS} <= named(package, root=here)["dvc.lock"]
        (package / name).write_bytes(before)


def test_a_bill_of_materials_without_a_library_is_found(package: Path, here: Path) -> None:
    def hide(written: dict) -> None:
        written["components"] = [c for c in written["components"] if c["name"] != "torch"]

    def number(written: dict) -> None:
        hide(written)
        written |= json.loads(bom.numbered(written))

    edit(package / bom.BOM, hide)
    sum_again(package)
    assert "serial number" in " ".join(one.message for one in failures(package))
    edit(package / bom.BOM, number)
    sum_again(package)
    assert "lists torch None, and lineage.json" in " ".join(o.message for o in failures(package))


# Hostile packages.
def deep(value: str) -> str:
    return value * 200_000


def a_link(folder: Path) -> str:
    (folder / "config.json").unlink()
    (folder / "config.json").symlink_to("/etc/passwd")
    return "config.json"


def a_linked_folder(folder: Path) -> str:
    (folder / "more").symlink_to("/")
    return "more"


def a_pipe(folder: Path) -> str:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    return "config.json"


def a_pipe_for_sums(folder: Path) -> str:
    (folder / SUMS).unlink()
    os.mkfifo(folder / SUMS)
    return SUMS


def a_file_more(folder: Path) -> str:
    (folder / "adapters/evil\x1b[2J.bin").write_text("x")
    return "adapters/evil\\x1b[2J.bin"


def a_file_less(folder: Path) -> str:
    (folder / "tokenizer.json").unlink()
    return "tokenizer.json"


def a_hole(folder: Path) -> str:
    with (folder / "model.onnx.data").open("ab") as file:
        file.truncate(shutil.disk_usage(folder).total + 1)
    return "model.onnx.data"


def a_deep_lineage(folder: Path) -> str:
    (folder / "lineage.json").write_text('{"a":' + deep("[") + deep("]") + "}")
    sum_again(folder)
    return "lineage.json"


def a_lineage_of_another_form(folder: Path) -> str:
    (folder / "lineage.json").write_text('{"package": 3, "export": [1], "fetch": null}')
    sum_again(folder)
    return "lineage.json"


def a_large_card(folder: Path) -> str:
    (folder / "README.md").write_bytes(b"x" * (sums.MOST_BYTES + 1))
    sum_again(folder)
    return "README.md"


def a_prompt_that_grows(folder: Path) -> str:
    def grow(figures: dict) -> None:
        figures["prompt_template"] = "{prompt}" * 100_000
        figures["answers"][0]["prompt"] = "x" * 1_000_000

    edit(folder / "metrics/travel.json", grow)
    sum_again(folder)
    return "README.md"


def parameters_without_end(folder: Path) -> str:
    def more(lineage: dict) -> None:
        lineage["quantize"]["params"]["quantize.bits"] = [4] * 200_000

    edit(folder / "lineage.json", more)
    sum_again(folder)
    return "README.md"


def a_format_that_reads_more(folder: Path) -> str:
    def leak(figures: dict) -> None:
        figures["prompt_template"] = "{prompt.__class__.__init__.__globals__} {0} {adapter}"

    edit(folder / "metrics/travel.json", leak)
    sum_again(folder)
    return "README.md"


def many_libraries(folder: Path) -> str:
    def more(written: dict) -> None:
        parts = written["components"]
        parts += [
            {"bom-ref": f"library:{i}", "name": str(i), "version": "1", "type": "library"}
            for i in range(20_000)
        ]
        written |= json.loads(bom.numbered(written))

    edit(folder / bom.BOM, more)
    sum_again(folder)
    return bom.BOM


def many_files(folder: Path) -> str:
    (folder / "many").mkdir()
    for i in range(sums.MOST_FILES):
        (folder / f"many/{i}").touch()
    return SUMS


def a_signature_of_any_size(folder: Path) -> str:
    with (folder / SIGNATURE).open("ab") as file:
        file.truncate(1 << 40)
    return SIGNATURE


def a_signature_that_is_none(folder: Path) -> str:
    (folder / SIGNATURE).write_text('{"dsseEnvelope": ' + deep("["))
    return SIGNATURE


@pytest.mark.parametrize(
    "harm",
    [
        *(a_link, a_linked_folder, a_pipe, a_pipe_for_sums, a_file_more, a_file_less, a_hole),
        *(a_deep_lineage, a_lineage_of_another_form, a_large_card, a_prompt_that_grows),
        *(a_format_that_reads_more, parameters_without_end, many_libraries, many_files),
        *(a_signature_of_any_size, a_signature_that_is_none),
    ],
)
def test_a_hostile_package_is_refused_by_name(
    package: Path,
    keys: Keys,
    harm: Callable[[Path], str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sums, "MOST_FILES", 300)
    name = harm(package)
    before = sorted(tmp_path.rglob("*"))
    found = failures(package, trusted=Trusted(keys.public))
    assert name in {one.path for one in found}, found
    assert all(len(one.message) < 3000 and one.message.isprintable() for one in found)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    "line",
    [
        *("../outside", "/etc/passwd", "a/../../b", "./config.json", "a//b", "model.sig"),
        *("a\\b", "\x1b[2J", ".", "config.json", "SHA256SUMS"),
    ],
)
def test_sums_that_name_what_no_package_has(package: Path, line: str) -> None:
    (package.parent / "outside").write_text("x")
    text = (package / SUMS).read_text() + f"{hashlib.sha256(b'x').hexdigest()}  {line}\n"
    (package / SUMS).write_text(text)
    found = failures(package)
    assert any(one.path == SUMS and "names what no package has" in one.message for one in found)


@pytest.mark.parametrize("end", ["not a line\n", "cut off", "\xff\xfe\n"])
def test_sums_of_another_form(package: Path, end: str) -> None:
    with (package / SUMS).open("ab") as file:
        file.write(end.encode("latin-1"))
    assert SUMS in named(package)["files"]


# Publishing, and making it again.
@pytest.fixture
def project(
    packaged_project: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Path]:
    monkeypatch.setenv(PASSWORD, SECRET)
    return work_in_copy(packaged_project, tmp_path / "project", monkeypatch)


def test_the_signature_lies_beside_what_dvc_watches_and_is_published_with_it(
    project: Path, keys: Keys
) -> None:
    folder = project / "models/package"
    place = signing.sign(folder, keys.private, project)
    assert place == project / "models" / SIGNATURE
    assert bridge.status(project)["package"].action == "unchanged"
    before = publish(to="local")
    there = Path(before.address) / "package"
    assert (there / SIGNATURE).read_bytes() == place.read_bytes()
    signing.check(there, there / SIGNATURE, Trusted(keys.public))
    assert publish(to="local").status == "already there"


def test_a_signature_of_the_package_before_is_not_published(project: Path, keys: Keys) -> None:
    signing.sign(project / "models/package", keys.private, project)
    (project / "in.txt").write_text("other\n")
    bridge.reproduce(project, "package", print, 60)
    with pytest.raises(UserError, match=r"model\.sig: is of another package .*sign again"):
        publish(to="local")
    (project / "models" / SIGNATURE).unlink()
    assert publish(to="local").status == "published"


def again(root: Path, folder: Path, **changes: Any) -> tuple[dict[str, str], list[str]]:
    """What differs, by file, and the lines that making it again printed."""
    lines: list[str] = []
    record = json.loads((folder / "lineage.json").read_text())["package"]["record"]
    return dict(rebuild.differences(root, folder, record | changes, lines.append)), lines


def test_it_is_made_again_from_its_commit_without_the_cache(project: Path) -> None:
    folder = project / "models/package"
    (project / "in.txt").write_text("not committed, and not looked at\n")
    found, lines = again(project, folder)
    assert found == {}
    assert {"Running stage 'first':", "Running stage 'package':"} <= set(lines)
    assert not list((project / ".dvc/tmp/candidates").glob("*"))


def test_what_differs_when_made_again_is_named(package: Path, tmp_path: Path) -> None:
    new = Path(shutil.copytree(package, tmp_path / "new"))
    for change in (
        lambda lineage: lineage["quantize"]["record"].update(seconds=99, started="tomorrow"),
        lambda lineage: lineage["export"]["outs"].update({"models/lineage/export.json": "md5:1"}),
    ):
        edit(new / "lineage.json", change)
    edit(new / "metrics/travel.json", lambda figures: figures["speed"].update(peak_rss_mb=1))
    (new / "README.md").write_text("faster")
    sum_again(new)
    assert list(rebuild.compare(new, package)) == []
    flip(new / "model.onnx.data")
    edit(new / "metrics/travel.json", lambda figures: figures["onnx_on"].update(perplexity=1))
    edit(new / "lineage.json", lambda found: found["export"]["outs"].update({"models/onnx": "x"}))
    (new / "more").touch()
    sum_again(new)
    assert {name for name, _ in rebuild.compare(new, package)} == {
        *("model.onnx.data", "metrics/travel.json", "lineage.json", "more")
    }


def test_what_cannot_be_made_again_says_why(project: Path, tmp_path: Path) -> None:
    folder = project / "models/package"
    for changes, said in (
        ({"git_commit": "--upload-pack=touch /tmp/x"}, "names no commit"),
        ({"git_commit": "0" * 40}, "has no commit 000000000000"),
        ({"git_dirty": True}, "commit them, and run again"),
    ):
        with pytest.raises(UserError, match=said):
            again(project, folder, **changes)
    (project / "package.py").write_text("import sys; sys.exit('package: no luck')")
    sh("git", "-c", "user.name=t", "-c", "user.email=t@t", "commit", "-qam", "bad", cwd=project)
    head = subprocess.check_output(["git", "rev-parse", "HEAD"], text=True).strip()
    with pytest.raises(UserError, match="could not be made again: package: no luck"):
        again(project, folder, git_commit=head)


def test_what_is_not_sound_is_not_made_again(package: Path, here: Path) -> None:
    flip(package / "config.json")
    found = [
        one for one in verify_package(package, root=here, again=True) if "rebuild" in one.check
    ]
    assert [one.verdict for one in found] == ["not checked"]


@pytest.mark.long
@pytest.mark.timeout(900)
def test_the_real_package_is_made_again_byte_for_byte(lab: Path, tmp_path: Path) -> None:
    done = typed("verify", "models/package", "--rebuild", "--json", cwd=lab)
    assert done.exit_code == 0, done.output
    verdicts = {one["check"]: one["verdict"] for one in json.loads(done.stdout)["findings"]}
    assert verdicts["rebuild"] == "ok"
