"""Commands as processes: limits, and secrets in what they print."""

from __future__ import annotations

import os
import sys

import pytest

from stages.redact import without_secrets
from tasks.command import Job

SECRETS = {
    "https://a.blob.core.windows.net/c?sv=2024&sig=abc%2Fdef%3D&sp=r": "abc%2Fdef%3D",
    "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=Zm9vYmFy/Zm9v==;": "Zm9vYmFy/Zm9v==",
    "Authorization: Bearer eyJ0eXAi.eyJhdWQi.c2ln": "eyJ0eXAi.eyJhdWQi.c2ln",
    "client_secret=hush-hush&scope=x": "hush-hush",
    '{"access_token": "eyJhbGciOi", "expires_in": 3600}': "eyJhbGciOi",
    '{"secretsType":"Sas","sasToken":"sv=1&sig=xyz"}': "xyz",
    "ssh://me:letmein@host/path": "letmein",
    "token hf_abcdefghijklmnopqrst": "abcdefghijklmnopqrst",
}


@pytest.mark.parametrize(("text", "secret"), SECRETS.items())
def test_secrets_are_hidden_in_every_form_they_are_printed_in(text: str, secret: str) -> None:
    hidden = without_secrets(text)
    assert secret not in hidden
    assert "***" in hidden


def test_plain_text_stays_as_it_is() -> None:
    for text in ("loss=0.31 lr=1e-3", "models/base: 1,970 tokens", "https://host/a?b=c#d", "a: b"):
        assert without_secrets(text) == text


def test_what_a_command_prints_is_kept_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_CLIENT_SECRET", "a secret of mine")
    said: list[str] = []
    job = Job(said.append, 30, {})
    code = "import os, sys; print('a', os.environ['AZURE_CLIENT_SECRET']); sys.exit('sig: ?sig=q')"
    assert job.run([sys.executable, "-c", code], dict(os.environ)) == 1
    assert said == ["a ***", "sig: ?sig=***"]
    assert job.last_words("it") == "it: sig: ?sig=*** (exit code 1)"


def test_a_command_that_says_nothing_for_too_long_is_stopped() -> None:
    said: list[str] = []
    job = Job(said.append, 60, {}, quiet_seconds=0.5)
    code = "import time\nfor n in [0.3] * 3 + [60]:\n    print('alive', flush=True); time.sleep(n)"
    assert job.run([sys.executable, "-c", code], dict(os.environ)) == -9
    assert said == ["alive"] * 4
    assert job.last_words("it") == "it: stopped after 0.5 seconds in which nothing happened"


def test_a_command_with_grace_may_tidy_up() -> None:
    text = """
import signal, sys, time
def tidy(*_):
    print("tidied", flush=True)
    sys.exit(3)
signal.signal(signal.SIGTERM, tidy)
print("ready", flush=True)
time.sleep(60)
"""
    said: list[str] = []
    job = Job(said.append, 1, {}, grace_seconds=30)
    assert job.run([sys.executable, "-c", text], dict(os.environ)) == 3
    assert said == ["ready", "tidied"]
    assert job.last_words("first") == "first: stopped after its time limit of 0.0166667 minutes"
