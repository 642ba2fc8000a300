"""What passes through: bytes, streams, headers; and what does not: limits and errors."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from typing import Any

import aiohttp
import pytest

Serve = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


async def raw_request(bench: Any, data: bytes, *, close_write: bool = False) -> bytes:
    """Sends bytes to the gateway and returns all that comes until it closes."""
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.gateway.port)
    writer.write(data)
    try:
        return await asyncio.wait_for(reader.read(), 10)
    finally:
        writer.close()


def request_bytes(version: str = "1.1", extra: str = "connection: close\r\n", **body: Any) -> bytes:
    text = json.dumps({"model": "m", "messages": [], **body}).encode()
    head = (
        f"POST /v1/chat/completions HTTP/{version}\r\nhost: x\r\n{extra}content-length: {len(text)}\r\n\r\n"
    )
    return head.encode() + text


async def test_what_connection_names_is_not_passed_on(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    extra = "Connection: close, X-Hop\r\nX-Hop: 1\r\nX-End: 2\r\n"
    assert (await raw_request(bench, request_bytes(extra=extra))).startswith(b"HTTP/1.1 200")
    got = {name.lower() for name in runtime.requests[-1]["headers"]}
    assert "x-end" in got
    assert "x-hop" not in got


async def test_streams_bytes_through(bench: Any) -> None:
    runtime = await bench.runtime(tokens=20)
    await bench.start()
    bench.serve("m", runtime)
    async with bench.chat(stream=True) as response:
        assert response.status == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        through = await response.read()
    async with bench.client.post(
        runtime.url + "/v1/chat/completions", data=runtime.requests[0]["body"]
    ) as response:
        direct = await response.read()
    assert through == direct
    assert through.endswith(b"data: [DONE]\n\n")


async def test_the_body_is_unchanged(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    body = b'{ "x":1e0,\n "model" : "n" , "model":"\\u006d", "messages":[]}  '
    async with bench.client.post(bench.url + "/v1/chat/completions?a=b%20c", data=body) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["message"]["content"] == "from runtime"
    assert runtime.requests[0]["body"] == body
    assert runtime.requests[0]["path"] == "/v1/chat/completions?a=b%20c"


@pytest.mark.parametrize(
    "path", ["/v1/completions", "/v1/embeddings", "/tokenize", "/score", "/v1/rerank", "/v1/responses"]
)
async def test_every_route_passes(bench: Any, path: str) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    async with bench.client.post(bench.url + path, json={"model": "m"}) as response:
        assert response.status == 200
    assert runtime.requests[0]["path"] == path


@pytest.mark.parametrize(
    "path", ["/v1/load_lora_adapter", "/metrics", "/demand", "/v1/../sleep", "/sleep", "/v1/%2e%2e/sleep"]
)
async def test_the_owners_routes_do_not(bench: Any, path: str) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    answer = await raw_request(
        bench,
        b"POST %b HTTP/1.1\r\nhost: x\r\nconnection: close\r\ncontent-length: 13\r\n\r\n" % path.encode()
        + b'{"model":"m"}',
    )
    assert answer.startswith((b"HTTP/1.1 404", b"HTTP/1.1 405"))
    assert not runtime.requests


async def test_headers(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    sent = {"x-request-id": "my-id-1", "x-custom": "a", "connection": "x-hop", "authorization": "Bearer user"}
    async with bench.chat(headers=sent) as response:
        assert response.headers["x-request-id"] == "my-id-1"
    got = {name.lower(): value for name, value in runtime.requests[0]["headers"].items()}
    assert got["x-request-id"] == "my-id-1"
    assert got["x-custom"] == "a"
    assert got["host"] == f"127.0.0.1:{runtime.port}"
    assert got["authorization"] == "Bearer user"
    assert "connection" not in got
    async with bench.chat(headers={"x-request-id": "not one\u00e9"}) as response:
        identity = response.headers["x-request-id"]
    assert len(identity) == 32
    got = {name.lower(): value for name, value in runtime.requests[1]["headers"].items()}
    assert got["x-request-id"] == identity


async def test_an_answers_status_and_body_pass(bench: Any) -> None:
    runtime = await bench.runtime(status=422)
    await bench.start()
    bench.serve("m", runtime)
    async with bench.chat() as response:
        assert response.status == 422
        assert await response.json() == {"error": {"message": "status 422"}}


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b'{"model": "nope"}', 404, "model_not_found"),
        (b"{}", 400, "model_required"),
        (b'{"model": 3}', 400, "invalid_type"),
        (b'{"model": "m"', 400, "invalid_json"),
        (b"[1]", 400, "invalid_json"),
        (b"", 400, "invalid_json"),
        (b"\xff\xfe", 400, "invalid_json"),
    ],
)
async def test_errors_have_openais_shape(bench: Any, body: bytes, status: int, code: str) -> None:
    await bench.start()
    bench.serve("m", await bench.runtime())
    async with bench.client.post(bench.url + "/v1/completions", data=body) as response:
        assert response.status == status
        error = (await response.json())["error"]
        assert error.keys() == {"message", "type", "param", "code"}
        assert error["code"] == code
        assert response.headers["x-request-id"]
        if status == 404:
            assert "'nope'" in error["message"]
            assert "Models here: m." in error["message"]


async def test_other_methods_and_paths(bench: Any) -> None:
    await bench.start()
    async with bench.client.get(bench.url + "/v1/completions") as response:
        assert response.status == 405
        assert (await response.json())["error"]["code"] == "method_not_allowed"
    async with bench.client.get(bench.url + "/nothing", headers={"x-request-id": "abc"}) as response:
        assert response.status == 404
        assert response.headers.getall("x-request-id") == ["abc"]
        assert (await response.json())["error"]["code"] == "not_found"


async def test_models(bench: Any) -> None:
    await bench.start()
    bench.serve("b", await bench.runtime(), created=5)
    bench.serve("a/x", names=("q/x", "a"))
    async with bench.client.get(bench.url + "/v1/models") as response:
        data = (await response.json())["data"]
    assert [(m["id"], m["created"], m["owned_by"], m["ready"]) for m in data] == [
        ("a", 1, "a/x", False),
        ("b", 5, "default/b", True),
        ("q/x", 1, "a/x", False),
    ]
    async with bench.client.get(bench.url + "/v1/models/q/x") as response:
        assert (await response.json())["id"] == "q/x"
    async with bench.client.get(bench.url + "/v1/models/z") as response:
        assert response.status == 404


async def test_a_body_too_large(bench: Any) -> None:
    await bench.start(max_body_bytes=1000)
    bench.serve("m", await bench.runtime())
    async with bench.chat(text="x" * 2000) as response:
        assert response.status == 413
        assert (await response.json())["error"]["code"] == "request_too_large"

    async def pieces() -> Any:
        for _ in range(20):
            yield b"x" * 100

    async with bench.client.post(bench.url + "/v1/completions", data=pieces()) as response:
        assert response.status == 413
    assert bench.gateway.proxy.bodies.held == 0


async def test_bodies_together_are_bounded(bench: Any) -> None:
    runtime = await bench.runtime(delay=0.5)
    await bench.start(max_buffered_bytes=5000)
    bench.serve("m", runtime)

    async def one() -> int:
        async with bench.chat(text="x" * 2000) as response:
            return int(response.status)

    assert sorted(await asyncio.gather(*(one() for _ in range(4)))) == [200, 200, 429, 429]
    assert bench.gateway.proxy.bodies.held == 0
    assert await one() == 200


async def test_requests_at_once_are_bounded(bench: Any) -> None:
    runtime = await bench.runtime(delay=0.3)
    await bench.start(max_requests=3)
    bench.serve("m", runtime)

    async def one() -> tuple[int, str | None]:
        async with bench.chat() as response:
            return response.status, response.headers.get("retry-after")

    answers = await asyncio.gather(*(one() for _ in range(5)))
    assert sorted(answers, key=str) == [(200, None)] * 3 + [(429, "1")] * 2


async def test_headers_too_large(bench: Any) -> None:
    await bench.start(max_header_bytes=4096)
    bench.serve("m", await bench.runtime())
    answer = await raw_request(bench, request_bytes(extra="x-big: " + "x" * 5000 + "\r\n"))
    assert answer.startswith(b"HTTP/1.1 431")
    endless = b"POST /v1/completions HTTP/1.1\r\nx-endless: " + b"x" * 100_000
    assert (await raw_request(bench, endless)).startswith(b"HTTP/1.1 431")
    large_body = request_bytes(text="x" * 300_000)
    assert (await raw_request(bench, large_body)).startswith(b"HTTP/1.1 200")


async def test_a_client_that_never_says_what_it_wants_is_closed(bench: Any) -> None:
    await bench.start()
    bench.gateway._servers[0][0].config.http_protocol_class.limits.header_timeout = 0.5
    for beginning in (b"", b"POST /v1/comp"):
        begin = asyncio.get_running_loop().time()
        assert await raw_request(bench, beginning) == b""
        assert asyncio.get_running_loop().time() - begin < 4


async def test_a_body_that_never_ends(bench: Any) -> None:
    await bench.start(body_timeout=0.3)
    bench.serve("m", await bench.runtime())
    answer = await raw_request(
        bench, b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
    )
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"request_timeout" in answer


@pytest.mark.parametrize("version", ["1.0", "1.1"])
@pytest.mark.parametrize(
    ("answer", "close"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nhello", False),
        (
            b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nhe\r\n3;x=y\r\nllo\r\n0\r\ntrailer: x\r\n\r\n",
            False,
        ),
        (b"HTTP/1.0 200 OK\r\n\r\nhello", True),
        (b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nconnection: close\r\n\r\nhello", True),
    ],
)
async def test_framings(bench: Any, answer: bytes, close: bool, version: str) -> None:
    await bench.start()
    await bench.raw_upstream(answer, close=close)
    got = await raw_request(bench, request_bytes(version, "connection: close\r\n"))
    assert got.startswith(b"HTTP/1.1 200 OK\r\n")
    head, _, body = got.partition(b"\r\n\r\n")
    if b"transfer-encoding: chunked" in head.lower():
        assert version == "1.1"
        assert body.endswith((b"0\r\n\r\n", b"trailer: x\r\n\r\n"))
        assert body.replace(b"2\r\nhe\r\n3;x=y\r\nllo", b"5\r\nhello").startswith(b"5\r\nhello\r\n0\r\n")
    else:
        assert body == b"hello"
    if version == "1.1":
        async with bench.chat() as response:
            assert await response.read() == b"hello"


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\r\n\r\n",
        b"HTTP/1.1 200 OK\r\ncontent-length: x\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nx: " + b"y" * 100_000,
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: gzip\r\n\r\n",
    ],
)
async def test_an_upstream_that_speaks_no_http(bench: Any, answer: bytes) -> None:
    await bench.start()
    await bench.raw_upstream(answer)
    async with bench.chat() as response:
        assert response.status == 502
        assert (await response.json())["error"]["code"] == "upstream_unreachable"


async def test_pipelined_requests_are_answered_in_order(bench: Any) -> None:
    await bench.start()
    bench.serve("m", await bench.runtime(tokens=3))
    data = request_bytes(extra="x-request-id: one\r\n", stream=True) + request_bytes(
        extra="x-request-id: two\r\nconnection: close\r\n"
    )
    got = await raw_request(bench, data)
    assert got.count(b"HTTP/1.1 200 OK") == 2
    assert got.index(b"x-request-id: one") < got.index(b"[DONE]") < got.index(b"x-request-id: two")


async def test_an_upgrade_that_is_not_taken(bench: Any) -> None:
    """Java's client offers HTTP/2 in each request's header and goes on in HTTP/1.1 where it is not taken up."""
    await bench.start()
    bench.serve("m", await bench.runtime())
    offer = (
        "connection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"
    )
    reader, writer = await asyncio.open_connection("127.0.0.1", bench.gateway.port)
    for _ in range(2):
        writer.write(request_bytes(extra=offer))
        head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
        assert head.startswith(b"HTTP/1.1 200")
        length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
        assert b"from runtime" in await reader.readexactly(length)
    writer.close()


async def test_expect_continue(bench: Any) -> None:
    await bench.start()
    bench.serve("m", await bench.runtime())
    got = await raw_request(bench, request_bytes(extra="expect: 100-continue\r\nconnection: close\r\n"))
    assert got.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


async def test_a_connection_is_kept(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    made = 0

    async def count(*_: Any) -> None:
        nonlocal made
        made += 1

    trace = aiohttp.TraceConfig()
    trace.on_connection_create_end.append(count)
    async with aiohttp.ClientSession(trace_configs=[trace]) as client:
        for stream in (True, False, True, False):
            body = {"model": "m", "messages": [], "stream": stream}
            async with client.post(bench.url + "/v1/chat/completions", json=body) as response:
                await response.read()
    assert made == 1
    assert len(next(iter(bench.gateway.registry.models["default/m"].endpoints.values())).idle) == 1


async def test_usage_is_counted(bench: Any) -> None:
    runtime = await bench.runtime(tokens=30)
    await bench.start()
    bench.serve("m", runtime)
    async with bench.chat(stream=True, stream_options={"include_usage": True}) as response:
        await response.read()
    async with bench.chat() as response:
        await response.read()
    async with bench.client.get(bench.internal + "/metrics") as response:
        text = await response.text()
    assert 'kubeinfer_gateway:tokens_total{key="",kind="prompt",model="default/m"} 14.0' in text
    assert 'kubeinfer_gateway:tokens_total{key="",kind="completion",model="default/m"} 60.0' in text
    assert 'kubeinfer_gateway:requests_total{model="default/m",status="200"} 2.0' in text
    assert 'kubeinfer_gateway:requests_inflight{model="default/m"} 0.0' in text
    bench.gateway.registry.remove("default/m")
    async with bench.client.get(bench.internal + "/metrics") as response:
        assert "default/m" not in await response.text()


async def test_a_fault_of_the_gateways_own(
    bench: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    with monkeypatch.context() as patch:
        patch.setattr(bench.gateway.registry, "find", None)
        async with bench.chat(headers={"x-request-id": "abc"}) as response:
            assert response.status == 500
            assert (await response.json())["error"]["code"] == "internal_error"
    assert "request abc failed" in caplog.text
    async with bench.chat() as response:
        assert response.status == 200
    assert bench.gateway.proxy.bodies.held == 0


async def test_access_log(bench: Any, capsys: pytest.CaptureFixture[str]) -> None:
    runtime = await bench.runtime(tokens=4)
    await bench.start(access_log=True)
    bench.serve("m", runtime)
    async with bench.chat(
        stream=True, stream_options={"include_usage": True}, headers={"x-request-id": "abc"}
    ) as response:
        await response.read()
    async with bench.chat(model="none") as response:
        await response.read()
    await asyncio.sleep(0.05)
    first, second = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert first["request_id"] == "abc"
    assert (first["status"], first["model"], first["stream"]) == (200, "m", True)
    assert first["endpoint"] == f"127.0.0.1:{runtime.port}"
    assert (first["prompt_tokens"], first["completion_tokens"], first["tokens_exact"]) == (7, 4, True)
    assert first["duration_ms"] >= first["first_byte_ms"] > 0
    assert (second["status"], second["model"], second["error"]) == (404, "none", "model_not_found")
