"""Microsoft Entra's login for one application: client credentials against a signed token.

https://learn.microsoft.com/entra/identity-platform/v2-oauth2-client-creds-grant-flow
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import secrets
import time
from typing import Any
from urllib.parse import parse_qsl

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from .answers import HANDLERS, ServiceError
from .world import LOGIN, World

LIFE_SECONDS = 3599
AUDIENCES = {
    "https://management.azure.com",
    "https://management.core.windows.net",
    "https://ml.azure.com",
    "https://storage.azure.com",
}


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


class Login:
    """Gives tokens, and knows its own again."""

    def __init__(self, world: World) -> None:
        self.world = world
        self._key = secrets.token_bytes(32)
        self.app = Starlette(
            routes=[
                Route("/common/discovery/instance", self.instance),
                Route("/{tenant}/v2.0/.well-known/openid-configuration", self.configuration),
                Route("/{tenant}/oauth2/v2.0/token", self.token, methods=["POST"]),
            ],
            exception_handlers=HANDLERS,
        )

    def issue(self, audience: str) -> str:
        """A token for `audience`, in the form that Azurite's `--oauth basic` reads."""
        start = int(time.time())
        claims = {
            "aud": audience,
            "iss": f"https://sts.windows.net/{self.world.tenant}/",
            "iat": start,
            "nbf": start,
            "exp": start + LIFE_SECONDS,
            "appid": self.world.client,
            "tid": self.world.tenant,
        }
        parts = [json.dumps(part).encode() for part in ({"alg": "HS256", "typ": "JWT"}, claims)]
        signed = ".".join(_encode(part) for part in parts)
        return f"{signed}.{self._sign(signed)}"

    def check(self, authorization: str) -> None:
        """Accept a header `Bearer ...` with a token of `issue` that has not expired.

        Raises:
            ServiceError: 401 with a challenge.
        """
        scheme, _, token = authorization.partition(" ")
        signed, _, signature = token.rpartition(".")
        if not authorization:
            raise self._unauthorized(
                "AuthenticationFailed",
                "Authentication failed. The 'Authorization' header is missing.",
            )
        if scheme != "Bearer" or not hmac.compare_digest(
            self._sign(signed).encode(), signature.encode()
        ):
            raise self._unauthorized("InvalidAuthenticationToken", "The access token is invalid.")
        claims: dict[str, Any] = json.loads(_decode(signed.partition(".")[2]))
        if claims["exp"] < time.time():
            raise self._unauthorized(
                "ExpiredAuthenticationToken", "The access token expiry has passed."
            )
        if claims["aud"] == "https://storage.azure.com":
            raise self._unauthorized(
                "InvalidAuthenticationTokenAudience",
                "The access token has been obtained for wrong audience or resource "
                f"'{claims['aud']}'.",
            )

    def _sign(self, text: str) -> str:
        return _encode(hmac.new(self._key, text.encode(), hashlib.sha256).digest())

    def _unauthorized(self, code: str, message: str) -> ServiceError:
        authority = f"https://{LOGIN}/{self.world.tenant}"
        challenge = f'Bearer authorization_uri="{authority}", error="invalid_token"'
        return ServiceError(401, code, message, {"WWW-Authenticate": challenge})

    async def instance(self, request: Request) -> Response:
        tenant = self.world.tenant
        return JSONResponse(
            {
                "tenant_discovery_endpoint": (
                    f"https://{LOGIN}/{tenant}/v2.0/.well-known/openid-configuration"
                ),
                "api-version": "1.1",
                "metadata": [
                    {
                        "preferred_network": LOGIN,
                        "preferred_cache": "login.windows.net",
                        "aliases": [LOGIN, "login.windows.net", "sts.windows.net"],
                    }
                ],
            }
        )

    async def configuration(self, request: Request) -> Response:
        tenant = request.path_params["tenant"]
        if tenant not in (self.world.tenant, "organizations", "common"):
            return _oauth(400, "invalid_tenant", f"AADSTS90002: Tenant '{tenant}' not found.")
        base = f"https://{LOGIN}/{tenant}"
        return JSONResponse(
            {
                "token_endpoint": f"{base}/oauth2/v2.0/token",
                "authorization_endpoint": f"{base}/oauth2/v2.0/authorize",
                "device_authorization_endpoint": f"{base}/oauth2/v2.0/devicecode",
                "issuer": f"{base}/v2.0",
                "jwks_uri": f"{base}/discovery/v2.0/keys",
                "tenant_region_scope": "EU",
                "cloud_instance_name": "microsoftonline.com",
            }
        )

    async def token(self, request: Request) -> Response:
        tenant = request.path_params["tenant"]
        if tenant != self.world.tenant:
            return _oauth(400, "invalid_request", f"AADSTS90002: Tenant '{tenant}' not found.")
        form = dict(parse_qsl((await request.body()).decode()))
        if form.get("grant_type") != "client_credentials":
            return _oauth(400, "unsupported_grant_type", "AADSTS70003: Unsupported grant type.")
        if form.get("client_id") != self.world.client:
            return _oauth(
                400,
                "unauthorized_client",
                f"AADSTS700016: Application with identifier '{form.get('client_id')}' was not "
                f"found in the directory '{tenant}'.",
            )
        if form.get("client_secret") != self.world.client_secret:
            return _oauth(
                401,
                "invalid_client",
                "AADSTS7000215: Invalid client secret provided. Ensure the secret being sent in "
                "the request is the client secret value, not the client secret ID, for a secret "
                f"added to app '{self.world.client}'.",
            )
        scope = str(form.get("scope"))
        audience = scope.removesuffix("/.default").rstrip("/")
        if not scope.endswith("/.default") or audience not in AUDIENCES:
            return _oauth(
                400,
                "invalid_resource",
                f"AADSTS500011: The resource principal named {audience} was not found.",
            )
        life = {"expires_in": LIFE_SECONDS, "ext_expires_in": LIFE_SECONDS}
        return JSONResponse({"token_type": "Bearer", **life, "access_token": self.issue(audience)})


def _oauth(status: int, error: str, description: str) -> Response:
    number = description.partition(":")[0].removeprefix("AADSTS")
    return JSONResponse(
        {"error": error, "error_description": description, "error_codes": [int(number)]}, status
    )
