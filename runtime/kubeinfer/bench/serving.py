"""``kubeinfer bench serve``: streams requests at a running server and measures what its clients would see."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import aiohttp

from kubeinfer.bench.figures import heading, line, summary
from kubeinfer.bench.workload import BenchRequest
from kubeinfer.errors import KubeinferError

METRICS = {
    "ttft": "Time to first token",
    "tpot": "Time per output token, without the first",
    "itl": "Inter-token latency",
    "e2el": "End-to-end latency",
}


@dataclass(frozen=True)
class Target:
    """A server and how each request is put to it. ``chat`` sends prompts as a user's message."""

    url: str
    model: str
    chat: bool = False
    headers: dict[str, str] = field(default_factory=dict)
    extra_body: dict[str, Any] = field(default_factory=dict)
    ignore_eos: bool = True
    timeout: float = 6 * 3600.0


@dataclass
class Outcome:
    """One request as its client saw it. Times are ``perf_counter`` seconds."""

    sent: float = 0.0
    first: float = 0.0
    end: float = 0.0
    gaps: list[float] = field(default_factory=list)
    prompt_tokens: int = 0
    output_tokens: int = 0
    error: str = ""

    @property
    def ttft(self) -> float:
        return self.first - self.sent

    @property
    def e2el(self) -> float:
        return self.end - self.sent

    @property
    def tpot(self) -> float:
        return (self.end - self.first) / (self.output_tokens - 1) if self.output_tokens > 1 else 0.0


async def send(session: aiohttp.ClientSession, target: Target, request: BenchRequest) -> Outcome:
    """Stream one request to its end. Failures are in the outcome's ``error``, never raised."""
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": request.output_len,
        "temperature": 0.0,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if target.chat:
        body["messages"] = [{"role": "user", "content": request.prompt}]
    else:
        body["prompt"] = request.prompt
    if target.ignore_eos:
        body["ignore_eos"] = True
    body |= target.extra_body
    outcome = Outcome(sent=time.perf_counter(), prompt_tokens=request.prompt_len or 0)
    chunks = 0
    done = False
    try:
        async with session.post(target.url, json=body) as response:
            if response.status != 200:
                outcome.error = f"HTTP {response.status}: {(await response.text())[:300]}"
                return outcome
            async for now, event in _events(response):
                if event is None:
                    done = True
                    break
                if event.get("error"):
                    outcome.error = json.dumps(event["error"])[:300]
                    return outcome
                usage = event.get("usage")
                if usage:
                    outcome.prompt_tokens = int(usage.get("prompt_tokens") or outcome.prompt_tokens)
                    outcome.output_tokens = int(usage.get("completion_tokens") or 0)
                if _brings_tokens(event, target.chat):
                    if chunks:
                        outcome.gaps.append(now - outcome.end)
                    else:
                        outcome.first = now
                    outcome.end = now
                    chunks += 1
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError) as exc:
        outcome.error = f"{type(exc).__name__}: {exc}"[:300]
        return outcome
    if not done:
        outcome.error = "the stream ended without [DONE]"
    elif not chunks:
        outcome.error = "the stream brought no token"
    if not outcome.output_tokens:
        outcome.output_tokens = chunks  # a server that sends no usage: a chunk counts as a token
    return outcome


async def _events(response: aiohttp.ClientResponse) -> AsyncIterator[tuple[float, dict[str, Any] | None]]:
    """(arrival, event) of each server-sent event; None is ``[DONE]``."""
    rest = b""
    async for data in response.content.iter_any():
        now = time.perf_counter()
        *lines, rest = (rest + data).split(b"\n")
        for text in lines:
            if not text.startswith(b"data:"):
                continue
            payload = text[5:].strip()
            yield now, None if payload == b"[DONE]" else json.loads(payload)


def _brings_tokens(event: dict[str, Any], chat: bool) -> bool:
    for choice in event.get("choices") or ():
        if chat:
            delta = choice.get("delta") or {}
            if delta.get("content") or delta.get("reasoning_content"):
                return True
        elif choice.get("text") or choice.get("token_ids"):
            return True
    return False


async def _first_model(session: aiohttp.ClientSession, base_url: str) -> str:
    try:
        async with session.get(f"{base_url}/v1/models") as response:
            response.raise_for_status()
            return str((await response.json())["data"][0]["id"])
    except (aiohttp.ClientError, TimeoutError, OSError, ValueError, LookupError) as exc:
        raise KubeinferError(
            f"{base_url}/v1/models does not answer with a model ({type(exc).__name__}: {exc}). "
            "Is the server up? Set --base-url (or --host and --port), and --model."
        ) from None


async def find_model(base_url: str, headers: dict[str, str]) -> str:
    """The first model that the server lists. Raises :class:`KubeinferError` where it does not answer."""
    timeout = aiohttp.ClientTimeout(total=10)
    async with aiohttp.ClientSession(headers=headers, timeout=timeout) as session:
        return await _first_model(session, base_url)


async def drive(
    target: Target,
    requests: Sequence[BenchRequest],
    *,
    request_rate: float = float("inf"),
    burstiness: float = 1.0,
    max_concurrency: int | None = None,
    warmups: int = 0,
    seed: int = 0,
    on_done: Callable[[Outcome], None] | None = None,
) -> tuple[list[Outcome], float]:
    """Send all requests; (outcomes in their order, seconds from the first sent to the last ended).

    Arrivals are a gamma process of ``request_rate`` a second (``burstiness`` 1: Poisson); ``inf`` sends all at once. No
    more than ``max_concurrency`` are in flight.
    """
    rng = random.Random(seed)
    gate = asyncio.Semaphore(max_concurrency) if max_concurrency else None
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=target.timeout)
    async with aiohttp.ClientSession(
        connector=connector, timeout=timeout, headers=target.headers, read_bufsize=2**18
    ) as session:
        for _ in range(warmups):
            outcome = await send(session, target, requests[0])
            if outcome.error:
                raise KubeinferError(f"the warm-up request failed: {outcome.error}")

        async def one(request: BenchRequest) -> Outcome:
            if gate is None:
                outcome = await send(session, target, request)
            else:
                async with gate:
                    outcome = await send(session, target, request)
            if on_done is not None:
                on_done(outcome)
            return outcome

        start = time.perf_counter()
        due = start
        tasks = []
        for request in requests:
            delay = due - time.perf_counter()
            if delay > 0:
                await asyncio.sleep(delay)
            tasks.append(asyncio.create_task(one(request)))
            if request_rate != float("inf"):
                due += rng.gammavariate(burstiness, 1.0 / (request_rate * burstiness))
        outcomes = await asyncio.gather(*tasks)
        return list(outcomes), time.perf_counter() - start


def report(
    outcomes: Sequence[Outcome],
    duration: float,
    percents: Sequence[float] = (99.0,),
    goodput: dict[str, float] | None = None,
) -> dict[str, Any]:
    """Rates and latencies of ``outcomes``; names are those of vLLM's result files. ``goodput``: metric -> most ms."""
    good = [o for o in outcomes if not o.error]
    input_tokens = sum(o.prompt_tokens for o in good)
    output_tokens = sum(o.output_tokens for o in good)
    seconds = {
        "ttft": [o.ttft for o in good],
        "tpot": [o.tpot for o in good if o.output_tokens > 1],
        "itl": [gap for o in good for gap in o.gaps],
        "e2el": [o.e2el for o in good],
    }
    result: dict[str, Any] = {
        "duration": duration,
        "completed": len(good),
        "failed": len(outcomes) - len(good),
        "total_input_tokens": input_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(good) / duration,
        "output_throughput": output_tokens / duration,
        "total_token_throughput": (input_tokens + output_tokens) / duration,
        "errors": sorted({o.error for o in outcomes if o.error})[:5],
    }
    if goodput:
        met = [o for o in good if all(1000 * getattr(o, name) <= most for name, most in goodput.items())]
        result["request_goodput"] = len(met) / duration
    for name, values in seconds.items():
        result |= summary(name, values, percents)
    return result


def print_report(result: dict[str, Any], metrics: Sequence[str], percents: Sequence[float]) -> None:
    """The table of a :func:`report`."""
    print(heading("serving", "="))
    print(line("Successful requests", result["completed"]))
    print(line("Failed requests", result["failed"]))
    print(line("Duration (s)", result["duration"]))
    if result["completed"]:
        _print_figures(result, metrics, percents)
    for error in result["errors"]:
        print(f"error: {error}")


def _print_figures(result: dict[str, Any], metrics: Sequence[str], percents: Sequence[float]) -> None:
    print(line("Prompt tokens", result["total_input_tokens"]))
    print(line("Output tokens", result["total_output_tokens"]))
    print(line("Requests/s", result["request_throughput"]))
    if "request_goodput" in result:
        print(line("Requests/s within the goodput bounds", result["request_goodput"]))
    print(line("Output tokens/s", result["output_throughput"]))
    print(line("Total tokens/s", result["total_token_throughput"]))
    for name in metrics:
        print(heading(METRICS[name]))
        label = name.upper()
        print(line(f"Mean {label} (ms)", result[f"mean_{name}_ms"]))
        print(line(f"Median {label} (ms)", result[f"median_{name}_ms"]))
        for percent in percents:
            print(line(f"P{percent:g} {label} (ms)", result[f"p{percent:g}_{name}_ms"]))
