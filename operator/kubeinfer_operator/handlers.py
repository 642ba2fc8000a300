"""kopf's part: it watches InferenceModels and tells the controller to look. No finalizer, no annotation, no patch."""

from __future__ import annotations

from typing import Any

import kopf

from kubeinfer_operator import names
from kubeinfer_operator.controller import Controller
from kubeinfer_operator.store import key_of


def make_registry(controller: Controller) -> Any:
    """Handlers bound to ``controller``, in a registry of their own."""
    registry = kopf.OperatorRegistry()

    @kopf.on.login(registry=registry)  # type: ignore[untyped-decorator, unused-ignore]
    async def login(**kwargs: Any) -> Any:
        return kopf.login_with_service_account(**kwargs) or kopf.login_with_kubeconfig(**kwargs)

    @kopf.on.event(names.GROUP, names.VERSION, names.PLURAL, registry=registry)  # type: ignore[untyped-decorator, unused-ignore]
    async def look_again(event: Any, **_: Any) -> None:
        model = dict(event["object"])
        model["metadata"] = dict(model["metadata"])
        if event["type"] == "DELETED":
            controller.gone(key_of(model))
        else:
            controller.seen(model)

    return registry


def make_settings() -> Any:
    """kopf's settings: bounded waits, nothing written to the objects, no events of its own."""
    settings = kopf.OperatorSettings()
    settings.posting.enabled = False
    settings.networking.request_timeout = 30
    settings.networking.connect_timeout = 10
    settings.watching.server_timeout = 240
    settings.watching.client_timeout = 300
    settings.watching.connect_timeout = 10
    settings.scanning.disabled = True
    settings.peering.standalone = True
    # Not used, since no handler needs them; named so that they could never clash with another operator's.
    settings.persistence.finalizer = f"{names.GROUP}/finalizer"
    settings.persistence.progress_storage = kopf.AnnotationsProgressStorage(prefix=names.GROUP)
    settings.persistence.diffbase_storage = kopf.AnnotationsDiffBaseStorage(prefix=names.GROUP)
    return settings
