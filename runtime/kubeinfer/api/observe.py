"""Joins the engine's hooks to the metrics."""

from __future__ import annotations

from kubeinfer.async_llm import AsyncLLM, RequestRecord
from kubeinfer.metrics import Metrics


def attach_metrics(engine: AsyncLLM, model_name: str) -> Metrics:
    """Metrics that follow ``engine``."""
    metrics = Metrics(model_name, lambda: engine.stats)

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
