"""What passes through: bytes, streams, headers, errors."""

from __future__ import annotations

import json
from typing import Any


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


async def test_body_is_unchanged(bench: Any) -> None:
    runtime = await bench.runtime()
    await bench.start()
    bench.serve("m", runtime)
    body = b'{ "x":1e0,\n "model" : "m" , "model":"\\u006d", "messages":[]}  '
    async with bench.client.post(bench.url + "/v1/chat/completions?a=b%20c", data=body) as response:
        assert response.status == 200
        assert (await response.json())["choices"][0]["message"]["content"] == "from runtime"
    assert runtime.requests[0]["body"] == body
    assert runtime.requests[0]["path"] == "/v1/chat/completions?a=b%20c"
    assert json.loads(body)["model"] == "m"
