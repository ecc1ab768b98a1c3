"""Take secrets out of text that is shown, logged or kept."""

from __future__ import annotations

import os
import re
from functools import cache

HIDDEN = "***"
# Where a secret stands in what Azure, the hub and DVC print: shared access signatures, account
# keys, bearer tokens, client secrets and access tokens in bodies, passwords in addresses.
PATTERNS = [
    re.compile(r"(?i)([?&;](?:sig|se|skoid|sktid)=)[^&\s\"']+"),
    re.compile(r"(?i)((?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^;\s\"']+"),
    re.compile(r"(?i)(\bauthorization\W+basic\s+)[A-Za-z0-9+/=]{4,}"),
    re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(
        r"(?i)(\"?(?:client_secret|access_token|refresh_token|sasToken|sas_token)\"?\s*[=:]\s*\"?)[^&\s\"',}]+"
    ),
    re.compile(r"(://[^/\s:@]*:)[^/\s@]+(?=@)"),
    re.compile(r"(https?://)[^/\s:@]+(?=@)"),  # a token for a name, as Git's hosts take it
    re.compile(r"(\bhf_)[A-Za-z0-9]{16,}"),
]
# Environment variables whose value is a secret; one of fewer letters than this is no secret.
NAMES = re.compile(
    r"(?i)(SECRET|TOKEN|PASSWORD|PASSWD|CREDENTIAL|CONNECTION_|AUTH_STRING|API_KEY|ACCOUNT_KEY"
    r"|ACCESS_KEY|PRIVATE_KEY|SAS)"
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
    """Every line of the secrets of the environment, as text is shown by lines; the longest first,
    since one may be a part of another."""
    values = [value for name, value in os.environ.items() if _holds_secret(name)]
    lines = {line for value in values for line in [value, *value.splitlines()]}
    return sorted((line for line in lines if len(line) >= LEAST), key=len, reverse=True)
