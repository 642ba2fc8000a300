"""Parsers against the standard library's and httptools' on arbitrary input."""

from __future__ import annotations

import json
from typing import Any

import httptools
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kubeinfer_gateway.body import read_body
from kubeinfer_gateway.errors import GatewayError
from kubeinfer_gateway.http1 import ChunkedBody, ProtocolError, encode_chunk, parse_head
from kubeinfer_gateway.keys import parse_entries
from kubeinfer_gateway.usage import Usage, read_usage

text = st.text(st.characters(codec=None), max_size=20)
scalar = st.none() | st.booleans() | st.integers() | st.floats() | text
value = st.recursive(
    scalar,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)
known = st.sampled_from(
    ["model", "stream", "messages", "prompt", "input", "query", "text_1", "models", "Model"]
)
members = st.lists(st.tuples(known | text, value | st.text(max_size=8)), max_size=8)


def as_json(pairs: list[tuple[str, Any]], escape: bool, spaces: str) -> bytes:
    """An object whose keys may repeat, with or without escapes."""
    parts = [
        json.dumps(key, ensure_ascii=escape) + spaces + ":" + spaces + json.dumps(item, ensure_ascii=escape)
        for key, item in pairs
    ]
    body = "{" + spaces + ("," + spaces).join(parts) + spaces + "}" + spaces
    return body.encode("utf-8", "surrogatepass")


@given(members, st.booleans(), st.sampled_from(["", " ", "\n\t "]))
@settings(max_examples=400, deadline=None)
@example([("model", "a"), ("model", "b")], True, "")
@example([("x", float("nan")), ("model", "m")], True, "")
@example([("x", "\ud800"), ("model", "m")], True, "")
@example([("model", 3), ("model", "m")], True, " ")
@example([("model", "m"), ("model", None)], True, " ")
@example([("stream", True), ("stream", False), ("model", "m")], True, " ")
def test_model_and_stream_are_what_json_loads_reads(
    pairs: list[tuple[str, Any]], escape: bool, spaces: str
) -> None:
    body = as_json(pairs, escape, spaces)
    try:
        expected = json.loads(body)
    except ValueError:
        with pytest.raises(GatewayError):
            read_body(body)
        return
    model = expected.get("model")
    if "model" in expected and not isinstance(model, str):
        with pytest.raises(GatewayError) as caught:
            read_body(body)
        assert caught.value.status == 400
        return
    found = read_body(body)
    assert found.model == model
    assert found.stream == (expected.get("stream") is True)
    assert isinstance(found.prefix(64), bytes)
    assert len(found.prefix(64)) <= 64


@given(st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
@settings(max_examples=300)
def test_any_bytes_are_read_or_refused(body: bytes) -> None:
    try:
        found = read_body(body)
    except GatewayError:
        return
    assert found.model is None or isinstance(found.model, str)


def test_a_key_with_escapes() -> None:
    assert read_body(b'{"mod\\u0065l": "\\u006d", "str\\u0065am": true}').model == "m"
    assert read_body(b'{"mod\\u0065l": "\\u006d", "str\\u0065am": true}').stream


def test_big_bodies_are_read_fast() -> None:
    import time

    message = {"role": "user", "content": "word " * 200}
    body = json.dumps({"messages": [message] * 10_000, "stream": True, "model": "m"}).encode()
    assert len(body) > 10_000_000
    begin = time.process_time()
    found = read_body(body)
    assert (found.model, found.stream) == ("m", True)
    assert found.prefix(1000).startswith(b'"user"')
    assert time.process_time() - begin < 0.5
    deep = b'{"model": "m", "x": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"
    with pytest.raises(GatewayError):
        read_body(deep)


def test_the_prefix_of_a_conversation_stays() -> None:
    system = {"role": "system", "content": "You are kind."}
    first = {"role": "user", "content": "Hello"}
    turns = [system, first, {"role": "assistant", "content": "Hi"}, {"role": "user", "content": "More"}]
    bodies = [json.dumps({"model": "m", "messages": turns[:count]}).encode() for count in (2, 3, 4)]
    assert len({read_body(body).prefix(1000) for body in bodies}) == 1
    other = json.dumps({"model": "m", "messages": [system, {"role": "user", "content": "Bye"}]}).encode()
    assert read_body(other).prefix(1000) != read_body(bodies[0]).prefix(1000)
    assert read_body(other).prefix(15) == read_body(bodies[0]).prefix(15)
    assert read_body(b'{"prompt": [1, 2, 3]}').prefix(4) == b"[1, "
    assert read_body(b'{"input": "abc"}').prefix(100) == b'"abc"'


# Chunked bodies


class _Reference:
    """httptools' reading of a response."""

    def __init__(self) -> None:
        self.body = b""
        self.complete = False

    def on_body(self, data: bytes) -> None:
        self.body += data

    def on_message_complete(self) -> None:
        self.complete = True


@given(
    st.lists(st.binary(min_size=1, max_size=300), max_size=12),
    st.lists(st.integers(1, 120), max_size=60),
    st.booleans(),
    st.sampled_from([b"", b";ext=1", b";a=b;c"]),
    st.sampled_from([b"", b"x-trailer: 1\r\n", b"a: b\r\nc: d\r\n"]),
)
@settings(max_examples=400, deadline=None)
def test_chunked_bodies_end_where_httptools_says(
    pieces: list[bytes], cuts: list[int], decode: bool, extension: bytes, trailers: bytes
) -> None:
    body = b"".join(b"%x%b\r\n%b\r\n" % (len(piece), extension, piece) for piece in pieces)
    body += b"0\r\n" + trailers + b"\r\n"
    reference = _Reference()
    parser = httptools.HttpResponseParser(reference)
    parser.feed_data(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n" + body)
    assert reference.complete

    payload: list[bytes] | None = [] if decode else None
    chunked = ChunkedBody(payload)
    position = 0
    cuts = cuts or [len(body)]
    stream = body + b"EXCESS"
    while position < len(stream):
        cut = cuts.pop(0) if cuts else 7
        data = stream[position : position + cut]
        end = chunked.feed(data)
        if end is not None:
            assert position + end == len(body)
            break
        assert position + len(data) < len(body) + len(b"EXCESS")
        position += len(data)
    assert chunked.complete
    if payload is not None:
        assert b"".join(payload) == reference.body


@given(st.binary(max_size=100))
def test_any_bytes_are_chunks_or_refused(data: bytes) -> None:
    try:
        ChunkedBody([]).feed(data)
    except ProtocolError:
        pass


@pytest.mark.parametrize("size", [b"0x5", b"+5", b"-1", b"5 5", b"", b"1_0", b"g"])
def test_odd_chunk_sizes_are_refused(size: bytes) -> None:
    with pytest.raises(ProtocolError):
        ChunkedBody().feed(size + b"\r\nhello\r\n")


def test_boundaries() -> None:
    chunked = ChunkedBody()
    assert chunked.at_boundary
    chunked.feed(b"5\r\nhel")
    assert not chunked.at_boundary
    chunked.feed(b"lo\r\n")
    assert chunked.at_boundary
    chunked.feed(b"5")
    assert not chunked.at_boundary
    assert encode_chunk(b"hello") == b"5\r\nhello\r\n"


@given(st.binary(max_size=200))
def test_any_head_is_read_or_refused(data: bytes) -> None:
    for head in (data, b"HTTP/1.1 200 OK\r\n" + data):
        try:
            parse_head(head)
        except ProtocolError:
            pass


def test_heads() -> None:
    head = parse_head(b"HTTP/1.1 404 Not Found\r\nContent-Length:  12 \r\nConnection: Foo, Close\r\nX: a:b")
    assert (head.status, head.length, head.chunked, head.keep_alive) == (404, 12, False, False)
    assert head.get(b"x") == b"a:b"
    both = parse_head(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ntransfer-encoding: Chunked")
    assert (both.length, both.chunked) == (None, True)
    assert parse_head(b"HTTP/1.1 204 No Content").length == 0
    assert parse_head(b"HTTP/1.0 200 OK\r\nconnection: keep-alive").keep_alive
    with pytest.raises(ProtocolError):
        parse_head(b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6")


# Usage


@given(st.integers(0, 10**9), st.integers(0, 10**9), st.sampled_from(["", " ", "\n"]), st.booleans())
def test_usage(prompt: int, completion: int, spaces: str, details: bool) -> None:
    usage: dict[str, Any] = {"prompt_tokens": prompt, "completion_tokens": completion}
    if details:
        usage["prompt_tokens_details"] = {"cached_tokens": 5}
    text = json.dumps({"choices": [{"text": '"usage": {'}], "usage": usage}).replace(
        '"usage"', spaces + '"usage"' + spaces
    )
    assert read_usage(text.encode()) == Usage(prompt, completion)
    events = b'data: {"usage": null}\n\ndata: ' + text.encode() + b"\n\ndata: [DONE]\n\n"
    assert read_usage(events) == Usage(prompt, completion)


@given(st.binary(max_size=200))
def test_usage_of_anything(data: bytes) -> None:
    read_usage(data)
    read_usage(b'"usage": {' + data)


def test_usage_of_other_routes() -> None:
    assert read_usage(b'{"usage":{"prompt_tokens":4,"total_tokens":4}}') == Usage(4, 0)
    assert read_usage(b'{"usage":{"total_tokens":4}}') == Usage(4, 0)
    assert read_usage(b'{"usage":{"input_tokens":4,"output_tokens":2}}') == Usage(4, 2)
    assert read_usage(b'{"usage":null}') is None


# Key entries


@given(st.binary(max_size=80))
def test_any_entry_is_read_or_reported(data: bytes) -> None:
    entries, problems = parse_entries({"file": data})
    assert bool(problems) or entries is not None


def test_entries() -> None:
    good = json.dumps({"name": "a", "sha256": "0" * 64})
    entries, problems = parse_entries(
        {
            "one": good.encode(),
            "list": f"[{good},{good}]".encode(),
            "bad": b'{"name": "x"}',
            "typo": good[:-1].encode() + b',"modles":[]}',
        }
    )
    assert len(entries) == 3
    assert [problem.split(":")[0] for problem in problems] == ["bad", "typo"]
