from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kubeinfer.weights.errors import InvalidModelId
from kubeinfer.weights.uri import ModelSource, looks_like_path, parse

SHA = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Qwen/Qwen3-0.6B", ModelSource("hf", repo="Qwen/Qwen3-0.6B")),
        ("Qwen/Qwen3-0.6B@refs/pr/3", ModelSource("hf", repo="Qwen/Qwen3-0.6B", revision="refs/pr/3")),
        (f"hf://a/b@{SHA}", ModelSource("hf", repo="a/b", revision=SHA)),
        ("huggingface://a/b", ModelSource("hf", repo="a/b")),
        ("modelscope://a/b@v1.0", ModelSource("modelscope", repo="a/b", revision="v1.0")),
        ("hf://a/b/q4/x.gguf@main", ModelSource("hf", repo="a/b", file="q4/x.gguf", revision="main")),
        ("a/b/x.gguf", ModelSource("hf", repo="a/b", file="x.gguf")),
        ("file:///models/x/", ModelSource("file", path="/models/x")),
        ("/models/x", ModelSource("file", path="/models/x")),
        ("./x", ModelSource("file", path="./x")),
        ("x.gguf", ModelSource("file", path="x.gguf")),
        ("pvc://claim/dir/model", ModelSource("pvc", claim="claim", path="dir/model")),
        ("pvc://claim", ModelSource("pvc", claim="claim")),
    ],
)
def test_forms(text: str, expected: ModelSource) -> None:
    assert parse(text) == expected
    if expected.scheme != "file":
        assert parse(str(expected)) == expected


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("", "no model given"),
        ("qwen", "ORG/NAME"),
        ("a/b@", "after '@'"),
        ("a/b/c", "hf://a/b/c"),
        ("a//b", "ORG/NAME"),
        ("-a/b", "'-a'"),
        ("a/b--c", "'b--c'"),
        ("hf://a/../b", "'..'"),
        ("hf://a/b/../x.gguf", "'..'"),
        ("a/b@-x", "'-x'"),
        ("a/b@x..y", "'x..y'"),
        ("s3://a/b", "unknown scheme 's3'"),
        ("file://models/x", "three slashes"),
        ("pvc://UPPER/x", "PersistentVolumeClaim"),
        ("pvc://claim/../x", "'..'"),
    ],
)
def test_malformed(text: str, part: str) -> None:
    with pytest.raises(InvalidModelId) as caught:
        parse(text)
    assert isinstance(caught.value, ValueError)
    assert caught.value.reason == "InvalidModelId"
    assert part in caught.value.message


@pytest.mark.parametrize("value", ["True", "1", "true"])
def test_modelscope_is_the_default_by_environment(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEINFER_USE_MODELSCOPE", value)
    assert parse("a/b").scheme == "modelscope"
    assert parse("hf://a/b").scheme == "hf"
    monkeypatch.setenv("KUBEINFER_USE_MODELSCOPE", "False")
    assert parse("a/b").scheme == "hf"


def test_an_existing_folder_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert parse("org/name") == ModelSource("file", path="org/name")
    assert parse("org/other").scheme == "hf"


def test_revision_is_given_once() -> None:
    assert parse("a/b").with_revision("v1").revision == "v1"
    assert parse("a/b@v1").with_revision("v1").revision == "v1"
    with pytest.raises(InvalidModelId, match="give the revision once"):
        parse("a/b@v1").with_revision("v2")


def test_paths_are_told_from_ids() -> None:
    assert all(looks_like_path(t) for t in ("/a", "./a", "../a", "~/a", "a.gguf", "dir/a.gguf", "."))
    assert not any(looks_like_path(t) for t in ("a/b", "org/name/a.gguf", "hf://a/b/x.gguf"))


@given(st.text(max_size=60))
def test_any_text_parses_or_is_refused(text: str) -> None:
    try:
        source = parse(text)
    except InvalidModelId:
        return
    if source.is_hub:
        assert source.repo.count("/") == 1
        assert ".." not in source.repo
        assert parse(str(source)) == source
