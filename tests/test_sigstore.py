"""Packages signed by an identity, through a Sigstore on loopback that checks what it is sent."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import local_sigstore
import pytest
from local_sigstore import MINUTES, LocalSigstore

from conftest import sh, typed
from stages.sums import SIGNATURE

# A browser whose user is logged in: it goes where it is sent.
BROWSER = "import sys, urllib.request; urllib.request.urlopen(sys.argv[1]).read()"
JOB = "https://github.com/press/models/.github/workflows/release.yml@refs/heads/main"
pytestmark = pytest.mark.timeout(120, func_only=True)  # the lab, which a fixture makes, takes more


@pytest.fixture
def sigstore() -> Iterator[LocalSigstore]:
    with local_sigstore.running() as there:
        yield there


@pytest.fixture
def package(lab: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(lab / "models/package", tmp_path / "package"))


def config(there: LocalSigstore, folder: Path) -> str:
    path = folder / "trust.json"
    path.write_text(there.trust_config())
    return str(path)


def asked(there: LocalSigstore, package: Path) -> list[str]:
    who = ["--identity", there.subject, "--issuer", there.url]
    trusted = ["--trust-config", config(there, package.parent)]
    return ["verify", str(package), "--no-project", "--signed", *who, *trusted]


def test_a_machine_signs_with_its_own_identity(sigstore: LocalSigstore, package: Path) -> None:
    sigstore.subject = JOB
    trust = config(sigstore, package.parent)
    for _ in range(3):  # and the log has entries with others beside them
        command = ("sign", "package", "--sigstore", "--trust-config", os.path.basename(trust))
        done = typed(*command, cwd=package.parent, **sigstore.machine())
        assert done.exit_code == 0, done.output
        done = typed(*asked(sigstore, package), cwd=package.parent)
        assert done.exit_code == 0 and JOB in done.output, done.output
    assert sigstore.asked.count("POST /api/v1/log/entries") == 3
    assert sigstore.secret not in (package / SIGNATURE).read_text()


def test_a_person_signs_through_the_browser(
    sigstore: LocalSigstore, package: Path, tmp_path: Path
) -> None:
    script = tmp_path / "browser.py"
    script.write_text(BROWSER)
    trust = config(sigstore, tmp_path)
    command = ("olivepress", "sign", str(package), "--sigstore", "--trust-config", trust)
    done = sh(*command, cwd=tmp_path, BROWSER=f"{sys.executable} {script} %s &")
    assert f"signed: {package / SIGNATURE}" in done.stdout
    assert "GET /auth" in sigstore.asked and "GET /machine" not in sigstore.asked
    done = typed(*asked(sigstore, package), cwd=tmp_path)
    assert done.exit_code == 0 and "press@example.org" in done.output, done.output


def test_who_signed_and_what_must_both_be_right(sigstore: LocalSigstore, package: Path) -> None:
    trust = config(sigstore, package.parent)
    command = ("sign", str(package), "--sigstore", "--trust-config", trust)
    assert typed(*command, cwd=package.parent, **sigstore.machine()).exit_code == 0
    right = asked(sigstore, package)
    for said, other in ((sigstore.subject, "evil@example.org"), (sigstore.url, "https://evil")):
        done = typed(*(other if one == said else one for one in right), cwd=package.parent)
        assert done.exit_code == 1 and "is no signature by whom it should be" in done.output
    with local_sigstore.running(subject=sigstore.subject) as stranger:
        done = typed(*asked(stranger, package), cwd=package.parent)
        assert done.exit_code == 1 and "is no signature by whom it should be" in done.output
    config(sigstore, package.parent)
    tokens = package / "tokenizer.json"
    tokens.write_bytes(tokens.read_bytes().replace(b"a", b"b", 1))
    done = typed(*right, cwd=package.parent)
    assert done.exit_code == 1
    assert "is by whom it should be, and not of these files: tokenizer.json" in done.output


def test_what_was_logged_when_the_certificate_was_over_counts_for_nothing(
    sigstore: LocalSigstore, package: Path
) -> None:
    """Who stole the key of a signature, which lives for minutes, cannot sign with it later."""
    sigstore.late = 60.0 * MINUTES + 60
    trust = config(sigstore, package.parent)
    command = ("sign", str(package), "--sigstore", "--trust-config", trust)
    done = typed(*command, cwd=package.parent, **sigstore.machine())
    assert done.exit_code == 0, done.output  # who signs does not see it
    done = typed(*asked(sigstore, package), cwd=package.parent)
    assert done.exit_code == 1 and "is no signature by whom it should be" in done.output


def no_certificate(there: LocalSigstore, trust: Path) -> str:
    there.refuses = {"signingCert"}
    return "not signed: "


def no_log(there: LocalSigstore, trust: Path) -> str:
    there.refuses = {"log/entries"}
    return "not signed: "


def no_token(there: LocalSigstore, trust: Path) -> str:
    there.secret = "another"
    return "not signed: GitHub: OIDC token request failed (code=401"


def no_config(there: LocalSigstore, trust: Path) -> str:
    trust.unlink()
    return "trust.json: no Sigstore to sign with: "


def a_config_of_something_else(there: LocalSigstore, trust: Path) -> str:
    trust.write_text('{"mediaType": "text/plain"}')
    return "trust.json: no Sigstore to sign with: "


@pytest.mark.parametrize(
    "fault", [no_certificate, no_log, no_token, no_config, a_config_of_something_else]
)
def test_what_fails_signs_nothing(
    sigstore: LocalSigstore, package: Path, fault: Callable[[LocalSigstore, Path], str]
) -> None:
    trust = config(sigstore, package.parent)
    machine = sigstore.machine()
    said = fault(sigstore, Path(trust))
    command = ("sign", str(package), "--sigstore", "--trust-config", trust)
    done = typed(*command, cwd=package.parent, **machine)
    assert done.exit_code == 1 and said in done.output, done.output
    assert len(done.output.strip().splitlines()) == 1 and machine[TOKEN] not in done.output
    assert not list(package.parent.rglob("*.sig")) and not list(package.parent.rglob("*tmp-*"))


TOKEN = "ACTIONS_ID_TOKEN_REQUEST_TOKEN"


def test_keys_of_a_sigstore_are_for_identities(package: Path) -> None:
    sign = ("sign", str(package), "--key", "key.pem", "--trust-config", "trust.json")
    done = typed(*sign, cwd=package.parent)
    assert done.exit_code == 1 and "--trust-config goes with --sigstore" in done.output
    verify = ("verify", str(package), "--trust-config", "trust.json")
    done = typed(*verify, cwd=package.parent)
    assert done.exit_code == 1 and "goes with --identity and --issuer" in done.output
