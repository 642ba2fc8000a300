from __future__ import annotations

import json
from typing import Any

import httpx
import openai
import pytest

from api.running import Running

USER = {"role": "user", "content": "Hi"}


def chat(client: httpx.Client, **body: Any) -> Any:
    response = client.post("/v1/chat/completions", json={"messages": [USER], "max_tokens": 6, **body})
    assert response.status_code == 200, response.text
    return response.json()


def events(client: httpx.Client, **body: Any) -> list[Any]:
    response = client.post(
        "/v1/chat/completions", json={"messages": [USER], "max_tokens": 6, "stream": True, **body}
    )
    lines = [line[6:] for line in response.text.split("\n\n") if line.startswith("data: ")]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


def prompt_of(server: Running) -> str:
    ids = server.core.requests[-1].prompt_token_ids
    return str(server.engine.tokenizer.decode(ids, skip_special_tokens=False))


def test_answer(server: Running, client: httpx.Client) -> None:
    answer = chat(
        client,
        messages=[{"role": "system", "content": "Be brief."}, USER],
        max_tokens=None,
        max_completion_tokens=5,
    )
    assert prompt_of(server).endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert answer["object"] == "chat.completion"
    assert answer["choices"][0]["message"]["role"] == "assistant"
    assert answer["choices"][0]["message"]["content"].startswith(" The")
    assert answer["usage"]["completion_tokens"] == 5


def test_without_max_tokens_the_context_is_the_bound(client: httpx.Client) -> None:
    usage = chat(client, max_tokens=None)["usage"]
    assert usage["total_tokens"] == 512


def test_stream(client: httpx.Client) -> None:
    whole = chat(client)["choices"][0]["message"]["content"]
    found = events(client, n=2, stream_options={"include_usage": True})
    texts = ["", ""]
    for event in found[:-1]:
        choice = event["choices"][0]
        texts[choice["index"]] += choice["delta"]["content"]
    assert texts == [whole, whole]
    roles = [event["choices"][0]["delta"].get("role") for event in found[:-1]]
    assert roles.count("assistant") == 2
    assert found[-1]["usage"]["completion_tokens"] == 12
    assert found[0]["object"] == "chat.completion.chunk"


def test_logprobs(client: httpx.Client) -> None:
    choice = chat(client, logprobs=True, top_logprobs=2)["choices"][0]
    content = choice["logprobs"]["content"]
    assert len(content) == 6
    assert "".join(entry["token"] for entry in content) == choice["message"]["content"]
    assert all(len(entry["top_logprobs"]) == 2 for entry in content)
    assert bytes(content[0]["bytes"]).decode() == content[0]["token"]
    streamed = [
        entry
        for event in events(client, logprobs=True, top_logprobs=2)
        for entry in (event["choices"][0]["logprobs"] or {"content": []})["content"]
    ]
    assert streamed == content
    plain = chat(client, logprobs=True)["choices"][0]["logprobs"]["content"]
    assert all(entry["top_logprobs"] == [] for entry in plain)


def test_bytes_of_parts_of_a_character(client: httpx.Client) -> None:
    content = chat(client, logprobs=True, max_tokens=60)["choices"][0]["logprobs"]["content"]
    assert "你好" in b"".join(bytes(entry["bytes"]) for entry in content).decode("utf-8", "ignore")


def test_continuing_the_final_message(server: Running, client: httpx.Client) -> None:
    messages = [USER, {"role": "assistant", "content": "Once upon"}]
    answer = chat(client, messages=messages, continue_final_message=True, echo=True)
    assert prompt_of(server).endswith("<|im_start|>assistant\nOnce upon")
    assert answer["choices"][0]["message"]["content"].startswith("Once upon The")
    found = events(client, messages=messages, continue_final_message=True, echo=True)
    assert found[0]["choices"][0]["delta"] == {"role": "assistant", "content": "Once upon"}


def test_templates_of_the_request_are_for_trusted_clients(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    template = "{{ greeting }}:{% for m in messages %}{{ m['content'] }}{% endfor %}"
    given = {"messages": [USER], "chat_template": template, "chat_template_kwargs": {"greeting": "Dear"}}
    for path in ("/v1/chat/completions", "/tokenize"):
        refused = client.post(path, json=given)
        assert refused.status_code == 400
        assert "--trust-request-chat-template" in refused.json()["error"]["message"]
    monkeypatch.setattr(server.server.state.options, "trust_request_chat_template", True)
    chat(client, **given)
    assert prompt_of(server) == "Dear:Hi"
    assert client.post("/tokenize", json=given).status_code == 200
    broken = client.post("/v1/chat/completions", json=given | {"chat_template": "{% if %}"})
    assert (broken.status_code, broken.json()["error"]["param"]) == (400, "chat_template")


def test_parts_of_a_message(server: Running, client: httpx.Client) -> None:
    chat(
        client,
        messages=[
            {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
        ],
    )
    assert "a\nb" in prompt_of(server)


def test_a_long_conversation(server: Running, client: httpx.Client) -> None:
    messages = [{"role": "user", "content": "word " * 10_000}]
    chat(client, messages=messages, truncate_prompt_tokens=100)
    assert len(server.core.requests[-1].prompt_token_ids) == 100


def test_ids(client: httpx.Client) -> None:
    answer = chat(client, return_token_ids=True, prompt_logprobs=0)
    assert len(answer["prompt_token_ids"]) == answer["usage"]["prompt_tokens"]
    assert len(answer["choices"][0]["token_ids"]) == 6
    assert answer["prompt_logprobs"][0] is None
    found = events(client, return_token_ids=True)
    assert found[0]["prompt_token_ids"] == answer["prompt_token_ids"]


def test_other_fields_reach_the_engine(
    server: Running, client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.engine.input_processor, "_by_priority", True)
    chat(client, priority=3, cache_salt="mine", seed=5)
    request = server.core.requests[-1]
    assert (request.priority, request.cache_salt, request.seed) == (3, "mine", 5)


def test_tokenize(server: Running, client: httpx.Client) -> None:
    found = client.post("/tokenize", json={"prompt": "The quick fox", "return_token_strs": True}).json()
    assert found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert found["max_model_len"] == 512
    assert (
        client.post("/detokenize", json={"tokens": found["tokens"]})
        .json()["prompt"]
        .endswith("The quick fox")
    )
    found = client.post("/tokenize", json={"messages": [USER]}).json()
    chat(client)
    assert found["tokens"] == server.core.requests[-1].prompt_token_ids
    assert client.post("/tokenize", json={}).status_code == 400
    assert client.post("/detokenize", json={"tokens": [10**6]}).status_code == 400


def test_models_and_probes(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()["data"]
    assert [model["id"] for model in models] == ["scripted", "second:name"]
    assert models[0]["max_model_len"] == 512
    assert models[0]["default_sampling_params"] == {
        "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "max_tokens": None,
    }  # fmt: skip
    assert client.get("/v1/models/second:name").json()["id"] == "second:name"
    assert client.get("/health").status_code == 200
    assert client.get("/ping").status_code == 200
    assert client.post("/ping").status_code == 200
    assert client.get("/version").json()["version"]
    assert client.get("/load").json() == {"server_load": 0}
    paths = client.get("/openapi.json").json()["paths"]
    schema = paths["/v1/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert "min_p" in schema["properties"]


def test_metrics(client: httpx.Client) -> None:
    def value(name: str, labels: str = "") -> float:
        for line in client.get("/metrics").text.splitlines():
            if line.startswith(name + "{") and labels in line:
                return float(line.rsplit(" ", 1)[1])
        raise AssertionError(name)

    lengths = value("kubeinfer:request_success_total", 'finished_reason="length"')
    tokens = value("kubeinfer:generation_tokens_total")
    gaps = value("kubeinfer:inter_token_latency_seconds_count")
    chat(client, max_tokens=11)
    assert value("kubeinfer:request_success_total", 'finished_reason="length"') == lengths + 1
    assert value("kubeinfer:generation_tokens_total") == tokens + 11
    assert value("kubeinfer:inter_token_latency_seconds_count") == gaps + 10
    text = client.get("/metrics").text
    for name in (
        "num_requests_running", "num_requests_waiting", "kv_cache_usage_perc", "prefix_cache_queries_total",
        "prefix_cache_hits_total", "num_preemptions_total", "prompt_tokens_total",
    ):  # fmt: skip
        assert f'kubeinfer:{name}{{model_name="scripted"}}' in text, name
    for name in (
        "time_to_first_token", "e2e_request_latency", "request_queue_time", "request_prefill_time",
        "request_decode_time",
    ):  # fmt: skip
        assert value(f"kubeinfer:{name}_seconds_count") > 0, name
        assert f'kubeinfer:{name}_seconds_bucket{{le="+Inf",model_name="scripted"}}' in text
    assert "process_resident_memory_bytes" in text


def test_clients(server: Running) -> None:
    with openai.OpenAI(api_key="EMPTY", base_url=server.url + "/v1") as client:
        completion = client.chat.completions.create(
            model="scripted", messages=[{"role": "user", "content": "Hi"}], max_tokens=4, logprobs=True
        )
        assert completion.choices[0].message.content is not None
        assert completion.choices[0].logprobs is not None
        stream = client.chat.completions.create(
            model="scripted",
            messages=[{"role": "user", "content": "Hi"}],
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"top_k": 5, "repetition_penalty": 1.1},
        )
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == completion.choices[0].message.content
        assert chunks[-1].usage is not None
        with pytest.raises(openai.BadRequestError, match="temperature"):
            client.chat.completions.create(
                model="scripted", messages=[{"role": "user", "content": "Hi"}], temperature=-1
            )
