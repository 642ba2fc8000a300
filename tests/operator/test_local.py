"""``kubeinfer up``: manifests read as the API server reads them, real processes, and one end for all."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from typing import Any

import pytest
import yaml

from fixtures.tiny_models import tiny_model
from hub import HubServer
from kubeinfer_operator.local import LocalError, Process, free_port, read_files, runtime_processes, upstreams
from kubeinfer_operator.supervisor import ChildFailed, Supervisor

ROOT = Path(__file__).parents[2]


def write(path: Path, *documents: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump_all(documents))
    return path


def manifest(name: str = "tiny", **spec: Any) -> dict[str, Any]:
    spec.setdefault("model", {"uri": "hf://acme/tiny"})
    spec.setdefault("resources", {"device": "cpu"})
    return {
        "apiVersion": "kubeinfer.io/v1alpha1", "kind": "InferenceModel", "metadata": {"name": name}, "spec": spec,
    }  # fmt: skip


def test_models_of_a_file(tmp_path: Path) -> None:
    other = {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "x"}}
    file = write(
        tmp_path / "m.yaml",
        other,
        manifest(replicas=2),
        manifest("b", autoscaling={"minReplicas": 0, "maxReplicas": 4}),
    )
    first, second = read_files([file])
    assert (first.name, first.replicas) == ("tiny", 2)
    assert (second.name, second.replicas) == ("b", 1)
    assert read_files([file], replicas=1)[0].replicas == 1


def test_a_manifest_for_gpus_on_a_laptop(tmp_path: Path) -> None:
    file = write(
        tmp_path / "m.yaml",
        manifest(resources={"count": 4}, engine={"tensorParallelSize": 4, "maxModelLen": 100}),
    )
    (model,) = read_files([file], device="cpu")
    (process,) = runtime_processes(model, Path("/m"), [1])
    assert process.command[process.command.index("--device") + 1] == "cpu"
    assert "--tensor-parallel-size" not in process.command
    assert "100" in process.command


@pytest.mark.parametrize(
    ("documents", "words"),
    [
        ([manifest(engine={"maxModelLenn": 5})], "did you mean maxModelLen"),
        ([manifest(engine={"maxModelLen": 0})], "spec.engine.maxModelLen"),
        ([manifest(autoscaling={"minReplicas": 2, "maxReplicas": 1})], "must not be above"),
        ([manifest("Bad_Name")], "metadata.name"),
        ([manifest("a", servedNames=["x"]), manifest("b", servedNames=["x"])], "both serve the name 'x'"),
        ([{"kind": "ConfigMap"}], "holds no InferenceModel"),
        ([{**manifest(), "apiVersion": "kubeinfer.io/v1"}], "kubeinfer.io/v1alpha1"),
        ([manifest(model={"uri": "hf://acme/../x"})], "acme"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, documents: list[dict[str, Any]], words: str) -> None:
    with pytest.raises(LocalError, match=words):
        read_files([write(tmp_path / "m.yaml", *documents)])


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(LocalError, match=r"^cannot read .*none\.yaml: No such file or directory$"):
        read_files([tmp_path / "none.yaml"])
    (tmp_path / "torn.yaml").write_text("a: [1", encoding="utf-8")
    with pytest.raises(LocalError, match=r"torn\.yaml is not YAML: "):
        read_files([tmp_path / "torn.yaml"])


def test_examples_are_valid() -> None:
    files = sorted((ROOT / "examples").glob("*.yaml"))
    assert files
    for file in files:
        for model in read_files([file]):
            assert upstreams([model], {model.name: [1]})["models"][0]["served_names"]


def _sleeper(code: str, **fields: Any) -> Process:
    return Process("child", [sys.executable, "-c", code], **fields)


def test_all_end_when_one_fails_and_its_last_line_is_the_reason() -> None:
    out = io.StringIO()
    with Supervisor(out) as supervisor:
        supervisor.start([
            _sleeper("import time; time.sleep(60)"),
            _sleeper("import sys; print('loading'); print('no memory left'); sys.exit(3)"),
        ])  # fmt: skip
        pids = [child.popen.pid for child in supervisor._children]
        with pytest.raises(ChildFailed, match="exit code 3: no memory left"):
            supervisor.run()
    assert "child      | loading" in out.getvalue()
    for pid in pids:
        assert not Path(f"/proc/{pid}").exists()


def test_a_child_that_does_not_listen_is_killed_in_time() -> None:
    stubborn = (
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); print('up'); time.sleep(60)"
    )
    started = time.monotonic()
    out = io.StringIO()
    with Supervisor(out) as supervisor:
        supervisor.start([_sleeper(stubborn, grace=0.5)])
        while "up" not in out.getvalue():
            time.sleep(0.02)
        supervisor.request_stop()
        (child,) = supervisor._children
    assert child.popen.returncode == -signal.SIGKILL
    assert time.monotonic() - started < 20


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    path = os.pathsep.join(str(ROOT / folder) for folder in ("runtime", "operator", "gateway"))
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "MODELSCOPE_"))}
    return {
        **kept,
        "PYTHONPATH": path,
        "HF_HOME": str(tmp_path / "hf"),
        "HOME": str(tmp_path),
        "OMP_NUM_THREADS": "1",
    }


def _up(file: Path, env: dict[str, str], *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kubeinfer.cli.main", "up", "-f", str(file), *more]
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_up_answers_and_leaves_nothing(tmp_path: Path, environment: dict[str, str]) -> None:
    """A tiny model from a hub on loopback, through the gateway; then Ctrl-C."""
    (tmp_path / "models" / "acme").mkdir(parents=True)
    (tmp_path / "models" / "acme" / "tiny").symlink_to(tiny_model("llama"))
    hub = HubServer(tmp_path / "models").start()
    port = free_port()
    file = write(
        tmp_path / "m.yaml",
        manifest(engine={"maxModelLen": 128, "cpuKvcacheSpace": 0.1}, servedNames=["little"]),
    )
    process = _up(file, {**environment, "HF_ENDPOINT": hub.url}, "--port", str(port))
    lines: list[str] = []
    try:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if "Try it:" in line:
                break
        else:
            pytest.fail("".join(lines))
        body = json.dumps(
            {"model": "little", "prompt": "hello", "max_tokens": 4, "ignore_eos": True}
        ).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 4
        process.send_signal(signal.SIGINT)
        rest, _ = process.communicate(timeout=60)
        assert process.returncode == 0, "".join(lines) + rest
    finally:
        process.kill()
        process.wait()
        hub.stop()
    assert (
        str(port)
        not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    )


def test_up_says_why_the_engine_failed(tmp_path: Path, environment: dict[str, str]) -> None:
    file = write(
        tmp_path / "m.yaml",
        manifest(model={"uri": f"file://{tiny_model('llama')}"}, engine={"maxModelLen": 10_000_000}),
    )
    process = _up(file, environment, "--port", str(free_port()))
    said, _ = process.communicate(timeout=90)
    assert process.returncode == 1, said
    assert "tiny ended with exit code" in said.strip().splitlines()[-1]


def test_up_says_why_weights_cannot_be_had(tmp_path: Path, environment: dict[str, str]) -> None:
    (tmp_path / "models").mkdir()
    hub = HubServer(tmp_path / "models").start()
    try:
        process = _up(write(tmp_path / "m.yaml", manifest()), {**environment, "HF_ENDPOINT": hub.url})
        said, _ = process.communicate(timeout=60)
    finally:
        hub.stop()
    assert process.returncode == 11, said
    assert "ModelNotFound" in said.strip().splitlines()[-1]
