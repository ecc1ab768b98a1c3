"""Take secrets out of text that is shown, logged or kept."""

from __future__ import annotations

import json
import os
import re
from functools import cache
from urllib.parse import quote, quote_plus

HIDDEN = "***"
# Where a secret stands in what Azure, the hub, Git and DVC print: signed addresses, account keys,
# headers, bodies, and passwords in addresses.
_NAMED = r"[\w-]*(?:password|passwd|passphrase|secret|api_?key|account_?key|private_?token)"
PATTERNS = [
    re.compile(
        r"(?i)([?&;](?:sig|se|skoid|sktid|[\w-]*(?:signature|token|credential))=)[^&\s\"']+"
    ),
    re.compile(r"(?i)((?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^;\s\"']+"),
    re.compile(r"(?i)(\bauthorization\W+basic\s+)[A-Za-z0-9+/=]{4,}"),
    re.compile(r"(?i)(\bauthorization[\"']?\s*[:=]\s*[\"']?token\s+)[^\s\"',]+"),
    re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(
        r"(?i)(\b(?:x-api-key|api-key|x-auth-token|private-token)[\"']?\s*[:=]\s*[\"']?)[^\s\"',]+"
    ),
    re.compile(
        r"(?i)(\"?(?:client_secret|access_token|refresh_token|sasToken|sas_token)\"?\s*[=:]\s*\"?)[^&\s\"',}]+"
    ),
    re.compile(rf"(?i)((?<![\w-])(?!ask_){_NAMED}=)[^&\s\"',;)]+"),
    re.compile(rf"(?i)(\"{_NAMED}\"\s*:\s*\")(?:\\.|[^\"\\])+"),  # JSON
    re.compile(rf"(?i)('{_NAMED}'\s*:\s*')(?:\\.|[^'\\])+"),  # and as Python writes it
    re.compile(r"(://)[^/\s:@]+(?=:(?:x-oauth-basic)?@)"),  # a token for a name, as Git's hosts
    re.compile(r"((?:https?|webdavs?)://)[^/\s:@]+(?=@)"),  # take it
    re.compile(r"(\bs(?:sh|ftp)://)(?=[^/\s:@]*\d)[\w-]{20,}(?=@)"),  # and no name of a user
    # Up to the last @ of the host's part; a password with a slash in it up to the first.
    re.compile(r"(://[^/\s:@\[]*:)(?:[^/\s\"']+|(?!\d{1,5}/)[^\s\"'@]+)(?=@)"),
    re.compile(r"(\b(?:hf_|gh[opsur]_|github_pat_|glpat-))[\w-]{16,}"),
]
# Environment variables whose value is a secret; one of fewer letters than this is no secret.
NAMES = re.compile(
    r"(?i)(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|CONNECTION_|AUTH_STRING|API_KEY|ACCOUNT_KEY"
    r"|ACCESS_KEY|PRIVATE_KEY|STORAGE_KEY|PASSPHRASE|SAS|_(PASS|PWD|PAT)$)"
)
LEAST = 8


def without_secrets(text: str) -> str:
    """The text with every known form of a secret, and every secret of the environment, hidden."""
    for secret in _secrets():
        text = text.replace(secret, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text


@cache
def _holds_secret(name: str) -> bool:
    return bool(NAMES.search(name))


def _secrets() -> list[str]:
    """The secrets of the environment in every form; the longest first, since one may be a part of
    another."""
    values = {value for name, value in os.environ.items() if _holds_secret(name)}
    return sorted({form for value in values for form in _forms(value)}, key=len, reverse=True)


@cache
def _forms(value: str) -> set[str]:
    """A secret and each of its lines, as text is shown by lines: plain, and as Python, JSON and
    addresses write it."""
    found = set()
    for line in (value, *value.splitlines()):
        if len(line) >= LEAST:
            codes = [quote(line, safe, errors="surrogateescape") for safe in ("", "/")]
            found |= {line, repr(line)[1:-1], ascii(line)[1:-1], *codes}
            found |= {json.dumps(line, ensure_ascii=plain)[1:-1] for plain in (True, False)}
            found |= {
                line.encode("unicode_escape").decode(),
                quote_plus(line, errors="surrogateescape"),
            }
            found |= {re.sub("%..", lambda code: code[0].lower(), text) for text in codes}
    return found
