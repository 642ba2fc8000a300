from __future__ import annotations

import argparse
import os
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from kubeinfer.cli.flags import Parser, options_from
from kubeinfer.cli.main import main
from kubeinfer.cli.serve import add_arguments, serve_options
from kubeinfer.errors import OptionError
from kubeinfer.options import ServeOptions

ROOT = Path(__file__).resolve().parents[2]


def parse(*flags: str) -> ServeOptions:
    parser = Parser(prog="kubeinfer serve")
    add_arguments(parser)
    return serve_options(parser.parse_args(list(flags)))


def test_every_option_has_a_flag_with_help() -> None:
    parser = Parser(prog="x")
    add_arguments(parser)
    help_text = parser.format_help()
    for name, field in ServeOptions.model_fields.items():
        assert "--" + name.replace("_", "-") in help_text, name
        assert field.description, name


def test_defaults_are_the_models() -> None:
    assert parse("m") == ServeOptions(model="m")


def test_types() -> None:
    options = parse(
        "m", "-tp", "2", "-pp", "3", "--max-model-len=4096", "--gpu-memory-utilization", "0.8", "--enforce-eager",
        "--no-enable-prefix-caching", "--swap-space=1", "--served-model-name", "QwQ:32B", "b", "--block-size", "16",
        "--hf-overrides", '{"rope_theta": 5}', "--cudagraph-capture-sizes", "1", "2", "--dtype", "half",
    )  # fmt: skip
    assert options.tensor_parallel_size == 2
    assert options.pipeline_parallel_size == 3
    assert options.max_model_len == 4096
    assert options.gpu_memory_utilization == 0.8
    assert options.enforce_eager
    assert not options.enable_prefix_caching
    assert options.swap_space == 1.0
    assert options.served_model_name == ["QwQ:32B", "b"]
    assert options.block_size == 16
    assert options.hf_overrides == {"rope_theta": 5}
    assert options.cudagraph_capture_sizes == [1, 2]
    assert options.dtype == "half"


def test_underscores_and_the_model_flag() -> None:
    options = parse(
        "--model", "a/b_c", "--max_model_len", "77", "--tensor_parallel_size=2", "--api_key", "x_y"
    )
    assert options.model == "a/b_c"
    assert options.max_model_len == 77
    assert options.tensor_parallel_size == 2
    assert options.api_key == ["x_y"]
    assert parse("a", "--model", "a").model == "a"
    with pytest.raises(OptionError, match="both"):
        parse("a", "--model", "b")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["m", "--max-modl-len", "5"], "unknown flag --max-modl-len; did you mean --max-model-len?"),
        (["m", "--prot=5"], "did you mean --port?"),
        (["m", "--zzz"], "unknown flag --zzz"),
        (["m", "--enforce-eager=true"], "--no-enforce-eager: takes no value, got 'true'"),
        (["m", "--enable-lora"], "LoRA adapters are not supported yet"),
        (["m", "--port", "many"], "--port"),
        (["m", "--dtype", "int3"], "float16"),
        (["m", "--hf-overrides", "[1]"], "not a JSON object"),
        (["m", "n"], "unexpected argument 'n'"),
    ],
)
def test_bad_flags(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as found:
        main(["serve", *flags])
    assert found.value.code == 2
    error = capsys.readouterr().err
    assert message in error
    assert "kubeinfer serve --help" in error


@pytest.mark.parametrize(
    ("flags", "option"),
    [
        ([], "model"),
        (["--served-model-name", "a", "model"], "model"),
        (["m", "--port", "70000"], "port"),
        (["m", "--gpu-memory-utilization", "1.5"], "gpu_memory_utilization"),
        (["m", "--served-model-name", ""], "served_model_name"),
        (["m", "--runner", "pooling"], "runner"),
        (["m", "--convert", "embed"], "runner"),
        (["m", "--config", "/nowhere.yaml"], "config"),
    ],
)
def test_bad_values_name_the_option(flags: list[str], option: str) -> None:
    with pytest.raises(OptionError) as found:
        parse(*flags)
    assert found.value.option == option


def test_config_file(tmp_path: Path) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(
        "model: from/file\nmax-model-len: 100\nport: 9000\nserved_model_name: one\nenforce_eager: true\n"
    )
    options = parse("--config", str(path), "--port", "9001")
    assert options.model == "from/file"
    assert options.max_model_len == 100
    assert options.port == 9001
    assert options.served_model_name == ["one"]
    assert options.enforce_eager
    assert parse("flag/model", "--config", str(path)).model == "flag/model"


@pytest.mark.parametrize(
    ("text", "message"),
    [("max_modl_len: 5", "did you mean max_model_len"), ("[1, 2]", "name: value"), ("a: [", "not YAML")],
)
def test_bad_config_file(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "serve.yaml"
    path.write_text(text)
    with pytest.raises(OptionError, match=message):
        parse("m", "--config", str(path))


def test_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KUBEINFER_API_KEY", "secret")
    monkeypatch.setenv("KUBEINFER_TARGET_DEVICE", "cpu")
    options = parse("m")
    assert options.api_key == ["secret"]
    assert options.device == "cpu"
    assert parse("m", "--api-key", "flag").api_key == ["flag"]


def test_lists_as_json() -> None:
    assert parse("m", "--allowed-origins", '["http://a", "http://b"]').allowed_origins == [
        "http://a",
        "http://b",
    ]
    assert parse("m", "--allowed-origins", "http://a", "http://b").allowed_origins == ["http://a", "http://b"]


def test_old_flags_are_taken_with_a_warning(capsys: pytest.CaptureFixture[str]) -> None:
    options = parse("m", "--disable-log-requests")
    assert not options.enable_log_requests
    assert "--disable-log-requests" in capsys.readouterr().err


def test_options_of_other_models() -> None:
    assert options_from(argparse.Namespace(model="m", port=5, other=1), ServeOptions).port == 5


def run(*args: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *args],
        capture_output=True,
        text=True,
        timeout=60,
        env=os.environ | {"PYTHONPATH": str(ROOT / "runtime")} | environment,
    )


def test_help_is_quick_and_loads_no_torch() -> None:
    code = (
        "import sys; from kubeinfer.cli.main import main\n"
        "try: main(['serve', '--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'fastapi', 'numpy'} & set(sys.modules)))"
    )
    begun = time.monotonic()
    found = run("-c", code)
    assert found.stdout.strip().endswith("[]")
    assert "--tensor-parallel-size" in found.stdout
    assert time.monotonic() - begun < 8
    assert run("-m", "kubeinfer.cli.main", "--version").stdout.startswith("kubeinfer ")
    top = run("-m", "kubeinfer.cli.main", "--help")
    assert "serve" in top.stdout
    assert top.returncode == 0


def test_a_folder_of_the_same_name_does_not_hide_the_package(tmp_path: Path) -> None:
    """A script beside the clone."""
    (tmp_path / "kubeinfer" / "runtime").mkdir(parents=True)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", "from kubeinfer import SamplingParams; print(SamplingParams.__name__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (found.stdout, found.stderr) == ("SamplingParams\n", "")


def test_a_busy_port_is_told_before_the_model_loads() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        found = run(
            "-m", "kubeinfer.cli.main", "serve", "/no/model", "--host", "127.0.0.1", "--port", str(port)
        )
    assert found.returncode == 1
    assert f"port: {port} is in use" in found.stderr
    assert "--port" in found.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["/no/model"], "/no/model"),
        (["/no/model.gguf"], "/no/model.gguf"),
        (["m", "--chat-template", "/no/template.jinja"], "chat_template"),
        (["m", "--chat-template", "{% bad %}"], "Encountered unknown tag 'bad'. Give"),
        (["m", "--ssl-keyfile", "/no/key", "--ssl-certfile", "/no/cert"], "ssl_keyfile"),
        (["m", "--host", "256.1.1.1"], "host"),
    ],
)
def test_missing_files_end_it_with_one_line(flags: list[str], message: str) -> None:
    values: dict[str, Any] = {"HF_HUB_OFFLINE": "1"}
    found = run("-m", "kubeinfer.cli.main", "serve", *flags, "--port", "0", **values)
    assert found.returncode == 1, found.stderr
    last = found.stderr.strip().splitlines()[-1]
    assert last.startswith("error: ")
    assert message in last
    assert "Traceback" not in found.stderr


@pytest.mark.parametrize(
    "module", ["kubeinfer.entrypoints.openai.api_server", "kubeinfer.entrypoints.api_server"]
)
def test_the_tutorials_modules(module: str) -> None:
    found = run("-m", module, "--help")
    assert found.returncode == 0
    assert "--served-model-name" in found.stdout
    found = run("-m", module, "--model", "/no/model", "--port", "0")
    assert found.returncode == 1
    assert "/no/model" in found.stderr
