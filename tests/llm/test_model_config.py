"""config.json: what is refused, and how; what an override does."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from fixtures.tiny_models import tiny_model
from kubeinfer.errors import ModelLoadError
from kubeinfer.model_config import load_model_config
from kubeinfer.options import EngineOptions
from kubeinfer.weights.errors import WeightsIncomplete

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


def changed(tmp_path: Path, name: str = "llama", **changes: Any) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_model(name), folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def load(folder: Path, **options: Any) -> Any:
    return load_model_config(EngineOptions(model=str(folder), **options))


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"num_attention_heads": None}, "'num_attention_heads' must be a positive integer, got None"),
        ({"num_attention_heads": "four"}, "got 'four'"),
        ({"vocab_size": -1}, "'vocab_size' must be a positive integer"),
        ({"eos_token_id": "x"}, "cannot be used: ValueError"),
        ({"rope_parameters": None, "rope_scaling": {"rope_type": "linear"}}, "needs a number 'factor'"),
        ({"rope_parameters": None, "rope_scaling": "linear"}, "cannot be used: "),
        (
            {"rope_parameters": None, "rope_scaling": {"rope_type": "llama3", "factor": 8}},
            "'low_freq_factor'",
        ),
        ({"architectures": "NoSuchModel"}, "architecture NoSuchModel is not supported"),
        ({"sliding_window": 8, "layer_types": ["sliding_attention"]}, "layer_types has 1 entries"),
    ],
)
def test_a_value_that_cannot_be_is_named(tmp_path: Path, changes: dict[str, Any], what: str) -> None:
    with pytest.raises(ModelLoadError) as caught:
        load(changed(tmp_path, **changes))
    assert what in str(caught.value)


def test_llama3_scaling_without_the_trained_length(tmp_path: Path) -> None:
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = load(changed(tmp_path, rope_parameters=None, rope_scaling=scaling, max_position_embeddings=256))
    assert config.rope.scaling["original_max_position_embeddings"] == 256


@pytest.mark.parametrize("key", ["rope_scaling", "rope_parameters"])
def test_an_override_of_the_scaling_wins(key: str) -> None:
    folder = tiny_model("llama-tied")
    before = load(folder)
    config = load(folder, hf_overrides={key: YARN}, max_model_len=2048)
    assert config.rope.scaling["rope_type"] == "yarn"
    assert config.max_model_len == 2048
    if key == "rope_scaling":
        assert config.rope.theta == before.rope.theta


def test_a_local_folder_without_weights_is_not_pulled(tmp_path: Path) -> None:
    from kubeinfer.weights.download import fetch

    folder = changed(tmp_path)
    for file in folder.glob("*.safetensors"):
        file.unlink()
    with pytest.raises(WeightsIncomplete):
        fetch(str(folder))
