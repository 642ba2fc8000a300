"""Safetensors and PyTorch checkpoints: every layout gives the same tensors, and damage is named."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fixtures.tiny_models import tiny_model
from kubeinfer.errors import ModelLoadError
from kubeinfer.weights.readers import checkpoint_size, find_checkpoint, iterate_tensors


@pytest.fixture
def copy(tmp_path: Path):
    def copy(name: str, layout: str) -> Path:
        return Path(shutil.copytree(tiny_model(name, layout=layout), tmp_path / f"{name}-{layout}"))

    return copy


def read(path: Path, **kwargs) -> dict[str, torch.Tensor]:
    pairs = [(name, tensor.clone()) for name, tensor in iterate_tensors(path, **kwargs)]
    assert len({name for name, _ in pairs}) == len(pairs)
    return dict(pairs)


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "bin-sharded"])
def test_every_layout_gives_the_models_tensors(layout):
    expected = load_file(tiny_model("llama") / "model.safetensors")
    got = read(tiny_model("llama", layout=layout))
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(got[name], tensor), name


def test_wanted_and_dtype():
    folder = tiny_model("qwen2")
    asked = []

    def wanted(name: str) -> bool:
        asked.append(name)
        return ".layers.1." in name

    got = read(folder, wanted=wanted, dtype=torch.bfloat16)
    expected = load_file(folder / "model.safetensors")
    assert set(asked) == set(expected)
    assert set(got) == {name for name in expected if ".layers.1." in name}
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in got.items())


def test_integers_keep_their_type(tmp_path):
    save_file({"w": torch.ones(3), "ids": torch.arange(3)}, tmp_path / "model.safetensors")
    got = read(tmp_path, dtype=torch.float16)
    assert got["w"].dtype == torch.float16
    assert got["ids"].dtype == torch.int64


def test_one_file_may_be_given_and_its_size_is_known():
    file = tiny_model("llama") / "model.safetensors"
    assert read(file).keys() == read(file.parent).keys()
    assert checkpoint_size(file) == checkpoint_size(file.parent) == file.stat().st_size
    sharded = tiny_model("llama", layout="sharded")
    assert checkpoint_size(sharded) == sum(f.stat().st_size for f in sharded.glob("*.safetensors"))


def test_legacy_torch_format_and_nested_state(tmp_path):
    weights = {"a": torch.randn(4, 3), "b": torch.randn(2)}
    torch.save({"state_dict": weights}, tmp_path / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    got = read(tmp_path)
    assert got.keys() == weights.keys()
    assert all(torch.equal(got[name], weights[name]) for name in weights)


def test_safetensors_come_before_other_formats(copy):
    folder = copy("llama", "safetensors")
    shutil.copy(tiny_model("llama-tied", layout="bin") / "pytorch_model.bin", folder)
    assert find_checkpoint(folder).format == "safetensors"
    assert find_checkpoint(folder, "pt").files == (folder / "pytorch_model.bin",)


def test_a_publishers_own_layout_is_left_alone(copy):
    folder = copy("llama", "sharded")
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(tiny_model("llama") / "model.safetensors", folder / "consolidated.safetensors")
    torch.save({}, folder / "training_args.bin")
    assert len(read(folder)) == len(load_file(tiny_model("llama") / "model.safetensors"))


def fails(path: Path, *parts: str, **kwargs) -> None:
    with pytest.raises(ModelLoadError) as caught:
        read(path, **kwargs)
    for part in parts:
        assert part in str(caught.value)


@pytest.mark.parametrize("layout", ["safetensors", "sharded", "bin", "bin-sharded"])
@pytest.mark.parametrize("keep", [0.0, 0.001, 0.3, 0.99])
def test_truncated_files_are_named(copy, layout, keep):
    folder = copy("llama", layout)
    victim = sorted(f for f in folder.iterdir() if f.suffix in (".safetensors", ".bin"))[-1]
    data = victim.read_bytes()
    victim.write_bytes(data[: int(len(data) * keep)])
    fails(folder, str(victim), "download it again")


@pytest.mark.parametrize(("layout", "suffix"), [("sharded", ".safetensors"), ("bin-sharded", ".bin")])
@pytest.mark.parametrize("with_index", [True, False])
def test_a_missing_shard_is_named(copy, layout, suffix, with_index):
    folder = copy("llama", layout)
    victim = sorted(folder.glob(f"*{suffix}"))[1]
    victim.unlink()
    if not with_index:
        next(folder.glob("*.index.json")).unlink()
    fails(folder, str(victim), "missing")


@pytest.mark.parametrize("layout", ["sharded", "bin-sharded"])
def test_an_index_with_a_tensor_that_no_shard_has(copy, layout):
    folder = copy("llama", layout)
    index = next(folder.glob("*.index.json"))
    content = json.loads(index.read_text())
    file = next(iter(content["weight_map"].values()))
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = file
    index.write_text(json.dumps(content))
    fails(folder, "model.layers.9.mlp.up_proj.weight", file, "again")


@pytest.mark.parametrize(
    "text", ["", "{}", "[]", '{"weight_map": 3}', '{"weight_map": {"a": "../b.safetensors"}}']
)
def test_a_broken_index(copy, text):
    folder = copy("llama", "sharded")
    (folder / "model.safetensors.index.json").write_text(text)
    if text == "{}":
        fails(folder, "model.safetensors.index.json", "download it again")
    else:
        fails(folder, "model.safetensors.index.json")


def test_one_tensor_in_two_files_of_a_mixed_folder(copy):
    folder = copy("llama", "sharded")
    (folder / "model.safetensors.index.json").unlink()
    shutil.copy(tiny_model("llama-tied") / "model.safetensors", folder / "other.safetensors")
    fails(folder, "mixes two models", "other.safetensors")


def test_git_lfs_pointers(copy):
    folder = copy("llama", "safetensors")
    (folder / "model.safetensors").write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1234567\n"
    )
    fails(folder, "git-lfs pointer", "git lfs pull", str(folder / "model.safetensors"))


def test_nothing_there(tmp_path, copy):
    fails(tmp_path / "absent", "no model at")
    fails(tmp_path, "holds no safetensors, .bin or .gguf weights")
    fails(copy("llama", "bin"), "holds no safetensors weights", "holds pt weights", load_format="safetensors")
    fails(tiny_model("llama") / "model.safetensors", "load_format", load_format="gguf")
    fails(tiny_model("llama") / "config.json", "neither")


class _Evil:
    def __reduce__(self):
        return (print, ("run by the pickle",))


def test_pickles_that_would_run_code_are_refused(tmp_path, capsys):
    torch.save({"a": _Evil()}, tmp_path / "pytorch_model.bin")
    fails(tmp_path, "pytorch_model.bin", "run code", "safetensors")
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps(_Evil(), protocol=2))
    fails(tmp_path, "pytorch_model.bin")
    assert "run by the pickle" not in capsys.readouterr().out


def test_peak_memory_is_about_one_tensor(tmp_path):
    """Reading 512 MiB of float32 into bfloat16 one tensor at a time leaves anonymous memory almost as it was."""
    for shard in range(2):
        save_file(
            {f"w{shard}.{i}": torch.zeros(16, 1 << 20) for i in range(4)},
            tmp_path / f"model-{shard + 1:05d}-of-00002.safetensors",
        )
    code = (
        "import sys, re, pathlib, torch\n"
        "from kubeinfer.weights.readers import iterate_tensors\n"
        "def anon():\n"
        "    text = pathlib.Path('/proc/self/status').read_text()\n"
        "    return int(re.search(r'RssAnon:\\s+(\\d+)', text)[1]) // 1024\n"
        "before = peak = anon()\n"
        "for name, tensor in iterate_tensors(pathlib.Path(sys.argv[1]), dtype=torch.bfloat16):\n"
        "    peak = max(peak, anon())\n"
        "    del tensor\n"
        "print(peak - before)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 80


def test_importing_the_readers_loads_no_torch():
    code = (
        "import sys, kubeinfer.weights.readers as r\n"
        "r.find_checkpoint\n"
        "raise SystemExit('torch' in sys.modules or 'numpy' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
