"""Settings for the whole suite."""

from __future__ import annotations

import signal
from typing import Any

import pytest
from hypothesis import settings

# Wall-clock deadlines fail on a busy machine and prove nothing there.
settings.register_profile("kubeinfer", deadline=None)
settings.load_profile("kubeinfer")

# A shell's background job begins with Ctrl-C ignored, and so would all processes that tests start and interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


class _FailuresAtOnce:
    """Names each failed test when it fails: a run that is cut at a time limit has no summary."""

    def __init__(self, config: pytest.Config):
        self._config = config

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        terminal: Any = self._config.pluginmanager.get_plugin("terminalreporter")
        if report.failed and terminal is not None:
            crash: Any = getattr(report.longrepr, "reprcrash", None)
            terminal.write_line(f"\n{report.nodeid} ({report.when}): {getattr(crash, 'message', '')[:300]}")


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(_FailuresAtOnce(config))


@pytest.fixture
def forked_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The ranks of engines in this process start at once."""
    from fixtures.forked_ranks import instead_of_subprocess

    monkeypatch.setattr("kubeinfer.distributed.multi_process.subprocess", instead_of_subprocess())
