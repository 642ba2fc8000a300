"""Reads load from runtimes and gateways, straight from the pods; and asks models through their Services."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Sequence
from typing import Any

import aiohttp

from kubeinfer_operator.autoscale import Demand, Load

_METRICS = {
    "kubeinfer:num_requests_running": "running",
    "kubeinfer:num_requests_waiting": "waiting",
    "kubeinfer:kv_cache_usage_perc": "kv_usage",
}
MAX_BODY = 4 << 20


def parse_metrics(text: str) -> Load | None:
    """The three figures from a Prometheus page; None where one of the first two is not there."""
    found: dict[str, list[float]] = {}
    for line in text.splitlines():
        name = line.partition("{")[0].partition(" ")[0]
        if name in _METRICS:
            try:
                found.setdefault(_METRICS[name], []).append(float(line.rsplit(None, 1)[-1]))
            except ValueError:
                continue
    if "running" not in found or "waiting" not in found:
        return None
    return Load(sum(found["running"]), sum(found["waiting"]), max(found.get("kv_usage", [0.0])))


class Reader:
    """HTTP towards pods and Services. Short deadlines: a pod that does not answer is a fact, not an error."""

    def __init__(self, timeout: float = 2.0, limit: int = 64) -> None:
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None
        self._limit = limit

    def _http(self) -> aiohttp.ClientSession:
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._limit, force_close=True)
            self._session = aiohttp.ClientSession(timeout=self._timeout, connector=connector)
        return self._session

    async def close(self) -> None:
        if self._session is not None:
            await self._session.close()

    async def _get(self, url: str) -> tuple[int, bytes] | str:
        """Status and body, or why there is no answer."""
        try:
            async with self._http().get(url, allow_redirects=False) as answer:
                return answer.status, await answer.content.read(MAX_BODY)
        except TimeoutError:
            return f"{url} did not answer in {self._timeout.total:g} s"
        except (aiohttp.ClientError, OSError) as error:
            return f"{url}: {error}"

    async def load(self, address: str, port: int) -> Load | None:
        """Load of the runtime at ``address``."""
        found = await self._get(f"http://{_host(address)}:{port}/metrics")
        if isinstance(found, str):
            return None
        status, body = found
        return parse_metrics(body.decode("utf-8", "replace")) if status == 200 else None

    async def demand(self, addresses: Sequence[str], port: int) -> tuple[dict[str, Demand], dict[str, str]]:
        """Demand by ``namespace/name``, summed over the gateways that answer; and why the others do not, by address."""
        pages = await asyncio.gather(*(self._demand(address, port) for address in addresses))
        total: dict[str, Demand] = {}
        silent: dict[str, str] = {}
        now = time.time()
        for address, page in zip(addresses, pages, strict=True):
            if isinstance(page, str):
                silent[address] = page
                continue
            for name, entry in page.items():
                before = total.get(name, Demand())
                last = entry.get("last_request")
                idle = max(now - float(last), 0.0) if last else None
                known = [x for x in (idle, before.idle_for) if x is not None]
                total[name] = Demand(
                    before.waiting + int(entry.get("waiting", 0)),
                    before.inflight + int(entry.get("inflight", 0)),
                    min(known) if known else None,
                )
        return total, silent

    async def _demand(self, address: str, port: int) -> dict[str, dict[str, Any]] | str:
        """Entries by model, or why there are none."""
        url = f"http://{_host(address)}:{port}/demand"
        found = await self._get(url)
        if isinstance(found, str):
            return found
        status, body = found
        if status != 200:
            return f"{url} answered {status}"
        try:
            models = json.loads(body)["models"]
        except (ValueError, KeyError, TypeError):
            models = None
        return models if isinstance(models, dict) else f"{url} answered with something that is no demand"

    async def answers(self, url: str, served: tuple[str, ...]) -> tuple[bool, str]:
        """Whether the model lists itself at ``url``; a refusal for want of a key is an answer of the model, too."""
        found = await self._get(url)
        if isinstance(found, str):
            return False, found
        status, body = found
        if status in (401, 403):
            return True, "answers through its Service (and asks for a key)"
        if status != 200:
            return False, f"{url} answered {status}"
        try:
            listed = {str(item["id"]) for item in json.loads(body)["data"]}
        except (ValueError, KeyError, TypeError):
            return False, f"{url} answered with something that is no list of models"
        missing = [name for name in served if name not in listed]
        if missing:
            return False, f"{url} lists {', '.join(sorted(listed)) or 'nothing'}, not {missing[0]}"
        return True, "answers through its Service"


def _host(address: str) -> str:
    return f"[{address}]" if ":" in address else address
