from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from api.running import Running


def events(response: httpx.Response) -> list[Any]:
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def complete(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/v1/completions", json={"model": "scripted", **body})
    assert response.status_code == 200, response.text
    return response.json()


def test_completion(client: httpx.Client) -> None:
    answer = complete(client, prompt="Hello", max_tokens=8)
    assert answer["object"] == "text_completion"
    assert answer["model"] == "scripted"
    assert answer["choices"][0]["text"].startswith(" The quick")
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == usage["prompt_tokens"] + 8
    assert usage["prompt_tokens_details"] == {"cached_tokens": 1}


def test_stream_gives_the_same_text(client: httpx.Client) -> None:
    whole = complete(client, prompt="Hello", max_tokens=60)["choices"][0]["text"]
    body = {"model": "scripted", "prompt": "Hello", "max_tokens": 60, "stream": True}
    response = client.post("/v1/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    found = events(response)
    assert "".join(event["choices"][0]["text"] for event in found) == whole
    assert [event["choices"][0]["finish_reason"] for event in found][-1] == "length"
    assert all(event["choices"][0]["finish_reason"] is None for event in found[:-1])
    assert "usage" not in found[0]
    assert "你好" in whole


def test_usage_in_streams(client: httpx.Client) -> None:
    body: dict[str, Any] = {"prompt": [1, 2, 3], "max_tokens": 5, "stream": True}
    found = events(client.post("/v1/completions", json={**body, "stream_options": {"include_usage": True}}))
    assert found[-1]["choices"] == []
    assert found[-1]["usage"]["completion_tokens"] == 5
    assert found[-1]["usage"]["prompt_tokens"] == 3
    assert found[0]["usage"] is None
    options = {"include_usage": True, "continuous_usage_stats": True}
    found = events(client.post("/v1/completions", json={**body, "stream_options": options}))
    counts = [event["usage"]["completion_tokens"] for event in found]
    assert counts == sorted(counts)
    assert counts[-1] == 5


def test_batches_and_n(client: httpx.Client) -> None:
    answer = complete(client, prompt=["a", [5, 6], "b"], n=2, max_tokens=4)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert answer["usage"]["completion_tokens"] == 24
    body = {"prompt": ["a", "b"], "n": 2, "max_tokens": 4, "stream": True}
    texts: dict[int, str] = {}
    for event in events(client.post("/v1/completions", json=body)):
        choice = event["choices"][0]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    assert sorted(texts) == [0, 1, 2, 3]
    assert len(set(texts.values())) == 1


def test_echo_and_logprobs(client: httpx.Client) -> None:
    answer = complete(client, prompt="Hello you", echo=True, logprobs=2, max_tokens=3)
    choice = answer["choices"][0]
    assert choice["text"].startswith("Hello you The")
    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"][0] is None
    assert logprobs["top_logprobs"][0] is None
    assert len(logprobs["tokens"]) == answer["usage"]["total_tokens"]
    assert "".join(logprobs["tokens"][-3:]) == choice["text"].removeprefix("Hello you")
    assert "".join(logprobs["tokens"]) == choice["text"]
    assert logprobs["text_offset"] == [
        len("".join(logprobs["tokens"][:i])) for i in range(len(logprobs["tokens"]))
    ]
    body = {"prompt": "Hello you", "echo": True, "logprobs": 2, "max_tokens": 3, "stream": True}
    found = events(client.post("/v1/completions", json=body))
    assert found[0]["choices"][0]["text"] == "Hello you"
    tokens: list[str] = []
    offsets: list[int] = []
    for event in found:
        part = event["choices"][0]["logprobs"]
        tokens += part["tokens"]
        offsets += part["text_offset"]
    assert tokens == logprobs["tokens"]
    assert offsets == logprobs["text_offset"]


def test_scoring_a_prompt_without_generating(client: httpx.Client) -> None:
    answer = complete(client, prompt="Hello you", echo=True, logprobs=1, max_tokens=0)
    assert answer["choices"][0]["text"] == "Hello you"
    assert answer["usage"]["completion_tokens"] == 0
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == answer["usage"]["prompt_tokens"]
    assert "".join(logprobs["tokens"]) == "Hello you"


def test_stop_strings(client: httpx.Client) -> None:
    choice = complete(client, prompt="Hello", stop=["fox", "dog"], max_tokens=50)["choices"][0]
    assert choice["text"] == " The quick brown "
    assert choice["finish_reason"] == "stop"
    assert choice["stop_reason"] == "fox"
    choice = complete(client, prompt="Hello", stop="fox", include_stop_str_in_output=True, max_tokens=50)[
        "choices"
    ][0]
    assert choice["text"] == " The quick brown fox"


def test_ids_in_answers(client: httpx.Client) -> None:
    choice = complete(
        client,
        prompt=[9, 8],
        max_tokens=3,
        return_token_ids=True,
        return_tokens_as_token_ids=True,
        logprobs=0,
    )["choices"][0]
    assert choice["prompt_token_ids"] == [9, 8]
    assert choice["logprobs"]["tokens"] == [f"token_id:{i}" for i in choice["token_ids"]]
    body = {"prompt": [9, 8], "max_tokens": 3, "return_token_ids": True, "stream": True, "prompt_logprobs": 1}
    found = events(client.post("/v1/completions", json=body))
    assert found[0]["choices"][0]["prompt_token_ids"] == [9, 8]
    assert found[0]["choices"][0]["prompt_logprobs"][0] is None
    assert [i for event in found[1:] for i in event["choices"][0]["token_ids"]] == choice["token_ids"]


def test_every_sampling_field_reaches_the_engine(server: Running, client: httpx.Client) -> None:
    sampling = {
        "temperature": 0.5, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "repetition_penalty": 1.1, "seed": 3,
        "presence_penalty": 0.1, "frequency_penalty": 0.2, "stop_token_ids": [4], "ignore_eos": True, "min_tokens": 1,
        "skip_special_tokens": False, "spaces_between_special_tokens": False, "truncate_prompt_tokens": 2,
        "allowed_token_ids": [5, 6], "bad_words": ["x"], "n": 2, "prompt_logprobs": 1, "max_tokens": 2,
        "logit_bias": {"5": 1.5},
    }  # fmt: skip
    complete(client, prompt="Hello", **sampling)
    params = server.core.requests[-1].params
    for name, value in sampling.items():
        expected = {5: 1.5} if name == "logit_bias" else value
        assert getattr(params, name) == expected, name


def test_openai_client(server: Running) -> None:
    with openai.OpenAI(api_key="EMPTY", base_url=server.url + "/v1") as client:
        assert [model.id for model in client.models.list().data] == ["scripted", "second:name"]
        completion = client.completions.create(model="second:name", prompt="Hi", max_tokens=4)
        assert completion.choices[0].text.startswith(" The")
        chunks = list(client.completions.create(model="scripted", prompt="Hi", max_tokens=4, stream=True))
        assert chunks[-1].choices[0].finish_reason == "length"
        with pytest.raises(openai.NotFoundError, match="scripted"):
            client.completions.create(model="other", prompt="Hi")
