"""The examples of the offline API run as they are."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fixtures.tiny_models import tiny_model

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("name", "typed", "shown"),
    [
        ("offline_generate.py", "", "Prompt: 'The capital of France is'"),
        ("offline_chat.py", "Hello\nAnd you?\n\n", "Ask something"),
        ("offline_strategies.py", "", "--- three of them: "),
    ],
)
def test_examples_run(name: str, typed: str, shown: str, tmp_path: Path) -> None:
    # The examples ask for 2048 tokens of context; the tiny models have 512 positions.
    source = (ROOT / "examples" / name).read_text(encoding="utf-8")
    script = tmp_path / name
    script.write_text(source.replace("max_model_len=2048", "max_model_len=512"), encoding="utf-8")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "runtime"),
        "PYTHONIOENCODING": "utf-8",
        "KUBEINFER_TARGET_DEVICE": "cpu",
    }
    done = subprocess.run(
        [sys.executable, str(script), str(tiny_model("llama"))],
        input=typed,
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=environment,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout
