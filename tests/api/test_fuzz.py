"""Whatever stands in a request's fields, the answer is an answer or a refusal that names a field; never a 500."""

from __future__ import annotations

import random
from typing import Any

import httpx
import msgspec
import pytest

from api.running import Running
from kubeinfer.api.legacy import GenerateRequest
from kubeinfer.api.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)

VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 7, 511, 512, 513, 10**6, 2**63, -(2**63), 2**80, 0.5, -0.5, 1e308, 1.0, "", "a", "auto",
    "none", "\x00", "{{ 1 / 0 }}", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ x.y.z }}", "𝄞你好", [], [[]], [0],
    [1, 2], [-1], [512], [None], ["a"], [""], ["a", "b"], [[1], "a"], [{}], {}, {"a": 1}, {"1": 2}, {"1": -500},
    {"type": "text"}, {"type": "json_object"}, {"include_usage": True}, [{"role": "user", "content": "x"}],
    [{"role": "user", "content": ["x", {"type": "text", "text": "y"}]}], [{"role": 5}], [{"role": "assistant"}],
]  # fmt: skip
ROUTES: list[tuple[str, type[msgspec.Struct], dict[str, Any]]] = [
    ("/v1/completions", CompletionRequest, {"prompt": "Hi", "max_tokens": 2}),
    (
        "/v1/chat/completions",
        ChatCompletionRequest,
        {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2},
    ),
    ("/generate", GenerateRequest, {"prompt": "Hi", "max_tokens": 2}),
    ("/tokenize", TokenizeRequest, {"prompt": "Hi"}),
    ("/detokenize", DetokenizeRequest, {"tokens": [1]}),
]


@pytest.mark.parametrize(("path", "body_type", "base"), ROUTES)
def test_fields(
    server: Running, client: httpx.Client, path: str, body_type: type[msgspec.Struct], base: dict[str, Any]
) -> None:
    rng = random.Random(5)
    names = [field.name for field in msgspec.structs.fields(body_type)]
    bodies = [base | {name: value} for name in names for value in rng.sample(VALUES, 8)]
    bodies += [
        base | {name: rng.choice(VALUES) for name in rng.sample(names, min(4, len(names)))}
        for _ in range(150)
    ]
    statuses: list[int] = []
    for body in bodies:
        if body.get("n") in (511, 512, 513):
            body["n"] = 3
        if body.get("max_tokens") is None:
            body["max_tokens"] = 2
        if path in ("/tokenize", "/detokenize"):
            body.pop("max_tokens")
        content = msgspec.json.encode(body) if 2**80 not in body.values() else None
        response = client.post(path, content=content) if content is not None else client.post(path, json=body)
        assert response.status_code in (200, 400, 404), (body, response.text)
        statuses.append(response.status_code)
        if response.status_code == 400:
            error = response.json()["error"]
            assert error["param"] or error["code"] == "invalid_json", (body, error)
        elif response.status_code == 200 and "text/event-stream" in response.headers["content-type"]:
            assert response.text.endswith("data: [DONE]\n\n")
            assert '"error"' not in response.text, (body, response.text)
    assert statuses.count(200) >= 1
    assert statuses.count(400) >= 3
    server.wait_until(lambda: not server.core.live)
    assert server.engine.num_unfinished == 0
    assert server.server.state.in_flight == 0
