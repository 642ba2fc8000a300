"""Sources of weights, loaded when used: no hub SDK is imported before a model of that hub is asked for."""

from __future__ import annotations

from kubeinfer.weights.errors import NotHere
from kubeinfer.weights.sources.base import FileRequest, RemoteFile, ResolvedModel, WeightSource
from kubeinfer.weights.uri import ModelSource

__all__ = ["FileRequest", "RemoteFile", "ResolvedModel", "WeightSource", "open_source"]


def open_source(model: ModelSource, *, token: str | None = None, endpoint: str | None = None) -> WeightSource:
    """The source that serves ``model``."""
    if model.scheme == "hf":
        from kubeinfer.weights.sources.huggingface import HuggingFaceSource

        return HuggingFaceSource(model, token=token, endpoint=endpoint)
    if model.scheme == "modelscope":
        from kubeinfer.weights.sources.modelscope import ModelScopeSource

        return ModelScopeSource(model, token=token, endpoint=endpoint)
    if model.scheme == "file":
        from kubeinfer.weights.sources.local import LocalSource

        return LocalSource(model)
    raise NotHere(
        f"{model} names a PersistentVolumeClaim, which only the operator can mount: use it in an InferenceModel's "
        "spec.model.uri, or give the folder where the claim is mounted"
    )
