"""Blob storage: Azurite behind the tunnel, and what the emulator itself reads and signs there."""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import aiohttp
from azure.core.exceptions import ResourceExistsError
from azure.storage.blob import ContainerSasPermissions, generate_container_sas
from azure.storage.blob.aio import BlobServiceClient
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.types import Receive, Scope, Send
from yarl import URL

from .answers import bad
from .world import World

CHUNK = 1 << 18
HOP = {"connection", "keep-alive", "transfer-encoding", "proxy-connection"}
WRITES = "racwdl"  # SAS permissions: read, add, create, write, delete, list
READS = "rl"


class Blobs:
    """The storage account of the world.

    Args:
        world: whose account it is.
        address: where Azurite listens with TLS, such as https://127.0.0.1:10000.
        ca: the certificate authority that signed Azurite's certificate.
    """

    def __init__(self, world: World, address: str, ca: Path) -> None:
        self.world, self.address = world, address
        self.service = BlobServiceClient(
            f"{address}/{world.account}",
            credential=world.account_key,
            connection_verify=str(ca),
            use_env_settings=False,
        )
        self._session = aiohttp.ClientSession(
            auto_decompress=False,
            connector=aiohttp.TCPConnector(ssl=ssl.create_default_context(cafile=ca), limit=0),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=300),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )

    async def close(self) -> None:
        await self._session.close()
        await self.service.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on as it came, with its Host, and the answer back as it comes."""
        request = Request(scope, receive)
        query = scope["query_string"].decode()
        url = URL(f"{self.address}{scope['raw_path'].decode()}?{query}", encoded=True)
        headers = [(k, v) for k, v in request.headers.items() if k not in HOP]
        has_body = request.headers.get("content-length", "0") != "0" or (
            "transfer-encoding" in request.headers
        )
        try:
            async with self._session.request(
                request.method,
                url,
                headers=headers,
                data=self._upload(request) if has_body else None,
                allow_redirects=False,
            ) as answer:
                kept = {k: v for k, v in answer.headers.items() if k.lower() not in HOP}
                stream = StreamingResponse(answer.content.iter_chunked(CHUNK), answer.status)
                stream.raw_headers = [
                    (k.lower().encode("latin-1"), v.encode("latin-1")) for k, v in kept.items()
                ]
                await stream(scope, receive, send)
        except aiohttp.ClientConnectionError as error:
            await Response(f"blob storage: {error}", 503)(scope, receive, send)

    @staticmethod
    async def _upload(request: Request) -> AsyncIterator[bytes]:
        try:
            async for chunk in request.stream():
                if chunk:
                    yield chunk
        except ClientDisconnect:
            raise ConnectionResetError("the client went away") from None

    def sas(self, container: str, permissions: str, hours: float = 1) -> str:
        """A token for one container that ends after `hours`, for https only."""
        return generate_container_sas(
            self.world.account,
            container,
            self.world.account_key,
            permission=ContainerSasPermissions.from_string(permissions),
            expiry=datetime.now(UTC) + timedelta(hours=hours),
            protocol="https",
        )

    def uri(self, container: str, path: str = "") -> str:
        return f"https://{self.world.blob_host}/{container}{'/' if path else ''}{path}"

    async def make(self, container: str) -> None:
        with suppress(ResourceExistsError):
            await self.service.create_container(container)

    async def list(self, container: str, prefix: str = "") -> list[dict[str, Any]]:
        """Name, size in bytes and metadata of the blobs under `prefix`."""
        client = self.service.get_container_client(container)
        blobs = client.list_blobs(name_starts_with=prefix, include=["metadata"])
        return [{"name": b.name, "size": b.size, "metadata": b.metadata or {}} async for b in blobs]

    async def require(self, container: str, path: str, uri: str) -> None:
        """Refuse a reference to a file or folder without any blob.

        Raises:
            ServiceError: 400.
        """
        client = self.service.get_container_client(container)
        path = path.rstrip("/")
        async for blob in client.list_blobs(name_starts_with=path):
            if blob.name == path or blob.name.startswith(f"{path}/"):
                return
        raise bad(f"The specified path does not exist in the datastore: {uri}")

    async def clear(self) -> None:
        """Delete every container, and make the workspace's anew."""
        async for container in self.service.list_containers():
            await self.service.delete_container(container.name)
        await self.make(self.world.container)
