"""What a client gets for a request that cannot be served: OpenAI's shape, the right status, the field's name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from api.running import Running, running
from api.scripted import scripted_engine

CHAT = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
COMPLETION = {"prompt": "Hi", "max_tokens": 2}


def error_of(response: httpx.Response, status: int) -> dict[str, Any]:
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    return dict(error)


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": "ten"}, "max_tokens"),
        ({"max_tokens": 1.5}, "max_tokens"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -7}, "top_k"),
        ({"n": 0}, "n"),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, "logit_bias"),
        ({"stop": [1]}, "stop[0]"),
        ({"stop_token_ids": ["a"]}, "stop_token_ids[0]"),
        ({"seed": 2**70}, "seed"),
        ({"stream": "yes"}, "stream"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"stream": True, "stream_options": {"other": True}}, "stream_options.other"),
        ({"best_of": 3}, "best_of"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"structured_outputs": {"json": {}}}, "structured_outputs"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"tempreature": 1}, "tempreature"),
        ({"prompt_logprobs": 1000}, "prompt_logprobs"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"truncate_prompt_tokens": 0}, "truncate_prompt_tokens"),
    ],
)
@pytest.mark.parametrize(("path", "base"), [("completions", COMPLETION), ("chat/completions", CHAT)])
def test_bad_fields_are_named(
    client: httpx.Client, path: str, base: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    error = error_of(client.post(f"/v1/{path}", json={**base, **change}), 400)
    assert error["param"] == param
    assert param.split(".")[0].split("[")[0] in error["message"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"prompt": [[1], []]}, "prompt[1]"),
        ({"prompt": ["a", 5.5]}, "prompt[1]"),
        ({"prompt": [1, 999999]}, "prompt"),
        ({"prompt": "a " * 5000}, "prompt"),
        ({"prompt": "a", "suffix": "b"}, "suffix"),
        ({"prompt": "a", "logprobs": 500}, "logprobs"),
    ],
)
def test_bad_prompts(client: httpx.Client, body: dict[str, Any], param: str) -> None:
    assert error_of(client.post("/v1/completions", json=body), 400)["param"] == param


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": ["hi"]}, "messages[0]"),
        ({"messages": [{"content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "messages[0].content[0]",
        ),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens"),
        ({"chat_template": "{% if %}"}, "chat_template"),
        ({"add_generation_prompt": True, "continue_final_message": True}, "continue_final_message"),
        ({"modalities": ["audio"]}, "modalities"),
    ],
)
def test_bad_conversations(client: httpx.Client, change: dict[str, Any], param: str) -> None:
    assert error_of(client.post("/v1/chat/completions", json={**CHAT, **change}), 400)["param"] == param


def test_an_over_long_prompt_names_the_limit(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": [5] * 600, "max_tokens": 1}), 400)
    assert "600" in error["message"]
    # What clients look for, to shorten the prompt and ask again.
    assert "maximum context length is 512 tokens" in error["message"]
    assert error["code"] == "context_length_exceeded"
    assert "max_model_len" in error["message"]
    long = {"messages": [{"role": "user", "content": "a " * 5000}]}
    assert error_of(client.post("/v1/chat/completions", json=long), 400)["param"] == "messages"


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_tokens", 2**64), ("max_tokens", 1e300), ("min_tokens", 2**70), ("top_k", 2**70), ("seed", 2**70),
        ("priority", 2**70), ("priority", 5), ("stop_token_ids", [2**70]), ("truncate_prompt_tokens", 2**70),
    ],
)  # fmt: skip
def test_numbers_that_are_no_numbers_of_anything(client: httpx.Client, field: str, value: Any) -> None:
    assert error_of(client.post("/v1/completions", json={**COMPLETION, field: value}), 400)["param"] == field


def test_an_error_does_not_repeat_a_long_value(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={**COMPLETION, "stop": ["x" * 100_000] * 65})
    assert error_of(answer, 400)["param"] == "stop"
    assert len(answer.content) < 1000


def test_more_prompts_than_may_ever_wait(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", json={"prompt": ["a"] * 3000, "max_tokens": 1}), 400)
    assert error["param"] == "prompt"
    assert "max_waiting_requests" in error["message"]


@pytest.mark.parametrize("value", ["x\nERROR forged", "a b", "x" * 200])
def test_an_id_that_would_forge_a_log(client: httpx.Client, value: str) -> None:
    assert (
        error_of(client.post("/v1/completions", json={**COMPLETION, "request_id": value}), 400)["param"]
        == "request_id"
    )


@pytest.mark.parametrize(
    "content", [b"{", b"", b"nonsense", b"\xff\xfe", b'{"prompt": NaN}', b'{"prompt": "\xff"}']
)
def test_broken_json(client: httpx.Client, content: bytes) -> None:
    error = error_of(client.post("/v1/completions", content=content), 400)
    assert error["code"] == "invalid_json"
    assert "JSON" in error["message"]


@pytest.mark.parametrize("content", [b"[1]", b'"text"', b"[" * 100_000, b'{"prompt":' + b"[" * 100_000])
def test_bodies_of_another_kind(client: httpx.Client, content: bytes) -> None:
    error_of(client.post("/v1/completions", content=content), 400)


def test_whole_floats_count_as_integers(client: httpx.Client) -> None:
    answer = client.post("/v1/completions", json={**COMPLETION, "max_tokens": 3.0, "logit_bias": {"5": 1}})
    assert answer.json()["usage"]["completion_tokens"] == 3


def test_unknown_model(client: httpx.Client) -> None:
    error = error_of(client.post("/v1/completions", json={**COMPLETION, "model": "other"}), 404)
    assert error["code"] == "model_not_found"
    assert "scripted" in error["message"]
    assert "second:name" in error["message"]
    assert error_of(client.get("/v1/models/other"), 404)["code"] == "model_not_found"


def test_routes_that_are_not_there(client: httpx.Client) -> None:
    assert "/v1/nothing" in error_of(client.get("/v1/nothing"), 404)["message"]
    response = client.get("/v1/completions")
    assert "POST" in error_of(response, 405)["message"]
    assert response.headers["allow"] == "POST"


@pytest.mark.parametrize(
    "path", ["/v1/embeddings", "/v1/score", "/rerank", "/v1/rerank", "/pooling", "/classify"]
)
def test_pooling_calls_say_what_to_do(client: httpx.Client, path: str) -> None:
    error = error_of(client.post(path, json={"input": "x"}), 400)
    assert "The model does not support" in error["message"]
    assert "--runner pooling" in error["message"]


def test_other_apis(client: httpx.Client) -> None:
    assert "/v1/chat/completions" in error_of(client.post("/v1/responses", json={}), 404)["message"]
    assert error_of(client.post("/v1/audio/transcriptions"), 404)["code"] == "not_supported"


def test_a_body_of_100_mb(server: Running, client: httpx.Client) -> None:
    import psutil

    before = psutil.Process().memory_info().rss

    def body() -> Iterator[bytes]:
        for _ in range(100):
            yield b"x" * 1_000_000

    error = error_of(client.post("/v1/completions", content=body()), 413)
    assert "--max-request-bytes" in error["message"]
    assert psutil.Process().memory_info().rss - before < 60e6
    # the same, announced beforehand
    error_of(client.post("/v1/completions", content=b"x" * 20_000_000), 413)
    assert client.post("/v1/completions", json=COMPLETION).status_code == 200


def test_harmless_fields_are_taken(client: httpx.Client) -> None:
    notes = {
        "user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto", "safety_identifier": "x",
        "prompt_cache_key": "k", "response_format": {"type": "text"}, "best_of": 1, "length_penalty": 1.0,
    }  # fmt: skip
    more = {"tool_choice": "none", "tools": [], "parallel_tool_calls": True, "modalities": ["text"]}
    assert client.post("/v1/completions", json={**COMPLETION, **notes}).status_code == 200
    assert client.post("/v1/chat/completions", json={**CHAT, **notes, **more}).status_code == 200


@pytest.fixture(scope="module")
def locked(folder: Any) -> Iterator[httpx.Client]:
    with (
        running(
            scripted_engine(folder, delay=0.02),
            api_key=["one", "two"],
            max_waiting_requests=1,
            root_path="/models/smol",
        ) as server,
        httpx.Client(base_url=server.url, timeout=20) as client,
    ):
        yield client


def test_api_keys(locked: httpx.Client) -> None:
    for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
        response = locked.post("/v1/completions", json=COMPLETION, headers=headers)
        assert error_of(response, 401)["code"] == "invalid_api_key"
        assert response.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two"):
        headers = {"authorization": f"Bearer {key}"}
        assert locked.post("/v1/completions", json=COMPLETION, headers=headers).status_code == 200
    for path in ("/health", "/ping", "/version", "/metrics", "/"):
        assert locked.get(path).status_code == 200
    assert locked.get("/v1/models").status_code == 401
    assert locked.get("/load").status_code == 401


def test_a_full_queue(locked: httpx.Client) -> None:
    headers = {"authorization": "Bearer one"}
    body = {"prompt": "Hi", "max_tokens": 100, "stream": True}
    with locked.stream("POST", "/v1/completions", json=body, headers=headers) as first:
        assert first.status_code == 200
        response = locked.post("/v1/completions", json=COMPLETION, headers=headers)
        error_of(response, 429)
        assert int(response.headers["retry-after"]) >= 1
        assert locked.get("/load", headers=headers).json() == {"server_load": 1}


def test_root_path(locked: httpx.Client) -> None:
    base = str(locked.base_url).rstrip("/").removesuffix("/models/smol")
    headers = {"authorization": "Bearer one"}
    for prefix in ("", "/models/smol"):
        assert httpx.get(f"{base}{prefix}/v1/models", headers=headers).status_code == 200
        assert httpx.get(f"{base}{prefix}/v1/models").status_code == 401
        assert httpx.get(f"{base}{prefix}/health").status_code == 200


def test_cors_and_request_ids(client: httpx.Client) -> None:
    headers = {"origin": "http://elsewhere", "access-control-request-method": "POST"}
    assert client.options("/v1/completions", headers=headers).headers["access-control-allow-origin"] == "*"
    response = client.post(
        "/v1/completions", json=COMPLETION, headers={"x-request-id": "mine-1", "origin": "http://a"}
    )
    assert response.headers["x-request-id"] == "mine-1"
    assert response.headers["access-control-allow-origin"] == "*"
    assert response.json()["id"] == "cmpl-mine-1"
    assert client.post("/v1/completions", json={**COMPLETION, "request_id": "r"}).json()["id"] == "cmpl-r"
    assert len(client.get("/nowhere").headers["x-request-id"]) == 32
    assert client.get("/health", headers={"x-request-id": "a" * 500}).headers["x-request-id"] != "a" * 500
