"""Commands as processes: limits, and secrets in what they print."""

from __future__ import annotations

import json
import os
import re
import sys
from urllib.parse import quote, quote_plus

import pytest

from stages.errors import UserError
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
    "https://t0ken:x-oauth-basic@github.com/a/b": "t0ken",
    "fatal: https://t0ken:@host/a: no": "t0ken",
    "ssh://ghs_0123456789abcdefghij@host/a": "0123456789abcdefghij",
    "ssh://0123456789abcdefghij@host/a": "0123456789abcdefghij",
    "webdavs://t0ken@host/a": "t0ken",
    "https://user:pa/s3cret@host/path": "s3cret",
    "https://user:p@s3cret@host/path": "s3cret",
    "GET https://host/a?x=1&token=s3cret&y=2": "s3cret",
    "https://host/api?private_token=s3cret": "s3cret",
    "https://b.s3.amazonaws.com/k?X-Amz-Signature=00ff&X-Amz-Date=2024": "00ff",
    "https://b.s3.amazonaws.com/k?X-Amz-Security-Token=FwoG": "FwoG",
    "https://cdn.hub/k?Expires=1&Signature=s3cret~x": "s3cret~x",
    "Authorization: token s3cret": "s3cret",
    "{'Authorization': 'token s3cret'}": "s3cret",
    "> x-api-key: s3cret": "s3cret",
    "'PRIVATE-TOKEN': 's3cret'": "s3cret",
    '{"user": "me", "password": "two s3cret \\" words"}': "words",
    "{'db_password': 's3cret'}": "s3cret",
    "login?user=me&password=s3cret": "s3cret",
}


@pytest.mark.parametrize(("text", "secret"), SECRETS.items())
def test_secrets_are_hidden_in_every_form_they_are_printed_in(text: str, secret: str) -> None:
    hidden = without_secrets(text)
    assert secret not in hidden
    assert "***" in hidden


PLAIN = [
    *("loss=0.31 lr=1e-3", "models/base: 1,970 tokens", "https://host/a?b=c#d", "a: b"),
    *("ssh://git@host/a", "ssh://account.container.user1@account.blob.core.windows.net/a"),
    *("http://localhost:8000/models/x@main", "http://[::1]:8000/a@b", "git@github.com:a/b.git"),
    "abfss://azureml-blobstore-0123456789@account.dfs.core.windows.net/a",
    *("ask_password = true", "password: read from OLIVEPRESS_SIGNING_PASSWORD", "?max_tokens=5"),
    *('{"pad_token": "<|end|>", "token": "Hello"}', "the authorization token is not there"),
]


@pytest.mark.parametrize("text", PLAIN)
def test_plain_text_stays_as_it_is(text: str) -> None:
    assert without_secrets(text) == text


@pytest.mark.parametrize("name", ["AZURE_STORAGE_KEY", "DB_PASS", "DB_PWD", "AZURE_DEVOPS_EXT_PAT"])
def test_variables_that_hold_secrets(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "s3cret-value")
    assert without_secrets("it is s3cret-value") == "it is ***"


@pytest.mark.parametrize("name", ["PWD", "OLDPWD", "PATH", "OLIVEPRESS_SIGNING_KEY"])
def test_variables_that_hold_none(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, "/somebody/somewhere")
    assert without_secrets("in /somebody/somewhere") == "in /somebody/somewhere"


@pytest.mark.parametrize(
    "secret", ["a\\s3cret'\"", "\u00e4/s3cret+ x", "euro \u20ac\ts3cret", "\udcff-s3cret"]
)
def test_a_secret_is_hidden_however_it_is_written(
    monkeypatch: pytest.MonkeyPatch, secret: str
) -> None:
    monkeypatch.setenv("MY_PASSWORD", secret)
    code = quote(secret, safe="", errors="surrogateescape")
    shown = [secret, repr([secret]), ascii(secret), json.dumps(secret), f"https://x?y={code}"]
    shown += [json.dumps(secret, ensure_ascii=False), quote_plus(secret, errors="surrogateescape")]
    shown += [re.sub("%..", lambda found: found[0].lower(), code)]
    assert not [text for text in shown if "s3cret" in without_secrets(text)]
    assert "s3cret" not in str(UserError(secret))


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
