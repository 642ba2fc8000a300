"""The helpers beside the tests are imported by name: a package called ``operator`` would shadow the standard library's."""

from __future__ import annotations

import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(Path(__file__).parent))

from fake_api import FakeApi
from operator_running import Runtime

# A machine that is busy with other things makes no test wrong.
settings.register_profile("operator", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("operator")


@pytest.fixture
async def api() -> AsyncIterator[FakeApi]:
    server = FakeApi()
    await server.start()
    server.put("storage.k8s.io/v1", "storageclasses", {
        "metadata": {"name": "std", "annotations": {"storageclass.kubernetes.io/is-default-class": "true"}}
    })  # fmt: skip
    yield server
    await server.stop()


@pytest.fixture
async def runtime(monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Runtime]:
    async with Runtime() as server:
        monkeypatch.setattr("kubeinfer_operator.names.RUNTIME_PORT", server.port)
        yield server


@pytest.fixture
def kubeconfig(api: FakeApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "kubeconfig"
    path.write_text(f"""
apiVersion: v1
kind: Config
clusters: [{{name: c, cluster: {{server: "http://127.0.0.1:{api.port}"}}}}]
users: [{{name: u, user: {{token: t}}}}]
contexts: [{{name: x, context: {{cluster: c, user: u}}}}]
current-context: x
""")
    monkeypatch.setenv("KUBECONFIG", str(path))
    monkeypatch.setenv("LOGNAME", "test")
