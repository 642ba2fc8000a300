from __future__ import annotations

import io
import json
from pathlib import Path

import pytest

from kubeinfer.weights import progress
from kubeinfer.weights.errors import format_bytes
from kubeinfer.weights.progress import Bar, JsonLines, Meter, ProgressEvent
from kubeinfer.weights.sources.base import retry_after


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress.time, "monotonic", clock)
    return clock


def test_rate_and_eta_are_of_the_last_seconds(clock: Clock) -> None:
    meter = Meter(10_000, 2)
    meter.already_here(1_000)
    for _ in range(5):
        clock.now += 1
        meter.received_bytes(200)
        event = meter.event()
    assert event.bytes_done == 2_000
    assert event.rate == pytest.approx(200)
    assert event.eta == pytest.approx(8_000 / 200)
    for _ in range(30):
        clock.now += 1
        event = meter.event()
    assert event.rate == 0
    assert event.eta is None
    meter.received_bytes(8_000)
    clock.now += 1
    assert meter.event().eta == 0


def test_json_lines_come_every_two_seconds_and_on_a_new_phase(clock: Clock) -> None:
    out = io.StringIO()
    lines = JsonLines(out)
    for _ in range(50):
        lines(ProgressEvent("downloading", 5, 10))
        clock.now += 0.1
    lines(ProgressEvent("publishing", 10, 10))
    lines.write({"event": "done"})
    events = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [e.get("phase") for e in events] == ["downloading"] * 3 + ["publishing", None]
    assert events[0]["bytesDone"] == 5


def test_the_bar_shows_bytes() -> None:
    out = io.StringIO()
    bar = Bar("acme/tiny", out)
    bar(ProgressEvent("resolving", message="resolving acme/tiny"))
    bar(ProgressEvent("downloading", 1 << 20, 4 << 20, 1, 3))
    bar(ProgressEvent("downloading", 4 << 20, 4 << 20, 3, 3))
    bar.close()
    assert "resolving acme/tiny" in out.getvalue()
    assert "4.00M/4.00M" in out.getvalue()
    assert "3/3 files" in out.getvalue()


@pytest.mark.parametrize(
    ("header", "seconds"),
    [("7", 7.0), ("", None), (None, None), ("soon", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0.0)],
)
def test_retry_after(header: str | None, seconds: float | None) -> None:
    assert retry_after(header) == seconds


def test_sizes_read_well() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1536, 5 << 30, 3 << 40)] == [
        "0 B",
        "1023 B",
        "1.5 KiB",
        "5.0 GiB",
        "3.0 TiB",
    ]


def test_a_folder_of_somebody_else_is_a_storage_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Root may write anywhere, so the refusal of the system call is put in its place."""
    from kubeinfer.weights import download, errors
    from kubeinfer.weights.request import make_request

    def refuse(self: object) -> None:
        raise PermissionError(13, "Permission denied", str(tmp_path / "models"))

    monkeypatch.setattr(download._Fetch, "run", refuse)
    request = make_request("hf://org/name", local_dir=tmp_path)
    with pytest.raises(
        errors.StorageError, match=r"cannot write .*models: Permission denied; give a folder that user"
    ):
        download.fetch_result(request)
