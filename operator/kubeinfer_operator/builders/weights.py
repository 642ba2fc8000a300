"""Where a model's weights are in its pods, and the command that fetches them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from kubeinfer.weights.uri import ModelSource, parse
from kubeinfer_operator import names
from kubeinfer_operator.api.v1alpha1 import InferenceModelSpec, ModelSpec
from kubeinfer_operator.config import Settings

_WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")

StorageKind = Literal["claim", "hostPath", "ephemeral", "image"]


@dataclass(frozen=True, slots=True)
class Artifact:
    """One model at one commit, as it lies in a storage. ``folder`` is its path below the storage's root."""

    source: str
    revision: str
    file: str | None
    include: tuple[str, ...]
    exclude: tuple[str, ...]

    @property
    def folder(self) -> str:
        key = [self.source, self.revision, self.file, self.include, self.exclude]
        return names.digest(key, 16)

    @property
    def uri(self) -> str:
        file = f"/{self.file}" if self.file else ""
        return f"{self.source}{file}@{self.revision}"


def sources_of(model: ModelSpec) -> list[ModelSource]:
    """The hubs to ask, in order, each with its revision. Raises ``InvalidModelId``."""
    first = parse(model.uri if "://" in model.uri else f"hf://{model.uri}")
    found = [first.with_revision(model.revision)]
    for mirror in model.mirrors:
        source = parse(mirror)
        wanted = model.revision or first.revision
        # A commit names nothing on another hub; branches and tags do.
        if source.revision is None and wanted is not None and not _is_commit(wanted):
            source = source.with_revision(wanted)
        found.append(source)
    return found


def _is_commit(revision: str) -> bool:
    return len(revision) == 40 and all(c in "0123456789abcdef" for c in revision)


def artifact_of(source: ModelSource, revision: str, spec: InferenceModelSpec) -> Artifact:
    """The artifact that ``source`` at commit ``revision`` is for ``spec``."""
    return Artifact(
        source.repo_uri,
        revision,
        source.file,
        tuple(sorted(spec.model.include)),
        excluded(spec),
    )


def excluded(spec: InferenceModelSpec) -> tuple[str, ...]:
    """Globs that are not fetched; with dummy weights the weights themselves are among them."""
    dummy = getattr(spec.engine, "load_format", None) == "dummy"
    return tuple(sorted({*spec.model.exclude, *(_WEIGHTS if dummy else ())}))


def storage_kind(spec: InferenceModelSpec) -> StorageKind:
    """How the weights reach the pods."""
    if spec.model.uri.startswith("file://"):
        return "image"
    if spec.storage.host_path is not None:
        return "hostPath"
    if spec.storage.ephemeral is not None:
        return "ephemeral"
    return "claim"


def claim_of(name: str, spec: InferenceModelSpec) -> str | None:
    """The claim that holds the weights of model ``name``, if a claim does."""
    if spec.model.uri.startswith("pvc://"):
        return parse(spec.model.uri).claim
    if storage_kind(spec) != "claim":
        return None
    return spec.storage.existing_claim or names.claim_name(name)


def owns_claim(spec: InferenceModelSpec) -> bool:
    """Whether the operator makes the claim."""
    return (
        storage_kind(spec) == "claim"
        and not spec.storage.existing_claim
        and not spec.model.uri.startswith("pvc://")
    )


def volume(name: str, spec: InferenceModelSpec, *, read_only: bool) -> dict[str, Any] | None:
    """The pod's volume ``models``; None where the weights are in the image."""
    claim = claim_of(name, spec)
    if claim is not None:
        source: dict[str, Any] = {"claimName": claim}
        if read_only:
            source["readOnly"] = True
        return {"name": "models", "persistentVolumeClaim": source}
    kind = storage_kind(spec)
    if kind == "hostPath":
        assert spec.storage.host_path is not None
        return {
            "name": "models",
            "hostPath": {"path": spec.storage.host_path.path, "type": "DirectoryOrCreate"},
        }
    if kind == "ephemeral":
        assert spec.storage.ephemeral is not None
        limit = spec.storage.ephemeral.size_limit
        return {"name": "models", "emptyDir": {"sizeLimit": limit} if limit else {}}
    return None


def model_path(spec: InferenceModelSpec, artifact: Artifact | None) -> str:
    """The path the engine loads, inside the runtime container."""
    if artifact is None:
        source = parse(spec.model.uri)
        if source.scheme == "pvc":
            return f"{names.MODELS_DIR}/{source.path}".rstrip("/")
        return source.path
    path = f"{names.MODELS_DIR}/{artifact.folder}"
    return f"{path}/{artifact.file}" if artifact.file else path


def pull_arguments(artifact: Artifact) -> list[str]:
    """Arguments of ``kubeinfer pull`` for ``artifact``."""
    args = [artifact.uri, "--local-dir", f"{names.MODELS_DIR}/{artifact.folder}", "--progress", "json"]
    args += ["--termination-log", "/dev/termination-log"]
    for pattern in artifact.include:
        args += ["--include", pattern]
    for pattern in artifact.exclude:
        args += ["--exclude", pattern]
    return args


def pull_container(
    name: str, spec: InferenceModelSpec, artifact: Artifact, settings: Settings
) -> dict[str, Any]:
    """The container that fetches ``artifact`` into the volume ``models``."""
    env: list[dict[str, Any]] = [
        {"name": "HOME", "value": "/tmp"},
        {"name": "LOGNAME", "value": "kubeinfer"},
    ]
    # The job reaches the hub as the operator does.
    reach = {
        "HF_ENDPOINT": settings.hf_endpoint,
        "MODELSCOPE_ENDPOINT": settings.modelscope_endpoint,
        "HTTPS_PROXY": settings.https_proxy,
        "HTTP_PROXY": settings.http_proxy,
        "NO_PROXY": settings.no_proxy,
    }
    env += [{"name": name, "value": value} for name, value in reach.items() if value]
    ref = spec.model.token_secret_ref
    if ref is not None and artifact.source.startswith(sources_of(spec.model)[0].scheme + "://"):
        # The token is for one hub: given only to the one that spec.model.uri names.
        variable = "MODELSCOPE_API_TOKEN" if artifact.source.startswith("modelscope://") else "HF_TOKEN"
        env.append({"name": variable, "valueFrom": {"secretKeyRef": {"name": ref.name, "key": ref.key}}})
    return {
        "name": name,
        "image": settings.puller_image,
        "imagePullPolicy": settings.image_pull_policy,
        "command": ["kubeinfer", "pull"],
        "args": pull_arguments(artifact),
        "env": env,
        "resources": {"requests": {"cpu": "100m", "memory": "128Mi"}, "limits": {"memory": "1Gi"}},
        "securityContext": container_security(),
        "terminationMessagePolicy": "FallbackToLogsOnError",
        "volumeMounts": [
            {"name": "models", "mountPath": names.MODELS_DIR},
            {"name": "tmp", "mountPath": "/tmp"},
        ],
    }


def container_security() -> dict[str, Any]:
    """The restricted Pod Security Standard, and a root file system that cannot be written."""
    return {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "runAsNonRoot": True,
        "capabilities": {"drop": ["ALL"]},
    }


def pod_security(spec: InferenceModelSpec, settings: Settings) -> dict[str, Any]:
    """The pod's half of the same, and the user and group that own the volumes."""
    user = spec.template.run_as_user or settings.run_as_user
    return {
        "runAsNonRoot": True,
        "runAsUser": user,
        "runAsGroup": user,
        "fsGroup": spec.template.fs_group or user,
        "fsGroupChangePolicy": "OnRootMismatch",
        "seccompProfile": {"type": "RuntimeDefault"},
    }


def placement(spec: InferenceModelSpec) -> dict[str, Any]:
    """What decides on the node: the same for the runtime and for the job that fills its volume."""
    template = spec.template
    out: dict[str, Any] = {}
    if template.node_selector:
        out["nodeSelector"] = dict(template.node_selector)
    if template.tolerations:
        out["tolerations"] = [t.model_dump(by_alias=True, exclude_none=True) for t in template.tolerations]
    if template.affinity:
        out["affinity"] = template.affinity
    if template.image_pull_secrets:
        out["imagePullSecrets"] = [{"name": s.name} for s in template.image_pull_secrets]
    return out
