"""The Prefect task that serves the package and asks it what `evaluate` asked."""

from __future__ import annotations

import json
import os
import signal
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx
from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State
from prefect.states import Completed, Failed

from stages.errors import UserError
from stages.reading import json_object
from stages.stage import PACKAGE
from tasks.command import Job

QUESTIONS = 2  # of each adapter
ANSWER_SECONDS = 120


@dataclass(frozen=True)
class Answer:
    """What a model of the server said, beside what was measured of the same model."""

    model: str
    prompt: str
    text: str
    measured: str
    """The answer of `evaluate`, likeliest token by likeliest token, as here."""

    @property
    def same(self) -> bool:
        return self.text == self.measured


@task(task_run_name="smoke test", cache_policy=NO_CACHE, persist_result=False)
def smoke_test(root: Path, limit_seconds: float) -> State:
    """Start `olivepress serve` on the package, ask each model, and stop it.

    Returns:
        Completed with the answers as dictionaries; named Skipped where this machine cannot run the
        model; Failed with one line if the server does not start or answer, or if no answer of a
        model is as measured. Not all need be: another processor may round another way.
    """
    from stages.generation import provider  # it loads onnxruntime

    package = root / PACKAGE
    try:
        if (name := provider(package)) != "cpu":
            message = f"not tried: the package is for {name}"
            return Completed(name="Skipped", message=message, data=[])
        wanted = questions(package)
        answers = _served(package, wanted, limit_seconds)
    except UserError as error:
        return Failed(message=f"smoke test: {error}")
    right = {answer.model for answer in answers if answer.same}
    if wrong := [answer for answer in answers if answer.model not in right]:
        one = wrong[0]
        return Failed(
            message=f"smoke test: {one.model}: {one.prompt!r} is answered {one.text!r}, "
            f"and was {one.measured!r} when it was measured"
        )
    as_measured = sum(answer.same for answer in answers)
    message = f"{len(answers)} answers, {as_measured} of them word for word as measured"
    return Completed(message=message, data=[asdict(answer) for answer in answers])


def questions(package: Path) -> list[dict[str, Any]]:
    """What to ask of a package: for each, the request's body and the measured answer."""
    lineage = json_object(package / "lineage.json")
    found = []
    for path in sorted(package.glob("metrics/*.json")):
        adapter = path.stem
        used = lineage.get(f"evaluate@{adapter}", {}).get("params", {})
        tokens = used.get("evaluate.max_new_tokens")
        for each in json_object(path).get("answers", [])[:QUESTIONS]:
            for model, measured in (("base", each["onnx_off"]), (adapter, each["onnx_on"])):
                found.append(
                    {"model": model, "prompt": each["prompt"], "measured": measured, "most": tokens}
                )
    if not found:
        raise UserError(f"{package}: no measured answers in metrics/, so nothing to ask")
    return found


def _served(package: Path, wanted: list[dict[str, Any]], limit_seconds: float) -> list[Answer]:
    """The answers of a server that is started for them."""
    logger = get_run_logger()
    answers: list[Answer] = []
    started = ""

    def on_line(line: str) -> None:
        nonlocal started
        if answers:
            logger.info(line)
            return
        started += line + "\n"
        if line == "}":
            url = json.loads(started[started.index("{") :])["url"]
            answers.extend(_ask(url, each) for each in wanted)
            os.kill(job.process.pid, signal.SIGTERM)  # type: ignore[union-attr]

    job = Job(on_line, limit_seconds, {})
    open_to_us = {name: value for name, value in os.environ.items() if "API_KEY" not in name}
    with job.at_work():
        command = ["olivepress", "serve", str(package), "--port", "0", "--json"]
        job.run(command, open_to_us, cwd=package)
    if words := job.last_words("serve"):
        raise UserError(words)
    return answers


def _ask(url: str, wanted: dict[str, Any]) -> Answer:
    body = {
        "model": wanted["model"],
        "messages": [{"role": "user", "content": wanted["prompt"]}],
        "temperature": 0,
        "max_tokens": wanted["most"],
    }
    try:
        sent = httpx.post(
            f"{url}/v1/chat/completions", json=body, timeout=ANSWER_SECONDS, trust_env=False
        )
        said = sent.json()
        if "error" in said:
            raise UserError(f"{wanted['model']}: {said['error']['message']}")
        text = said["choices"][0]["message"]["content"]
    except (httpx.HTTPError, ValueError, LookupError) as error:
        raise UserError(f"{wanted['model']}: no answer: {error}") from None
    return Answer(wanted["model"], wanted["prompt"], text, wanted["measured"])


def markdown(answers: list[dict[str, Any]]) -> str:
    """The answers as a table."""

    def cell(text: str) -> str:
        return text.replace("|", "\\|").replace("\n", " ")

    rows = "\n".join(
        f"| {one['model']} | {cell(one['prompt'])} | {cell(one['text'])} "
        f"| {'yes' if one['text'] == one['measured'] else 'no: ' + cell(one['measured'])} |"
        for one in answers
    )
    return f"| model | asked | answered | as measured |\n|---|---|---|---|\n{rows}\n"
