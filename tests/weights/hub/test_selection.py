from __future__ import annotations

import pytest

from kubeinfer.weights.errors import FileNotFound, HubUnavailable
from kubeinfer.weights.selection import matches, select
from kubeinfer.weights.sources.base import RemoteFile

SIDE = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "README.md", "merges.txt"]


def files(*names: str) -> list[RemoteFile]:
    return [RemoteFile(n, 1) for n in names]


def names(chosen: list[RemoteFile]) -> set[str]:
    return {f.path for f in chosen}


@pytest.mark.parametrize(
    ("there", "wanted"),
    [
        (["model.safetensors", "pytorch_model.bin", "tf_model.h5", "onnx/model.onnx"], {"model.safetensors"}),
        (["pytorch_model.bin", "flax_model.msgpack", "training_args.bin"], {"pytorch_model.bin"}),
        (
            ["model-00001-of-00001.safetensors", "consolidated.safetensors"],
            {"model-00001-of-00001.safetensors"},
        ),
        (["consolidated.safetensors", "params.json"], {"consolidated.safetensors", "params.json"}),
        (["model.safetensors", "model.fp16.safetensors"], {"model.safetensors"}),
        (["model.safetensors", "original/consolidated.00.pth"], {"model.safetensors"}),
        (
            ["x-q4-00001-of-00002.gguf", "x-q4-00002-of-00002.gguf"],
            {"x-q4-00001-of-00002.gguf", "x-q4-00002-of-00002.gguf"},
        ),
        (["x.gguf", "mmproj-x.gguf", "logo.png"], {"x.gguf"}),
        (["model.safetensors", "x.gguf"], {"model.safetensors"}),
    ],
)
def test_default_choice(there: list[str], wanted: set[str]) -> None:
    assert names(select(files(*there, *SIDE, ".gitattributes"))) == wanted | set(SIDE)


def test_several_gguf_files_are_the_users_choice() -> None:
    there = files("a-q4.gguf", "a-q8.gguf", "config.json")
    with pytest.raises(FileNotFound, match=r"hf://o/n/a-q4\.gguf"):
        select(there, model="hf://o/n")
    assert names(select(there, file="a-q8.gguf")) == {"a-q8.gguf", "config.json"}
    assert names(select(there, include=["*q8*"])) == {"a-q8.gguf"}
    with pytest.raises(FileNotFound, match=r"has no file 'b\.gguf'"):
        select(there, file="b.gguf")


def test_patterns_replace_the_default() -> None:
    there = files("model.safetensors", "pytorch_model.bin", "sub/x.json", "config.json")
    assert names(select(there, include=["*.bin", "sub/"])) == {"pytorch_model.bin", "sub/x.json"}
    assert names(select(there, include=["*"], exclude=["*.safetensors"])) == {
        "pytorch_model.bin",
        "sub/x.json",
        "config.json",
    }
    # Without safetensors the other format is taken.
    assert names(select(there, exclude=["*.safetensors"])) >= {"pytorch_model.bin", "config.json"}
    assert names(select(there, weights=False)) == {"sub/x.json", "config.json"}
    with pytest.raises(FileNotFound, match=r"it has: model\.safetensors"):
        select(there, include=["*.gguf"])


@pytest.mark.parametrize("path", ["../evil", "/etc/passwd", "a/../../b", ".kubeinfer.json", "a\\..\\b"])
def test_paths_out_of_the_folder_are_refused(path: str) -> None:
    with pytest.raises(HubUnavailable, match="lead out"):
        select(files("config.json", path))


def test_globs() -> None:
    assert matches("a/b/c.json", ["*.json"])
    assert matches("a/b/c.json", ["a/"])
    assert matches("a/b/c.json", ["c.json"])
    assert not matches("a/b/c.json", ["b/"])
