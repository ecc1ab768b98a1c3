"""A Sigstore on loopback: an identity provider, Fulcio, a certificate log and Rekor.

It answers as these do to sigstore-python 4.5, and checks what it is sent as they do: a code of the
browser's way, the token's signature, the proof that the key is held, the envelope's signature.

- Provider: OpenID Connect's discovery and code flow with PKCE, and the tokens of GitHub Actions.
- Fulcio: `POST /api/v2/signingCert`, https://github.com/sigstore/fulcio/blob/main/docs/ctfe.md,
  with the certificate of docs/certificate-specification.md and an embedded SCT (RFC 6962, 3.2).
- Rekor v1: `POST /api/v1/log/entries` for `dsse` 0.0.1, with a signed entry timestamp, and an
  inclusion proof (RFC 6962, 2.1) under a checkpoint (https://c2sp.org/tlog-checkpoint).
"""

from __future__ import annotations

import base64
import hashlib
import json
import secrets
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import jwt
import rfc8785
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID, ObjectIdentifier

ISSUER_RAW = ObjectIdentifier("1.3.6.1.4.1.57264.1.1")  # deprecated, and what clients read
ISSUER = ObjectIdentifier("1.3.6.1.4.1.57264.1.8")
SCT_LIST = ObjectIdentifier("1.3.6.1.4.1.11129.2.4.2")
ECDSA = ec.ECDSA(SHA256())
AUDIENCE = "sigstore"
MINUTES = 10  # for which a certificate is good


def _b64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _der(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.public_key().public_bytes(Encoding.DER, PublicFormat.SubjectPublicKeyInfo)


def _sha256(data: bytes) -> bytes:
    return hashlib.sha256(data).digest()


def _key() -> ec.EllipticCurvePrivateKey:
    return ec.generate_private_key(ec.SECP256R1())


@dataclass
class LocalSigstore:
    """Its keys, what it logged, and who it takes the caller for.

    Args:
        url: where it answers; also the issuer of its tokens.
        subject: whom its identity provider knows in the browser and in the machine.
        secret: what a machine of GitHub Actions shows for a token.
        late: seconds by which Rekor logs late.
        refuses: parts of paths that are answered with 500.
    """

    url: str = ""
    subject: str = "press@example.org"
    secret: str = field(default_factory=secrets.token_hex)
    late: float = 0
    refuses: set[str] = field(default_factory=set)
    asked: list[str] = field(default_factory=list)
    leaves: list[bytes] = field(default_factory=list)
    codes: dict[str, dict[str, str]] = field(default_factory=dict)
    provider: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    authority: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    certificates: ec.EllipticCurvePrivateKey = field(default_factory=_key)
    rekor: ec.EllipticCurvePrivateKey = field(default_factory=_key)

    def __post_init__(self) -> None:
        now = datetime.now(UTC)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "local sigstore")])
        public = self.authority.public_key()
        self.root = (
            x509.CertificateBuilder(name, name, public, x509.random_serial_number())
            .not_valid_before(now - timedelta(hours=1))
            .not_valid_after(now + timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(key_cert_sign=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .sign(self.authority, SHA256())
        )

    def machine(self) -> dict[str, str]:
        """The environment of a job of GitHub Actions that may have a token."""
        return {
            "GITHUB_ACTIONS": "true",
            "ACTIONS_ID_TOKEN_REQUEST_TOKEN": self.secret,
            "ACTIONS_ID_TOKEN_REQUEST_URL": f"{self.url}/machine?job=1",
        }

    def trust_config(self) -> str:
        """What a client has to know of it (protobuf-specs, ClientTrustConfig)."""
        since = {"start": "2020-01-01T00:00:00Z"}

        def log(key: ec.EllipticCurvePrivateKey) -> dict[str, Any]:
            public = {"rawBytes": _b64(_der(key)), "keyDetails": "PKIX_ECDSA_P256_SHA_256"}
            return {
                "baseUrl": self.url,
                "hashAlgorithm": "SHA2_256",
                "publicKey": public | {"validFor": since},
                "logId": {"keyId": _b64(_sha256(_der(key)))},
            }

        service = {"url": self.url, "majorApiVersion": 1, "validFor": since, "operator": "local"}
        chain = {"certificates": [{"rawBytes": _b64(self.root.public_bytes(Encoding.DER))}]}
        subject = {"organization": "local", "commonName": "local sigstore"}
        authority = {"subject": subject, "uri": self.url, "certChain": chain, "validFor": since}
        media = "application/vnd.dev.sigstore."
        return json.dumps(
            {
                "mediaType": f"{media}clienttrustconfig.v0.1+json",
                "trustedRoot": {
                    "mediaType": f"{media}trustedroot+json;version=0.1",
                    "tlogs": [log(self.rekor)],
                    "ctlogs": [log(self.certificates)],
                    "certificateAuthorities": [authority],
                    "timestampAuthorities": [],
                },
                "signingConfig": {
                    "mediaType": f"{media}signingconfig.v0.2+json",
                    **{"caUrls": [service], "oidcUrls": [service], "rekorTlogUrls": [service]},
                    **{"tsaUrls": [], "rekorTlogConfig": {"selector": "ANY"}},
                    "tsaConfig": {"selector": "ANY"},
                },
            }
        )

    # The identity provider.

    def token(self) -> str:
        now = int(time.time())
        claims = {"iss": self.url, "aud": AUDIENCE, "sub": self.subject, "iat": now}
        return jwt.encode(claims | {"exp": now + 600}, self.provider, algorithm="ES256")

    def allow(self, query: dict[str, str]) -> str:
        """Where the browser goes once its user is logged in."""
        assert query["response_type"] == "code" and "openid" in query["scope"].split()
        self.codes[code := secrets.token_hex()] = query
        return f"{query['redirect_uri']}?{urlencode({'code': code, 'state': query['state']})}"

    def exchange(self, form: dict[str, str]) -> dict[str, str]:
        asked = self.codes.pop(form["code"])
        digest = base64.urlsafe_b64encode(_sha256(form["code_verifier"].encode()))
        assert digest.decode().rstrip("=") == asked["code_challenge"]
        assert form["redirect_uri"] == asked["redirect_uri"]
        token = self.token()  # sigstore.dev's provider, Dex, makes both of one form
        return {"access_token": token, "token_type": "Bearer", "id_token": token}

    # Fulcio.

    def certify(self, token: str, request: bytes) -> list[str]:
        """A certificate for whom the token names, and its chain, in PEM."""
        public = self.provider.public_key()
        claims = jwt.decode(token, public, ["ES256"], audience=AUDIENCE, issuer=self.url)
        asked = x509.load_pem_x509_csr(request)
        assert asked.is_signature_valid  # who asks holds the key
        who = claims["sub"]
        name = x509.RFC822Name(who) if "@" in who else x509.UniformResourceIdentifier(who)
        issuer = claims["iss"].encode()
        authority = self.authority.public_key()
        now = datetime.now(UTC).replace(microsecond=0)
        before = (
            x509.CertificateBuilder(self.root.subject, x509.Name([]), asked.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now)
            .not_valid_after(now + timedelta(minutes=MINUTES))
            .add_extension(_usage(digital_signature=True), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.CODE_SIGNING]), False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(asked.public_key()), False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority), False)
            .add_extension(x509.SubjectAlternativeName([name]), critical=True)
            .add_extension(x509.UnrecognizedExtension(ISSUER_RAW, issuer), critical=False)
            .add_extension(
                x509.UnrecognizedExtension(ISSUER, b"\x0c" + bytes([len(issuer)]) + issuer), False
            )
        )
        sct = self._sct(before.sign(self.authority, SHA256()).tbs_certificate_bytes, now)
        listed = struct.pack(">HH", len(sct) + 2, len(sct)) + sct
        final = before.add_extension(
            x509.UnrecognizedExtension(SCT_LIST, b"\x04" + bytes([len(listed)]) + listed), False
        ).sign(self.authority, SHA256())
        return [one.public_bytes(Encoding.PEM).decode() for one in (final, self.root)]

    def _sct(self, tbs: bytes, now: datetime) -> bytes:
        """The log's promise to take up a certificate (RFC 6962, 3.2 and 3.3)."""
        stamp = struct.pack(">Q", int(now.timestamp() * 1000))
        entry = _sha256(_der(self.authority)) + struct.pack(">I", len(tbs))[1:] + tbs
        signature = self.certificates.sign(b"\0\0" + stamp + b"\0\1" + entry + b"\0\0", ECDSA)
        head = b"\0" + _sha256(_der(self.certificates)) + stamp + b"\0\0"
        return head + b"\4\3" + struct.pack(">H", len(signature)) + signature

    # Rekor.

    def log(self, proposed: dict[str, Any]) -> dict[str, Any]:
        assert (proposed["kind"], proposed["apiVersion"]) == ("dsse", "0.0.1")
        content = proposed["spec"]["proposedContent"]
        envelope = json.loads(content["envelope"])
        (verifier,), (signature,) = content["verifiers"], envelope["signatures"]
        payload = base64.b64decode(envelope["payload"])
        kind = envelope["payloadType"].encode()
        signed = b"DSSEv1 %d %b %d %b" % (len(kind), kind, len(payload), payload)
        public = x509.load_pem_x509_certificate(base64.b64decode(verifier)).public_key()
        assert isinstance(public, ec.EllipticCurvePublicKey)
        public.verify(base64.b64decode(signature["sig"]), signed, ECDSA)
        body = rfc8785.dumps(
            {
                **{"apiVersion": "0.0.1", "kind": "dsse"},
                "spec": {
                    "envelopeHash": _hash(content["envelope"].encode()),
                    "payloadHash": _hash(payload),
                    "signatures": [{"signature": signature["sig"], "verifier": verifier}],
                },
            }
        )
        self.leaves.append(_sha256(b"\0" + body))
        index = len(self.leaves) - 1
        when, name = int(time.time() + self.late), _sha256(_der(self.rekor))
        entry: dict[str, Any] = {
            **{"body": _b64(body), "integratedTime": when, "logID": name.hex(), "logIndex": index}
        }
        promise = self.rekor.sign(rfc8785.dumps(entry), ECDSA)
        root = _root(self.leaves)
        note = f"local - 1\n{len(self.leaves)}\n{_b64(root)}\n"
        signature_line = _b64(name[:4] + self.rekor.sign(note.encode(), ECDSA))
        proof = {
            **{"logIndex": index, "treeSize": len(self.leaves), "rootHash": root.hex()},
            "hashes": [one.hex() for one in _path(index, self.leaves)],
            "checkpoint": f"{note}\n\u2014 local {signature_line}\n",
        }
        shown = {"inclusionProof": proof, "signedEntryTimestamp": _b64(promise)}
        return {secrets.token_hex(32): entry | {"verification": shown}}


def _usage(**those: bool) -> x509.KeyUsage:
    names = (
        "digital_signature content_commitment key_encipherment data_encipherment key_agreement "
        "key_cert_sign crl_sign encipher_only decipher_only"
    )
    return x509.KeyUsage(**{name: those.get(name, False) for name in names.split()})


def _hash(data: bytes) -> dict[str, str]:
    return {"algorithm": "sha256", "value": hashlib.sha256(data).hexdigest()}


def _split(leaves: list[bytes]) -> int:
    """The largest power of two that is smaller than their number."""
    return 1 << (len(leaves) - 1).bit_length() - 1


def _root(leaves: list[bytes]) -> bytes:
    """RFC 6962, 2.1: the Merkle tree hash."""
    if len(leaves) == 1:
        return leaves[0]
    at = _split(leaves)
    return _sha256(b"\1" + _root(leaves[:at]) + _root(leaves[at:]))


def _path(index: int, leaves: list[bytes]) -> list[bytes]:
    """RFC 6962, 2.1.1: the audit path of a leaf."""
    if len(leaves) == 1:
        return []
    at = _split(leaves)
    if index < at:
        return [*_path(index, leaves[:at]), _root(leaves[at:])]
    return [*_path(index - at, leaves[at:]), _root(leaves[:at])]


class _Answers(BaseHTTPRequestHandler):
    sigstore: LocalSigstore

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        there = self.sigstore
        path, query = self._asked()
        if path == "/.well-known/openid-configuration":
            places = {"authorization_endpoint": "auth", "token_endpoint": "token"}
            self._say(200, {name: f"{there.url}/{it}" for name, it in places.items()})
        elif path == "/auth":
            self._say(302, {}, there.allow(query))
        elif path == "/machine" and query["audience"] == AUDIENCE:
            known = self.headers["Authorization"] == f"bearer {there.secret}"
            self._say(200 if known else 401, {"value": there.token()} if known else {})
        else:
            self._say(404, {})

    def do_POST(self) -> None:
        there = self.sigstore
        path, _ = self._asked()
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if any(part in path for part in there.refuses):
            self._say(500, {"message": "not today"})
        elif path == "/token":
            form = {name: it[0] for name, it in parse_qs(body.decode()).items()}
            self._say(200, there.exchange(form))
        elif path == "/api/v2/signingCert":
            token = self.headers["Authorization"].removeprefix("Bearer ")
            request = base64.b64decode(json.loads(body)["certificateSigningRequest"])
            chain = {"chain": {"certificates": there.certify(token, request)}}
            self._say(200, {"signedCertificateEmbeddedSct": chain})
        elif path == "/api/v1/log/entries":
            self._say(201, there.log(json.loads(body)))
        else:
            self._say(404, {})

    def _asked(self) -> tuple[str, dict[str, str]]:
        asked = urlsplit(self.path)
        self.sigstore.asked.append(f"{self.command} {asked.path}")
        return asked.path, {name: it[0] for name, it in parse_qs(asked.query).items()}

    def _say(self, status: int, what: dict[str, Any], location: str | None = None) -> None:
        body = json.dumps(what).encode()
        self.send_response(status)
        if location:
            self.send_header("Location", location)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@contextmanager
def running(**made: Any) -> Iterator[LocalSigstore]:
    """A Sigstore with keys of its own, which nobody else knows."""
    there = LocalSigstore(**made)
    handler = type("Answers", (_Answers,), {"sigstore": there})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        there.url = f"http://127.0.0.1:{server.server_port}"
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield there
        finally:
            server.shutdown()
