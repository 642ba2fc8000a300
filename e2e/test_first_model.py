"""From `kubectl apply` to an answer, and what a person sees on the way."""

from __future__ import annotations

import json
import re
import time

from harness.client import Client
from harness.hub import Hub
from harness.kube import KubeError, Object, condition, ready
from harness.models import CONDITIONS, Models, manifest

FIRST_TOKEN_S = 20.0


def test_example_becomes_ready(model: Object, models: Models) -> None:
    name, generation = model["metadata"]["name"], model["metadata"]["generation"]
    for kind in CONDITIONS:
        found = condition(model, kind)
        assert found["status"] == "True", found
        assert found["observedGeneration"] == generation, found
        assert re.fullmatch(r"[A-Z][A-Za-z]+", found["reason"]), found
    status = model["status"]
    assert status["phase"] == "Ready"
    assert re.fullmatch(r"[0-9a-f]{40}", status["weights"]["revision"])
    assert status["weights"]["bytes"] == status["weights"]["total"] > 90_000_000
    assert status["readyReplicas"] == 1
    assert name in status["endpoint"]
    assert "of weights" in status["plan"]


def test_columns(model: Object, models: Models) -> None:
    header, row = models.kube.run("get", "im", model["metadata"]["name"]).strip().splitlines()
    assert header.split() == ["NAME", "MODEL", "PHASE", "WEIGHTS", "READY", "ENDPOINT", "AGE"]
    cells = row.split()
    assert cells[1] == model["spec"]["model"]["uri"]
    assert cells[2:5] == ["Ready", "100%", "1/1"]


def test_events_tell_the_story(model: Object, models: Models) -> None:
    selector = f"involvedObject.kind=InferenceModel,involvedObject.name={model['metadata']['name']}"
    events = json.loads(models.kube.run("get", "events", "--field-selector", selector, "-o", "json"))["items"]
    reasons = {event["reason"] for event in events}
    # A transition of each of these, with the message of its condition
    for kind in ("Planned", "WeightsReady", "Ready"):
        assert condition(model, kind)["reason"] in reasons, f"{kind}: {sorted(reasons)}"


def test_runtime_pod_is_hardened(model: Object, models: Models) -> None:
    (pod,) = [pod for pod in models.pods(model["metadata"]["name"]) if ready(pod)]
    assert pod["spec"]["automountServiceAccountToken"] is False
    assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
    (container,) = pod["spec"]["containers"]
    assert container["securityContext"]["readOnlyRootFilesystem"] is True
    assert container["securityContext"]["capabilities"]["drop"] == ["ALL"]
    identity = models.kube.run("exec", pod["metadata"]["name"], "--", "id", "-u").strip()
    assert identity != "0"


def test_stream_through_the_gateway(model: Object, client: Client) -> None:
    load = client.load(model["metadata"]["name"], "--once", streams=1, tokens=12)
    (result,) = load.finish()["results"]
    assert result["error"] == ""
    assert len(result["text"].split()) > 3


def test_greedy_answer_is_the_model_and_not_noise(model: Object, client: Client) -> None:
    answer = client.chat(
        model["metadata"]["name"], "What is the capital of France?", max_tokens=16, temperature=0
    )
    assert answer["status"] == 200, answer["text"]
    body = json.loads(answer["text"])
    assert "Paris" in body["choices"][0]["message"]["content"]
    assert body["usage"]["completion_tokens"] > 0


def test_gateway_lists_the_model_and_refuses_others(model: Object, client: Client) -> None:
    listed = json.loads(client.call("/v1/models")["text"])["data"]
    assert model["metadata"]["name"] in {entry["id"] for entry in listed}
    answer = client.chat("no-such-model")
    assert answer["status"] == 404
    assert "no-such-model" in json.loads(answer["text"])["error"]["message"]


def test_answers_through_its_own_service(model: Object, client: Client) -> None:
    name = model["metadata"]["name"]
    answer = client.call("/v1/models", url=model["status"]["endpoint"].removesuffix("/").removesuffix("/v1"))
    assert answer["status"] == 200
    assert name in {entry["id"] for entry in json.loads(answer["text"])["data"]}


def test_apply_to_first_token(models: Models, client: Client, hub: Hub, shared_weights: str) -> None:
    """With images and weights present: at most 20 s on 2 cores."""
    shared = manifest("warm", storage={"existingClaim": shared_weights})
    with models.temporary(shared) as name:
        models.wait_ready(name)
    models.wait_gone(name)
    hub.reset_stats()
    started = time.monotonic()
    with models.temporary(shared) as name:
        load = client.load(name, "--once", "--patient", streams=1, tokens=4)
        (result,) = load.finish()["results"]
        elapsed = time.monotonic() - started - (result["seconds"] - result["first"])
        print(f"apply to first token: {elapsed:.1f} s")
        assert result["error"] == ""
        assert elapsed <= FIRST_TOKEN_S
    assert hub.stats().get("bytes", 0) < 1_000_000, "weights that were there were fetched again"


def test_kubectl_apply_again_changes_nothing(model: Object, models: Models, example: Object) -> None:
    name = model["metadata"]["name"]
    pods = {pod["metadata"]["uid"] for pod in models.pods(name)}
    models.kube.apply(example)
    time.sleep(3)
    after = models.get(name)
    assert after["metadata"]["generation"] == model["metadata"]["generation"]
    assert {pod["metadata"]["uid"] for pod in models.pods(name)} == pods


def test_mistakes_are_named(models: Models) -> None:
    """Refused by the API server, or accepted and then Accepted=False with what to change."""
    wrong = manifest("wrong", autoscaling={"minReplicas": 5, "maxReplicas": 2})
    try:
        models.kube.apply(wrong)
    except KubeError as refusal:
        message = str(refusal)
    else:
        message = str(models.wait_reason("wrong", "Accepted", {"InvalidSpec"}, 10)["message"])
        assert not models.pods("wrong")
        models.kube.delete("inferencemodel", "wrong", "--wait=false")
    assert "maxReplicas" in message
