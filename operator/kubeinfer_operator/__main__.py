"""``python -m kubeinfer_operator``: the operator's process."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import tempfile

from kubeinfer_operator.config import Settings, read_settings


def main(argv: list[str] | None = None) -> int:
    """Run until SIGTERM. Returns the exit code."""
    # A container's bare user id has no name, and kopf asks for one.
    os.environ.setdefault("LOGNAME", "kubeinfer")
    settings = read_settings(sys.argv[1:] if argv is None else argv)
    _prepare_for_hubs(settings)
    import kopf

    kopf.configure(log_format=kopf.LogFormat.JSON if settings.log_format == "json" else kopf.LogFormat.PLAIN)
    # kopf tells of each event it hands on; at a thousand models that is noise.
    for name in ("kopf.objects", "kopf._core", "kopf._kits", "kopf._cogs", "kopf.activities", "httpx"):
        logging.getLogger(name).setLevel(logging.WARNING)
    return asyncio.run(_run(settings))


def _prepare_for_hubs(settings: Settings) -> None:
    """The hubs' SDKs read their endpoints from the environment and want a home that can be written."""
    for name, value in (
        ("HF_ENDPOINT", settings.hf_endpoint),
        ("MODELSCOPE_ENDPOINT", settings.modelscope_endpoint),
    ):
        if value:
            os.environ[name] = value
    home = os.environ.get("HOME", "/")
    if not os.access(home, os.W_OK):
        os.environ["HOME"] = tempfile.gettempdir()


async def _run(settings: Settings) -> int:
    from kubeinfer_operator.app import Operator, stop_on_signals
    from kubeinfer_operator.kube import Kube

    stop = asyncio.Event()
    stop_on_signals(stop)
    await Operator(settings, await Kube.connect()).run(stop)
    return 0


if __name__ == "__main__":
    sys.exit(main())
