"""List and watch of one kind of object, over the official Kubernetes client's session, for as long as it takes.

The state handed on is always one that the API server has had: a dropped or silent watch is taken up again where it
was, an expired one (410 Gone) starts over with a list, and while the server is away what was known stays in force.
"""

from __future__ import annotations

import asyncio
import logging
import os
import random
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any
from urllib.parse import urlencode

import aiohttp
import msgspec
from kubernetes.aio import client, config

from kubeinfer_gateway.discovery.base import DiscoveryError

logger = logging.getLogger(__name__)

_PAGE = 500
_BACKOFF_MAX = 5.0


class ListMeta(msgspec.Struct, rename="camel"):
    resource_version: str = ""
    continue_: str = msgspec.field(default="", name="continue")


class _List(msgspec.Struct):
    metadata: ListMeta
    items: list[msgspec.Raw] | None = None


class _Event(msgspec.Struct):
    type: str
    object: msgspec.Raw


class _Versioned(msgspec.Struct):
    metadata: ListMeta


class _Status(msgspec.Struct):
    code: int = 0
    message: str = ""


_list = msgspec.json.Decoder(_List)
_event = msgspec.json.Decoder(_Event)
_versioned = msgspec.json.Decoder(_Versioned)
_status = msgspec.json.Decoder(_Status)


class _Answer(Exception):
    """The API server's answer where it is no success."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(f"{status}: {message}")
        self.status = status


class KubeClient:
    """The official client, from the pod's service account or the kubeconfig."""

    def __init__(self, api: Any) -> None:
        self.api = api

    @classmethod
    async def connect(cls) -> KubeClient:
        """Raises DiscoveryError where there is no configuration to be found."""
        configuration = client.Configuration()
        try:
            if os.environ.get("KUBERNETES_SERVICE_HOST") and not os.environ.get("KUBECONFIG"):
                config.load_incluster_config(client_configuration=configuration)
            else:
                await config.load_kube_config(client_configuration=configuration)
        except (config.ConfigException, OSError) as error:
            raise DiscoveryError(
                f"--discovery kubernetes: no cluster to talk to ({error}); set KUBECONFIG, or use --discovery static"
            ) from None
        configuration.connection_pool_maxsize = 64
        return cls(client.ApiClient(configuration))

    async def get(
        self, path: str, query: dict[str, str], timeout: aiohttp.ClientTimeout
    ) -> aiohttp.ClientResponse:
        _, url, headers, _, _ = await self.api.param_serialize(
            "GET", path, header_params={"Accept": "application/json"}, auth_settings=["BearerToken"]
        )
        url += "?" + urlencode(query)
        answer = await self.api.rest_client.request("GET", url, headers=headers, _request_timeout=timeout)
        response: aiohttp.ClientResponse = answer.response
        if response.status != 200:
            try:
                text = await response.read()
            finally:
                response.release()
            try:
                message = _status.decode(text).message
            except msgspec.DecodeError:
                message = text[:200].decode("utf-8", "replace")
            raise _Answer(response.status, message)
        return response

    async def close(self) -> None:
        await self.api.close()


class Watcher:
    """Follows all objects under `path`.

    `replace` gets every object (as JSON) whenever all were listed; `change` gets one that was added or modified, or
    deleted (second argument True). `seconds`: how long one watch lasts; a silent one is given up 10 s later at most.
    """

    def __init__(
        self,
        kube: KubeClient,
        path: str,
        replace: Callable[[list[msgspec.Raw]], None],
        change: Callable[[msgspec.Raw, bool], None],
        *,
        label_selector: str = "",
        field_selector: str = "",
        seconds: float = 60.0,
        on_error: Callable[[], None] = lambda: None,
    ) -> None:
        self.kube = kube
        self.path = path
        self.seconds = seconds
        self._replace = replace
        self._change = change
        self._on_error = on_error
        self._selectors = {
            name: value
            for name, value in (("labelSelector", label_selector), ("fieldSelector", field_selector))
            if value
        }

    async def run(self) -> None:
        version = ""
        failures = 0
        while True:
            try:
                if not version:
                    version = await self._list()
                async with aclosing(self._watch(version)) as events:
                    async for event in events:
                        if event.type == "ERROR":
                            status = _status.decode(event.object)
                            raise _Answer(status.code, status.message)
                        failures = 0
                        version = _versioned.decode(event.object).metadata.resource_version or version
                        if event.type != "BOOKMARK":
                            self._change(event.object, event.type == "DELETED")
                failures = 0
                # A server that ends each watch at once must not be asked in a tight loop.
                await asyncio.sleep(random.uniform(0.02, 0.1))
            except Exception as error:
                # Whatever it was (the network, the server, a token file being replaced), trying again is the way on.
                if isinstance(error, _Answer) and error.status == 410:
                    version = ""
                    if failures == 0:
                        failures = 1
                        continue
                failures += 1
                self._on_error()
                self._report(error, failures)
                if isinstance(error, msgspec.DecodeError):
                    version = ""
                await asyncio.sleep(
                    min(_BACKOFF_MAX, 0.1 * 2 ** min(failures, 10)) * random.uniform(0.5, 1.0)
                )

    def _report(self, error: Exception, failures: int) -> None:
        if isinstance(error, _Answer) and error.status in (401, 403):
            text = f"the gateway may not list and watch {self.path}: check its Role ({error})"
        elif isinstance(error, _Answer) and error.status == 404:
            text = f"{self.path} is not served: is the CustomResourceDefinition installed? ({error})"
        else:
            text = f"{self.path}: {type(error).__name__}: {error}"
        # The first failure may be a server's restart; one that stays is worth a line now and then.
        level = logging.WARNING if failures in (3, 10) or failures % 100 == 0 else logging.DEBUG
        if isinstance(error, _Answer) and failures == 1:
            level = logging.WARNING
        logger.log(level, "%s", text)

    async def _list(self) -> str:
        items: list[msgspec.Raw] = []
        query = {**self._selectors, "limit": str(_PAGE)}
        timeout = aiohttp.ClientTimeout(total=60, sock_connect=5, sock_read=30)
        while True:
            response = await self.kube.get(self.path, query, timeout)
            try:
                page = _list.decode(await response.read())
            finally:
                response.release()
            items += page.items or []
            if not page.metadata.continue_:
                break
            query["continue"] = page.metadata.continue_
        self._replace(items)
        return page.metadata.resource_version

    async def _watch(self, version: str) -> AsyncGenerator[_Event, None]:
        query = {
            **self._selectors,
            "watch": "true",
            "allowWatchBookmarks": "true",
            "resourceVersion": version,
            "timeoutSeconds": str(max(1, int(self.seconds * random.uniform(0.9, 1.0)))),
        }
        margin = min(10.0, self.seconds)
        timeout = aiohttp.ClientTimeout(total=self.seconds + margin, sock_connect=5)
        response = await self.kube.get(self.path, query, timeout)
        buffer = b""
        try:
            async for data in response.content.iter_any():
                *lines, buffer = (buffer + data).split(b"\n")
                for line in lines:
                    if line.strip():
                        yield _event.decode(line)
        except TimeoutError:
            # The server should have ended the watch before: it, or the way to it, is dead.
            logger.info("the watch of %s went silent; starting another", self.path)
            self._on_error()
        finally:
            response.close()
