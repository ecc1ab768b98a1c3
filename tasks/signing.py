"""Signatures of a package, in the format and by the library of OpenSSF's model signing.

A signature is the act of a person who holds a key, not of a stage, and no two of one package are
equal: so it is no part of what a stage makes. That of models/package, which DVC watches, lies
beside it as models/model.sig; that of any other package is its file model.sig.

The library is imported only where it is used: that takes more than a second.
"""

from __future__ import annotations

import base64
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stages import sums
from stages.errors import UserError
from stages.redact import without_secrets
from stages.stage import PACKAGE, new_output
from stages.sums import SIGNATURE, SUMS

PASSWORD = "OLIVEPRESS_SIGNING_PASSWORD"  # environment variable: of the private key, if it has one


@dataclass(frozen=True)
class Trusted:
    """Whose signature is wanted: that of a key, or of an identity that Sigstore vouches for."""

    key: Path | None = None
    """A public key of the curve P-256, P-384 or P-521, in PEM."""
    identity: str = ""
    """As the certificate names it, such as a mail address."""
    issuer: str = ""
    """The address of the OpenID Connect provider that vouched for it."""
    trust_config: Path | None = None
    """A ClientTrustConfig in JSON, with the keys of a Sigstore other than sigstore.dev."""

    def __post_init__(self) -> None:
        if bool(self.identity) != bool(self.issuer):
            raise UserError("--identity and --issuer go together: who signed, and who says so")
        if self.key and self.identity:
            raise UserError("--key or --identity: a signature is made in one of the two ways")
        if self.trust_config and not self.identity:
            raise UserError("--trust-config goes with --identity and --issuer")

    def __bool__(self) -> bool:
        return bool(self.key or self.identity)


def of_package(folder: Path) -> Path | None:
    """The signature in a package, or beside it; None if there is none."""
    places = folder / SIGNATURE, folder.parent / SIGNATURE
    return next((place for place in places if os.path.lexists(place)), None)


def sign(
    folder: Path, key: Path | None, root: Path | None, trust_config: Path | None = None
) -> Path:
    """Sign a package whose sums are right, and return where the signature is.

    Args:
        key: a private key in PEM, with its password in PASSWORD; None to sign with Sigstore, by the
            identity of the machine where it has one, else through the browser.
        root: the project, if there is one.
        trust_config: of the Sigstore to sign with, as in `Trusted`; None for sigstore.dev.

    Raises:
        UserError: the package is not what was written; the key cannot be used; Sigstore refuses.
    """
    try:
        wanted = sums.verify(folder)
    except UserError as error:
        raise UserError(f"{folder}: {error}; nothing was signed") from None
    signing, hashing = _library()
    config = signing.Config().set_hashing_config(hashing)
    if key:
        password = os.environ.get(PASSWORD)
        with _explained(f"{key}: not a private key that can be used here"):
            config.use_elliptic_key_signer(
                private_key=key, password=password.encode() if password else None
            )
    else:
        with _explained(f"{trust_config or 'sigstore.dev'}: no Sigstore to sign with"):
            config.use_sigstore_signer(use_ambient_credentials=True, trust_config=trust_config)
    watched = root is not None and folder.resolve() == (root / PACKAGE).resolve()
    place = (folder.parent if watched else folder) / SIGNATURE
    with new_output(place) as out, _explained("not signed"):
        config.sign(folder, out)
        check_belongs(out, folder, wanted)
    return place


def check(folder: Path, signature: Path, trusted: Trusted) -> None:
    """Check that a signature is by whom it should be, and is of these files and no others.

    Raises:
        UserError: it is not; says why, with the files.
    """
    from model_signing import verifying

    sums.read_small(signature)  # the library would read a file of any size
    _, hashing = _library()
    config = verifying.Config().set_hashing_config(hashing)
    if trusted.key:
        with _explained(f"{trusted.key}: not a public key that can be used here"):
            config.use_elliptic_key_verifier(public_key=trusted.key)
    else:
        with _explained(f"{trusted.trust_config or 'sigstore.dev'}: no keys of a Sigstore"):
            config.use_sigstore_verifier(
                identity=trusted.identity,
                oidc_issuer=trusted.issuer,
                trust_config=trusted.trust_config,
            )
    with _explained("is no signature by whom it should be"):
        try:
            config.verify(folder, signature)
        except ValueError as error:
            if "Signature mismatch" not in str(error):  # which it says when all else is right
                raise
            files = [path for path in folder.rglob("*") if path.is_file()]
            here = {path.relative_to(folder).as_posix(): sums.sha256(path) for path in files}
            here.pop(SIGNATURE, None)
            signed = _signed(signature)
            names = sorted(n for n in signed.keys() | here if signed.get(n) != here.get(n))
            said = ", ".join(names[:20])
            raise UserError(f"is by whom it should be, and not of these files: {said}") from None


def check_belongs(signature: Path, folder: Path, wanted: dict[str, str]) -> None:
    """Check that a signature is of a package with these sums; not by whom it is.

    Raises:
        UserError: it is of another, such as the one that was here before.
    """
    if _signed(signature) != wanted | {SUMS: sums.sha256(folder / SUMS)}:
        raise UserError(
            f"{signature}: is of another package than {folder}; sign again with olivepress sign, "
            "or remove it"
        )


def _signed(signature: Path) -> dict[str, str]:
    """What a signature says that it is of: name -> SHA-256 in hex."""
    try:
        payload = json.loads(sums.read_small(signature))["dsseEnvelope"]["payload"]
        resources = json.loads(base64.b64decode(payload))["predicate"]["resources"]
        return {one["name"]: one["digest"] for one in resources}
    except UserError as error:
        raise UserError(f"{signature}: {error}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        raise UserError(f"{signature}: not a signature of a model") from None


def _library() -> tuple[Any, Any]:
    """Its module for signing, and how files are hashed: all but the signature, without links."""
    from model_signing import hashing, signing

    config = hashing.Config().set_ignored_paths(paths=[SIGNATURE], ignore_git_paths=False)
    return signing, config


@contextlib.contextmanager
def _explained(what: str) -> Iterator[None]:
    """Turn whatever the library makes of keys and bytes that nobody vouches for into one line.

    Its words name files, never a key or a password. What it prints goes to stderr.
    """
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    except UserError:
        raise
    except Exception as error:
        said = " ".join(without_secrets(str(error)).split())[:2000]
        raise UserError(f"{what}: {said or type(error).__name__}") from None
