"""What of the API is no answer: the models, adapters that come and go, the page, and figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response

from serve.adapters import BASE
from serve.engine import Engine
from serve.errors import ApiError
from serve.metrics import CONTENT_TYPE, Metrics
from serve.requests import LoadAdapter, UnloadAdapter
from stages.errors import UserError

PAGE = Path(__file__).with_name("page.html")
# The page has its style and script in it, and asks nobody but this server.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
POLICY += (
    "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)


def adapters(app: FastAPI, engine: Engine) -> None:
    """The models, and adapters that come and go."""

    def model(name: str) -> dict[str, Any]:
        loaded = engine.adapters.loaded()
        return {
            "id": name,
            "object": "model",
            "created": engine.created,
            "owned_by": "olivepress",
            "parent": None if name == BASE else BASE,
            "loaded": name == BASE or name in loaded,
            "max_model_len": engine.context,
        }

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [model(name) for name in engine.models()]}

    @app.get("/v1/models/{name}")
    def one(name: str) -> dict[str, Any]:
        if name not in engine.models():
            raise ApiError(
                404, f"The model {name[:80]!r} does not exist", "model", "model_not_found"
            )
        return model(name)

    @app.post("/v1/load_lora_adapter")
    def load(body: LoadAdapter) -> dict[str, Any]:
        try:
            engine.adapters.add(body.lora_name, Path(body.lora_path))
        except UserError as error:
            raise ApiError(400, str(error), "lora_path") from None
        return model(body.lora_name)

    @app.post("/v1/unload_lora_adapter")
    def unload(body: UnloadAdapter) -> dict[str, Any]:
        try:
            engine.adapters.remove(body.lora_name)
        except KeyError:
            raise ApiError(
                404, f"there is no adapter {body.lora_name[:80]!r}", "lora_name", "model_not_found"
            ) from None
        return {"id": body.lora_name, "object": "model", "deleted": True}


def about(app: FastAPI, engine: Engine, metrics: Metrics) -> None:
    """Health, figures, the page, and where the model is from."""

    def file(name: str) -> str:
        try:
            return (engine.folder / name).read_text("utf-8", "replace")
        except OSError:
            raise ApiError(404, f"This model has no {name}") from None

    @app.api_route("/healthz", methods=["GET", "HEAD"])
    async def healthz() -> JSONResponse:
        well = engine.scheduler.alive
        return JSONResponse({"status": "ok" if well else "failed"}, 200 if well else 503)

    @app.get("/metrics")
    def prometheus() -> Response:
        return Response(metrics.text(), media_type=CONTENT_TYPE)

    @app.get("/card")
    def card() -> PlainTextResponse:
        return PlainTextResponse(file("README.md"), media_type="text/markdown")

    @app.get("/lineage")
    def lineage() -> Response:
        return Response(file("lineage.json"), media_type="application/json")

    @app.get("/")
    def page() -> HTMLResponse:
        headers = {"Content-Security-Policy": POLICY, "X-Content-Type-Options": "nosniff"}
        return HTMLResponse(PAGE.read_text("utf-8"), headers=headers)
