"""InferenceModel ``kubeinfer.io/v1alpha1`` as pydantic models: the source of the CRD and of its reference page."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, create_model
from pydantic.alias_generators import to_camel

from kubeinfer.options import EngineOptions

QUANTITY = r"^[0-9]+(\.[0-9]+)?([eE][0-9]+|m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi|E|Ei)?$"
HUB_URI = r"^(modelscope|hf)://[^/\s]+/\S+$"
MODEL_URI = r"^((modelscope|hf)://[^/\s]+/\S+|pvc://[^/\s]+(/\S*)?|file:///\S+|[^/\s:]+/[^\s:]+)$"

Quantity = Annotated[
    str, Field(pattern=QUANTITY, max_length=32, json_schema_extra={"x-kubernetes-int-or-string": True})
]
AnyObject = Annotated[dict[str, Any], Field(json_schema_extra={"x-kubernetes-preserve-unknown-fields": True})]


class Part(BaseModel):
    """Base of all parts: camelCase outside, snake_case inside; what is unknown is left to the API server to prune."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="ignore",
        protected_namespaces=(),
        coerce_numbers_to_str=True,
    )


class SecretKey(Part):
    """One key of a Secret in the model's namespace."""

    name: str = Field(description="Name of the Secret.", min_length=1, max_length=253)
    key: str = Field(
        "token", description="Key in the Secret that holds the token.", min_length=1, max_length=253
    )


class ModelSpec(Part):
    """Which model, and where its weights come from."""

    uri: str = Field(
        description="modelscope://ORG/NAME[@REV], hf://ORG/NAME[@REV], pvc://CLAIM/PATH (weights that are on a claim "
        "already), file:///PATH (weights inside the runtime image) or ORG/NAME (Hugging Face).",
        pattern=MODEL_URI,
        max_length=512,
    )
    revision: str | None = Field(
        None,
        description="Branch, tag or commit; the hub's default branch when not given. It is resolved to a commit once "
        "and kept until spec.model changes.",
        pattern=r"^[A-Za-z0-9._/+-]+$",
        max_length=128,
    )
    mirrors: list[Annotated[str, Field(pattern=HUB_URI, max_length=512)]] = Field(
        default_factory=list,
        description="Further hubs that hold the same model, tried in order when the first fails.",
        max_length=8,
    )
    include: list[Annotated[str, Field(max_length=256)]] = Field(
        default_factory=list,
        description="Globs of the files to fetch; one weight format and what goes with it when not given.",
        max_length=64,
    )
    exclude: list[Annotated[str, Field(max_length=256)]] = Field(
        default_factory=list, description="Globs of files that are not fetched.", max_length=64
    )
    token_secret_ref: SecretKey | None = Field(
        None, description="Token for the hub, for private and gated models. Only this Secret is read."
    )


class _EngineBase(Part):
    """Options of the engine; what is not given is the engine's own default."""


def _engine_fields() -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, info in EngineOptions.model_fields.items():
        extra = info.json_schema_extra if isinstance(info.json_schema_extra, dict) else {}
        if extra.get("pod") is False:
            continue
        unit = f" In {extra['unit']}." if "unit" in extra and extra["unit"] not in ("share",) else ""
        default = info.default
        said = (
            ""
            if default is None
            else f" Default: {str(default).lower() if isinstance(default, bool) else default}."
        )
        annotation: Any = info.annotation
        if info.metadata:
            annotation = Annotated[annotation, *info.metadata]
        fields[name] = (annotation | None, Field(None, description=f"{info.description}{unit}{said}"))
    return fields


EngineSpec: Any = create_model(
    "EngineSpec", __base__=_EngineBase, __doc__=_EngineBase.__doc__, **_engine_fields()
)


class ResourcesSpec(Part):
    """What one replica takes of a node."""

    device: Literal["gpu", "cpu"] = Field(
        "gpu", description="What the engine runs on; chooses the runtime image."
    )
    count: int = Field(
        1,
        description="GPUs of one replica. Above 1 the layers are split over them, unless spec.engine says otherwise.",
        ge=1,
        le=64,
    )
    resource_name: str = Field(
        "nvidia.com/gpu",
        description="Extended resource that stands for one GPU.",
        max_length=253,
        pattern=r"^[a-z0-9.-]+/[A-Za-z0-9._-]+$",
    )
    memory_per_device: Quantity | None = Field(
        None,
        description="Memory of one GPU, for the plan; read from the node label nvidia.com/gpu.memory when not given.",
    )
    requests: dict[str, Quantity] = Field(
        default_factory=dict, description="Requests of the runtime container, for example cpu and memory."
    )
    limits: dict[str, Quantity] = Field(default_factory=dict, description="Limits of the runtime container.")


class Toleration(Part):
    """A toleration, as in a pod."""

    key: str | None = Field(None, description="Key of the taint; all when not given.")
    operator: Literal["Exists", "Equal"] | None = Field(None, description="How key and value are compared.")
    value: str | None = Field(None, description="Value of the taint.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Effect of the taint."
    )
    toleration_seconds: int | None = Field(
        None, description="How long a NoExecute taint is tolerated, in seconds."
    )


class EnvVar(Part):
    """An environment variable, as in a pod."""

    name: str = Field(description="Name of the variable.", min_length=1)
    value: str | None = Field(None, description="Its value.")
    value_from: AnyObject | None = Field(None, description="Where its value comes from, as in a pod.")


class LocalObject(Part):
    """An object of the model's namespace."""

    name: str = Field(description="Name of the object.", min_length=1)


class TemplateSpec(Part):
    """What the pods of this model have besides the engine."""

    labels: dict[str, str] = Field(
        default_factory=dict, description="Further labels of the pods.", max_length=64
    )
    annotations: dict[str, str] = Field(default_factory=dict, description="Further annotations of the pods.")
    node_selector: dict[str, str] = Field(default_factory=dict, description="Labels that a node must have.")
    tolerations: list[Toleration] = Field(
        default_factory=list, description="Taints that the pods tolerate.", max_length=64
    )
    affinity: AnyObject | None = Field(None, description="Affinity of the pods, as in a pod.")
    env: list[EnvVar] = Field(
        default_factory=list, description="Environment of the runtime container.", max_length=128
    )
    priority_class_name: str | None = Field(None, description="Priority class of the pods.")
    runtime_class_name: str | None = Field(None, description="Runtime class of the pods.")
    image_pull_secrets: list[LocalObject] = Field(
        default_factory=list, description="Secrets with which images are pulled.", max_length=16
    )
    fs_group: int | None = Field(
        None, description="Group that owns the volumes; the operator's choice when not given.", ge=1
    )
    run_as_user: int | None = Field(
        None, description="User the containers run as; the operator's choice when not given.", ge=1
    )


AccessMode = Literal["ReadWriteOnce", "ReadWriteMany", "ReadOnlyMany", "ReadWriteOncePod"]


def _read_write_once() -> list[AccessMode]:
    return ["ReadWriteOnce"]


class ClaimSpec(Part):
    """A PersistentVolumeClaim the operator makes for this model."""

    storage_class_name: str | None = Field(
        None, description="StorageClass of the claim; the cluster's default when not given.", max_length=253
    )
    size: Quantity | None = Field(
        None, description="Size of the claim; from the hub's file list when not given."
    )
    access_modes: list[AccessMode] = Field(
        default_factory=_read_write_once,
        description="Access modes. Replicas on several nodes need ReadWriteMany.",
        min_length=1,
        max_length=4,
        json_schema_extra={"default": ["ReadWriteOnce"]},
    )


class HostPathSpec(Part):
    """A folder on every node; weights are fetched once a node."""

    path: str = Field(description="Absolute path of the folder.", pattern=r"^/.+", max_length=512)


class EphemeralSpec(Part):
    """A disk of the pod's own; weights are fetched at each start of a pod."""

    size_limit: Quantity | None = Field(None, description="Most the disk may hold.")


class StorageSpec(Part):
    """Where the weights are kept. At most one of the four; a claim of the model's own when none is given."""

    persistent_volume_claim: ClaimSpec | None = Field(
        None,
        description="A claim made for this model, sized from the hub's file list, deleted with the model.",
    )
    existing_claim: str | None = Field(
        None,
        description="A claim that is there already. Models that share it share each download. It is never deleted.",
        max_length=253,
        pattern=r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?$",
    )
    host_path: HostPathSpec | None = Field(None, description="A folder on every node, filled once a node.")
    ephemeral: EphemeralSpec | None = Field(
        None, description="A disk of the pod's own, filled at each start."
    )


class AutoscalingSpec(Part):
    """Replicas by load. The operator is then the only one that sets replicas."""

    min_replicas: int = Field(
        1,
        description="Fewest replicas; 0 lets the model sleep until the gateway has a request.",
        ge=0,
        le=1000,
    )
    max_replicas: int = Field(description="Most replicas.", ge=1, le=1000)
    target_requests: int = Field(
        32, description="Requests, running and waiting, that one replica should have.", ge=1
    )
    target_kv_usage: float = Field(
        0.85, description="Share of the KV cache that one replica should have in use.", gt=0, le=1
    )
    scale_up_delay: int = Field(
        0, description="How long load must call for more replicas, in seconds.", ge=0, le=3600
    )
    scale_down_delay: int = Field(
        300, description="How long load must allow fewer replicas, in seconds.", ge=0, le=86400
    )
    scale_to_zero_delay: int = Field(
        600,
        description="How long no request must come before the last replica goes, in seconds.",
        ge=0,
        le=604800,
    )


class RolloutSpec(Part):
    """How a change reaches the pods."""

    strategy: Literal["surge", "inPlace"] = Field(
        "surge",
        description="surge starts a new pod before an old one goes (needs the devices of one more replica); inPlace "
        "takes an old pod away first.",
    )
    drain_timeout: int = Field(
        120, description="How long a leaving pod may finish its streams, in seconds.", ge=0, le=86400
    )
    progress_deadline: int = Field(
        900,
        description="How long a new pod may take to become ready before the change is taken back, in seconds.",
        ge=10,
        le=86400,
    )
    restarted_at: str | None = Field(
        None,
        description="Any text; a new one restarts the pods with the operator's current images.",
        max_length=64,
    )


class InferenceModelSpec(Part):
    """What is wanted."""

    model: ModelSpec = Field(description="Which model, and where its weights come from.")
    served_names: list[Annotated[str, Field(min_length=1, max_length=253)]] = Field(
        default_factory=list,
        description="Names of the model in the OpenAI API; the object's name when none is given.",
        max_length=32,
        json_schema_extra={"x-kubernetes-list-type": "set"},
    )
    engine: EngineSpec = Field(
        default_factory=EngineSpec,
        description="Options of the engine; what is not given is the engine's own default.",
    )
    resources: ResourcesSpec = Field(
        default_factory=lambda: ResourcesSpec.model_validate({}),
        description="What one replica takes of a node.",
    )
    template: TemplateSpec = Field(
        default_factory=lambda: TemplateSpec.model_validate({}),
        description="What the pods have besides the engine.",
    )
    storage: StorageSpec = Field(
        default_factory=lambda: StorageSpec.model_validate({}), description="Where the weights are kept."
    )
    replicas: int = Field(
        1, description="Number of replicas; without effect where spec.autoscaling is given.", ge=0, le=1000
    )
    autoscaling: AutoscalingSpec | None = Field(
        None, description="Replicas by load, in place of spec.replicas."
    )
    rollout: RolloutSpec = Field(
        default_factory=lambda: RolloutSpec.model_validate({}), description="How a change reaches the pods."
    )
    image: str | None = Field(None, description="Runtime image, in place of the operator's.", max_length=512)
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = Field(
        None, description="When the runtime image is pulled."
    )
    suspend: bool = Field(False, description="true takes all replicas away and keeps the weights.")


class Condition(Part):
    """One aspect of the state, as in other Kubernetes objects."""

    type: str = Field(description="Accepted, Planned, WeightsReady, RuntimeReady or Ready.")
    status: Literal["True", "False", "Unknown"] = Field(description="Whether it holds.")
    reason: str = Field(description="Why, in one word that programs may compare.")
    message: str = Field(description="Why, and what to do, for a person.")
    last_transition_time: str = Field(
        description="When status last changed.", json_schema_extra={"format": "date-time"}
    )
    observed_generation: int | None = Field(None, description="metadata.generation this was found for.")


class WeightsStatus(Part):
    """The weights in use or under way."""

    source: str | None = Field(None, description="Hub and model the weights come from.")
    revision: str | None = Field(None, description="Commit that the revision was resolved to.")
    request: str | None = Field(None, description="Hash of the spec.model this was resolved for.")
    planned: str | None = Field(None, description="Hash of what the plan was made for.")
    bytes: int | None = Field(None, description="Bytes fetched so far.")
    total: int | None = Field(None, description="Bytes in all.")
    rate: int | None = Field(None, description="Bytes a second.")
    eta: int | None = Field(None, description="Seconds left at this rate.")
    progress: str | None = Field(None, description="Share of the bytes that is here, for the printer column.")


class InferenceModelStatus(Part):
    """What is found."""

    observed_generation: int | None = Field(
        None, description="metadata.generation this status was computed for."
    )
    phase: str | None = Field(
        None,
        description="One word for people: Pending, Planning, Downloading, Starting, Updating, Ready, Idle, Degraded, "
        "Suspended or Failed. Programs read the conditions.",
    )
    message: str | None = Field(None, description="What holds the model back, if anything, and what to do.")
    plan: str | None = Field(
        None, description="One line: architecture, bytes of weights and KV cache, what fits."
    )
    endpoint: str | None = Field(None, description="Address of the model's OpenAI API in the cluster.")
    replicas: int | None = Field(None, description="Pods that exist.")
    ready_replicas: int | None = Field(None, description="Pods that are ready.")
    ready: str | None = Field(None, description="Ready pods of those wanted, for the printer column.")
    revision: str | None = Field(None, description="Hash of the pod template that is rolled out.")
    selector: str | None = Field(None, description="Label selector of the pods, for the scale subresource.")
    weights: WeightsStatus | None = Field(None, description="The weights in use or under way.")
    conditions: list[Condition] = Field(
        default_factory=list,
        description="Accepted, Planned, WeightsReady, RuntimeReady and Ready.",
        json_schema_extra={"x-kubernetes-list-type": "map", "x-kubernetes-list-map-keys": ["type"]},
    )


class InferenceModel(Part):
    """A model that is served: one object a model."""

    api_version: str = Field("kubeinfer.io/v1alpha1", description="API version.")
    kind: str = Field("InferenceModel", description="Kind.")
    metadata: dict[str, Any] = Field(default_factory=dict, description="Metadata.")
    spec: InferenceModelSpec = Field(description="What is wanted.")
    status: InferenceModelStatus = Field(
        default_factory=lambda: InferenceModelStatus.model_validate({}), description="What is found."
    )
