"""Take secrets out of text that is shown, logged or kept."""

from __future__ import annotations

import os
import re

HIDDEN = "***"
# Where a secret stands in what Azure, the hub and DVC print: shared access signatures, account
# keys, bearer tokens, client secrets and access tokens in bodies, passwords in addresses.
PATTERNS = [
    re.compile(r"(?i)([?&;](?:sig|se|skoid|sktid)=)[^&\s\"']+"),
    re.compile(r"(?i)((?:AccountKey|SharedAccessKey|SharedAccessSignature)=)[^;\s\"']+"),
    re.compile(r"(?i)(\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}"),
    re.compile(
        r"(?i)(\"?(?:client_secret|access_token|refresh_token|sasToken|sas_token)\"?\s*[=:]\s*\"?)[^&\s\"',}]+"
    ),
    re.compile(r"(://[^/\s:@]+:)[^/\s@]+(?=@)"),
    re.compile(r"(\bhf_)[A-Za-z0-9]{16,}"),
]
# Environment variables whose value is a secret; one of fewer letters than this is no secret.
NAMES = re.compile(r"(?i)(SECRET|TOKEN|PASSWORD|CONNECTION_STRING|ACCOUNT_KEY|ACCESS_KEY|SAS)")
LEAST = 8


def without_secrets(text: str) -> str:
    """The text with every known form of a secret, and every secret of the environment, hidden."""
    for name, value in os.environ.items():
        if NAMES.search(name) and len(value) >= LEAST and value in text:
            text = text.replace(value, HIDDEN)
    for pattern in PATTERNS:
        text = pattern.sub(rf"\1{HIDDEN}", text)
    return text
