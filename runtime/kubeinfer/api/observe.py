"""Joins the engine's hooks to the metrics."""

from __future__ import annotations

import msgspec

from kubeinfer.async_llm import AsyncLLM, RequestRecord
from kubeinfer.engine.messages import EngineStats
from kubeinfer.metrics import Metrics


def current_stats(engine: AsyncLLM) -> EngineStats:
    """The engine's state as of now. What it last said is that of its last step: a request that came or was aborted
    since then is accounted for here, so that a drain or an autoscaler never waits on a request that is gone."""
    said = engine.stats
    unfinished = engine.num_unfinished
    if unfinished == 0:
        return msgspec.structs.replace(said, num_running=0, num_waiting=0, kv_cache_usage=0.0)
    return msgspec.structs.replace(said, num_waiting=max(said.num_waiting, unfinished - said.num_running))


def attach_metrics(engine: AsyncLLM, model_name: str) -> Metrics:
    """Metrics that follow ``engine``."""
    metrics = Metrics(model_name, lambda: current_stats(engine))

    def on_finished(record: RequestRecord) -> None:
        for reason in record.finish_reasons:
            metrics.finished[reason] = metrics.finished.get(reason, 0) + 1
        for seconds in record.inter_token_times:
            metrics.inter_token_latency.observe(seconds)
        metrics.observe_request(
            prompt_tokens=record.num_prompt_tokens,
            generation_tokens=record.num_output_tokens,
            arrival=record.arrival_time,
            scheduled=record.scheduled_time,
            first_token=record.first_token_time,
            finished=record.finished_time,
            n=len(record.finish_reasons),
        )

    engine.on_request_finished = on_finished
    return metrics
