"""CEL rules: valid, equal to their Python twins on random specs, and with a message that says what to do."""

from __future__ import annotations

from typing import Any

import cel
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from operator_world import with_defaults

from kubeinfer_operator.api.rules import NAME_RULE, SPEC_RULES, broken_rules
from kubeinfer_operator.api.validate import Refused, read_spec


def _maybe(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


SPECS = st.fixed_dictionaries(
    {
        "model": st.fixed_dictionaries(
            {
                "uri": st.sampled_from(
                    [
                        "hf://a/b",
                        "hf://a/b@main",
                        "modelscope://a/b",
                        "pvc://c/d",
                        "file:///m",
                        "a/b",
                        "a/b@x",
                    ]
                )
            },
            optional={
                "revision": st.sampled_from(["main", "v1"]),
                "mirrors": st.lists(st.just("hf://c/d"), max_size=2),
                "tokenSecretRef": st.just({"name": "t"}),
            },
        )
    },
    optional={
        "engine": _maybe(
            tensorParallelSize=st.integers(1, 4),
            pipelineParallelSize=st.integers(1, 3),
            swapSpace=st.just(1.0),
            cpuOffloadGb=st.just(2.0),
            gpuMemoryUtilization=st.just(0.5),
            cudagraphCaptureSizes=st.just([1]),
            disableCustomAllReduce=st.booleans(),
            cpuKvcacheSpace=st.just(1.5),
        ),
        "resources": _maybe(device=st.sampled_from(["gpu", "cpu"]), count=st.integers(1, 4)),
        "storage": _maybe(
            persistentVolumeClaim=st.just({}),
            existingClaim=st.just("c"),
            hostPath=st.just({"path": "/x"}),
            ephemeral=st.just({}),
        ),
        "template": _maybe(
            labels=st.dictionaries(
                st.sampled_from(["a", "kubeinfer.io/x", "app.kubernetes.io/y"]), st.just("1")
            )
        ),
        "autoscaling": _maybe(minReplicas=st.integers(0, 4)).map(lambda a: {"maxReplicas": 2, **a}),
    },
)


@given(SPECS)
@settings(max_examples=300, deadline=None)
def test_cel_and_python_agree(spec: dict[str, Any]) -> None:
    stored = with_defaults(spec)
    for rule in SPEC_RULES:
        assert cel.evaluate(rule.cel, {"self": stored}) == rule.holds(stored), rule.cel


@given(
    st.one_of(st.text("abcXYZ019-._", max_size=50), st.from_regex(r"[a-z][-a-z0-9]{0,45}", fullmatch=True))
)
@settings(max_examples=300, deadline=None)
def test_names_agree(name: str) -> None:
    obj = {"metadata": {"name": name}}
    assert cel.evaluate(NAME_RULE.cel, {"self": obj}) == NAME_RULE.holds(obj)


BREAKING: list[tuple[dict[str, Any], str]] = [
    ({"resources": {"device": "cpu", "count": 2}}, "resources.requests.cpu"),
    ({"engine": {"tensorParallelSize": 2}}, "resources.count"),
    ({"storage": {"ephemeral": {}, "existingClaim": "c"}}, "keep one of"),
    ({"model": {"uri": "pvc://c/d"}, "storage": {"ephemeral": {}}}, "leave storage out"),
    ({"model": {"uri": "file:///d", "mirrors": ["hf://a/b"]}}, "leave them out"),
    ({"model": {"uri": "hf://a/b@x", "revision": "y"}}, "given twice"),
    ({"autoscaling": {"minReplicas": 3, "maxReplicas": 2}}, "autoscaling.maxReplicas"),
    ({"resources": {"device": "cpu"}, "engine": {"swapSpace": 4}}, "no effect on the CPU"),
    ({"engine": {"cpuKvcacheSpace": 4}}, "gpuMemoryUtilization"),
    ({"template": {"labels": {"kubeinfer.io/model": "x"}}}, "template.labels"),
]


@pytest.mark.parametrize(("spec", "words"), BREAKING)
def test_every_rule_can_break_and_says_what_to_do(spec: dict[str, Any], words: str) -> None:
    spec = {"model": {"uri": "hf://a/b"}, **spec}
    (rule,) = broken_rules("name", with_defaults(spec))
    assert words in rule.message
    assert cel.evaluate(rule.cel, {"self": with_defaults(spec)}) is False
    with pytest.raises(Refused) as refused:
        read_spec("name", spec)
    assert rule.message in str(refused.value)


def test_all_rules_are_covered() -> None:
    broken = set()
    for spec, _ in BREAKING:
        broken |= {
            rule.cel for rule in broken_rules("name", with_defaults({"model": {"uri": "hf://a/b"}, **spec}))
        }
    assert broken == {rule.cel for rule in SPEC_RULES}
