"""An MLflow tracking server with a model registry."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from stages.errors import UserError
from stages.redact import without_secrets
from tasks.publish.content import DIGEST, PREFIX, Content
from tasks.publish.targets import Told, next_version

EXPERIMENT = "olivepress"
FOLDER = "package"  # among the artifacts of the run
# Seconds and tries; the client's own would wait 2 minutes for each of 7.
LIMITS = {"MLFLOW_HTTP_REQUEST_TIMEOUT": "30", "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3"}


class Mlflow:
    """Files and figures in a run, and a version of a registered model that points at them.

    Raises:
        UserError: mlflow is not installed; from each method, when the server refuses.
    """

    def __init__(self, uri: str) -> None:
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)
        try:
            from mlflow import MlflowClient
        except ModuleNotFoundError:
            raise UserError(
                "publishing to MLflow needs its client: .venv/bin/pip install -e '.[mlflow]'"
            ) from None
        self.uri = uri.rstrip("/")
        self.where = f"MLflow at {without_secrets(self.uri)}"
        self.client = MlflowClient(uri)

    def versions(self, name: str) -> dict[str, str | None]:
        with self._explained():
            found = self.client.search_model_versions(f"name='{name}'")
        return {str(model.version): model.tags.get(DIGEST) for model in found}

    def add(self, content: Content, name: str, version: str, told: Told) -> None:
        following = next_version(self.versions(name))
        if version != following:
            raise UserError(
                f"{self.where} numbers versions itself, and the next of {name} is {following}; "
                "leave --version out"
            )
        with self._explained():
            run = self._run(content)
            there = dict(self._sizes(run, FOLDER))
            for file, path in content.files.items():
                if there.get(f"{FOLDER}/{file}") != path.stat().st_size:
                    folder = f"{FOLDER}/{file}".rpartition("/")[0]
                    self.client.log_artifact(run, str(path), folder)
                told(path.stat().st_size)
            wanted = {f"{FOLDER}/{f}": path.stat().st_size for f, path in content.files.items()}
            if dict(self._sizes(run, FOLDER)) != wanted:
                raise UserError(f"{self.where}: the files there differ from the package; try again")
            for key, value in content.properties.items():
                if key.startswith(f"{PREFIX}metric."):
                    self.client.log_metric(run, key.removeprefix(f"{PREFIX}metric."), float(value))
            content.check()
            if not self.client.search_registered_models(f"name='{name}'"):
                self.client.create_registered_model(name, description=content.description)
            made = self.client.create_model_version(
                name,
                source=f"runs:/{run}/{FOLDER}",
                run_id=run,
                tags={**content.tags, **content.properties},
                description=content.description,
            )
            self.client.set_terminated(run)
        if str(made.version) != version:
            raise UserError(f"{self.where}: became version {made.version}: another was quicker")

    def _run(self, content: Content) -> str:
        """The run that holds the files: one that an earlier try left unfinished, or a new one."""
        found = self.client.get_experiment_by_name(EXPERIMENT)
        experiment = found.experiment_id if found else self.client.create_experiment(EXPERIMENT)
        same = f"tags.`{PREFIX}sums` = '{content.sums}' and attributes.status = 'RUNNING'"
        if left := self.client.search_runs([experiment], same, max_results=1):
            return left[0].info.run_id
        tags = {f"{PREFIX}sums": content.sums, **content.tags}
        return self.client.create_run(experiment, tags=tags, run_name="publish").info.run_id

    def _sizes(self, run: str, folder: str) -> Iterator[tuple[str, int | None]]:
        for file in self.client.list_artifacts(run, folder):
            if file.is_dir:
                yield from self._sizes(run, file.path)
            else:
                yield file.path, file.file_size

    def address(self, name: str, version: str) -> str:
        return f"{without_secrets(self.uri)}/#/models/{name}/versions/{version}"

    @contextmanager
    def _explained(self) -> Iterator[None]:
        import requests
        from mlflow.exceptions import MlflowException

        try:
            yield
        except (MlflowException, requests.RequestException) as error:
            if "Max retries exceeded" in str(error):
                raise UserError(f"{self.where}: nothing answers there") from None
            raise UserError(f"{self.where}: {without_secrets(str(error))}") from None
