"""Which tokens run in the next step.

There are no phases: a request has tokens known and tokens computed, and a step hands out one token budget, running
requests first, then waiting ones. Chunked prefill, prefix hits and resuming after preemption all follow from that.
A step may be planned while the one before is in flight: its sampled tokens count as known though their values are not.
In a pipeline of S stages S steps run at once: each takes an S-th of the decodes, so that they wait for none before them.
"""

from __future__ import annotations

import heapq
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from kubeinfer.engine.kv_cache import KVCacheManager
from kubeinfer.engine.messages import EngineOutput, EngineRequest, EngineStats, TokenLogprobs
from kubeinfer.engine.plan import NewRow, StepPlan, StepResult
from kubeinfer.engine.request import Request

_COMPUTED_NAN = (
    "no token has a score: the model computed NaN, by weights that are broken "
    "or by an overflow in float16 (--dtype bfloat16 has none)"
)
_LEFT_NONE = ", or logit_bias, allowed_token_ids, bad_words or min_tokens of the request leave no token"


@dataclass(frozen=True)
class SchedulerConfig:
    max_num_seqs: int
    max_num_batched_tokens: int
    max_model_len: int
    long_prefill_token_threshold: int = 0
    enable_chunked_prefill: bool = True
    policy: str = "fcfs"
    num_stages: int = 1  # of the pipeline
    wait_for_tokens: bool = False  # plan no decode whose token is in flight


class WaitingQueue:
    """Waiting requests, first come first served or by priority; a preempted request goes first of its kind."""

    def __init__(self, policy: str):
        self._by_priority = policy == "priority"
        self._queue: deque[Request] = deque()
        self._heap: list[tuple[tuple[int, float, int], Request]] = []
        self._gone: set[int] = set()  # orders of requests removed from the heap before they were popped

    def __len__(self) -> int:
        return len(self._heap) - len(self._gone) if self._by_priority else len(self._queue)

    def __iter__(self) -> Iterator[Request]:
        if self._by_priority:
            return (r for _, r in sorted(self._heap) if r.order not in self._gone)
        return iter(self._queue)

    def push(self, request: Request, front: bool = False) -> None:
        if self._by_priority:
            heapq.heappush(self._heap, (request.sort_key, request))
        elif front:
            self._queue.appendleft(request)
        else:
            self._queue.append(request)

    def peek(self) -> Request:
        if not self._by_priority:
            return self._queue[0]
        while self._heap[0][1].order in self._gone:
            self._gone.discard(heapq.heappop(self._heap)[1].order)
        return self._heap[0][1]

    def pop(self) -> Request:
        if not self._by_priority:
            return self._queue.popleft()
        self.peek()
        return heapq.heappop(self._heap)[1]

    def remove(self, request: Request) -> None:
        if self._by_priority:
            self._gone.add(request.order)
        else:
            self._queue.remove(request)


class Scheduler:
    """Plans steps and takes in their results. Plain integers throughout."""

    def __init__(self, config: SchedulerConfig, kv_cache: KVCacheManager):
        self.config = config
        self.kv_cache = kv_cache
        self.requests: dict[str, Request] = {}
        self.waiting = WaitingQueue(config.policy)
        self.running: list[Request] = []
        self._free_rows = list(range(config.max_num_seqs - 1, -1, -1))
        self._released_rows: list[int] = []
        self._order = 0
        self._in_flight: deque[list[Request]] = (
            deque()
        )  # requests that sample, a list for each step not yet taken in
        self.num_preemptions = 0
        self.num_prompt_tokens = 0
        self.num_generation_tokens = 0
        self.num_steps = 0

    # ---- requests come and go ----

    def add(self, engine_request: EngineRequest) -> None:
        request = Request(engine_request, self._order, self.config.max_model_len)
        self._order += 1
        self.requests[request.request_id] = request
        self.waiting.push(request)

    def abort(self, request_ids: Iterable[str]) -> list[EngineOutput]:
        """End requests now, whatever their state; unknown ids (already finished) are fine."""
        outputs = []
        for request_id in request_ids:
            request = self.requests.get(request_id)
            if request is None:
                continue
            if request.row >= 0:
                self.running.remove(request)
            else:
                self.waiting.remove(request)
            self._release(request)
            outputs.append(EngineOutput(request_id, [], finish_reason="abort"))
        return outputs

    def has_unfinished(self) -> bool:
        return bool(self.requests) or bool(self._in_flight)

    def _release(self, request: Request) -> None:
        request.aborted = True  # results of steps in flight are dropped
        self.kv_cache.free(request)
        self._give_row_back(request)
        del self.requests[request.request_id]

    def _give_row_back(self, request: Request) -> None:
        if request.row >= 0:
            self._free_rows.append(request.row)
            self._released_rows.append(request.row)
            request.row = -1

    # ---- planning a step ----

    def schedule(self) -> StepPlan | None:
        """The next step, or None if nothing can run before a step in flight ends."""
        config, kv_cache = self.config, self.kv_cache
        budget = config.max_num_batched_tokens
        threshold = config.long_prefill_token_threshold or budget
        decodes: list[Request] = []
        chunks: list[tuple[Request, int]] = []
        new_blocks: list[tuple[int, int, list[int]]] = []
        history: list[tuple[int, list[int]]] = []
        preempted = False
        if config.policy == "priority":
            self.running.sort(key=lambda r: r.sort_key)

        running = self.running
        block_size, next_step = kv_cache.block_size, self.num_steps + 1
        # Steps that follow one another hold different decodes, as many as there are stages, or requests if they are fewer.
        apart = min(config.num_stages, len(running))
        most_decodes = -(-len(running) // config.num_stages)
        index = 0
        while index < len(running) and budget > 0:
            request = running[index]
            index += 1
            in_flight = request.num_in_flight
            total = len(request.token_ids) + in_flight
            if in_flight and (
                total >= request.max_total
                or request.needs_history
                or config.wait_for_tokens
                or next_step - request.last_step < apart
            ):
                continue  # its last token is on its way, the next one depends on it, or it belongs to another step
            num_new = total - request.num_computed
            if num_new == 1:
                if len(decodes) >= most_decodes:
                    continue
            elif num_new > 1:
                num_new = min(num_new, threshold, budget)
            end = request.num_computed + num_new
            held = len(request.block_ids)
            if end > held * block_size:  # of most decodes it is not, and there may be a thousand
                while (blocks := kv_cache.allocate(request, end)) is None:
                    victim = running.pop()
                    self._preempt(victim)
                    preempted = True
                    if victim is request:
                        break
                if blocks is None:
                    break
                new_blocks.append((request.row, held, blocks))
            if request.needs_history:
                history.append((request.row, request.token_ids[request.prompt_len :]))
            budget -= num_new
            if num_new == 1 and end == total:
                decodes.append(request)
            else:
                chunks.append((request, num_new))
            request.num_computed = end
            if end // block_size > request.num_registered:
                kv_cache.register_full_blocks(request, end)

        new_rows: list[NewRow] = []
        if not preempted:
            self._admit(budget, threshold, decodes, chunks, new_rows)
        if not decodes and not chunks:
            return None
        return self._make_plan(decodes, chunks, new_rows, new_blocks, history)

    def _admit(
        self,
        budget: int,
        threshold: int,
        decodes: list[Request],
        chunks: list[tuple[Request, int]],
        new_rows: list[NewRow],
    ) -> None:
        """Start waiting requests while rows, budget and blocks last."""
        config, kv_cache = self.config, self.kv_cache
        # Blocks kept free so that a request just admitted does not push a running one out in the next step.
        reserve = min(len(self.running), kv_cache.num_usable // 100)
        # And those that prompts already begun have yet to take.
        owed = sum(kv_cache.blocks_for(len(r.token_ids)) - len(r.block_ids) for r, _ in chunks)
        while self.waiting and budget > 0 and self._free_rows:
            request = self.waiting.peek()
            if request.num_in_flight:
                break  # preempted a moment ago; its last token is still on its way
            prefix = kv_cache.match_prefix(request)
            num_known = len(request.token_ids)
            cached = len(prefix) * kv_cache.block_size
            num_new = num_known - cached
            limit = min(threshold, budget)
            if num_new > limit:
                if not config.enable_chunked_prefill and (
                    chunks or decodes or budget < config.max_num_batched_tokens
                ):
                    break  # waits for a step of its own
                num_new = limit
            # The whole prompt must find room beside what runs: chunk by chunk, prompts would push each other out.
            end = num_known + 1 if self.running else cached + num_new
            needed = kv_cache.blocks_for(end) - len(prefix) + (reserve + owed if self.running else 0)
            # A hit that lies in the free list leaves it when taken, so it counts as needed too.
            if needed + kv_cache.count_free(prefix) > kv_cache.num_free:
                break
            if (decodes or chunks) and kv_cache.exceeds_copies(prefix):
                kv_cache.prefetch(
                    request, prefix
                )  # the rest in later steps: running streams wait for the copies
                break
            self.waiting.pop()
            kv_cache.take_prefix(request, prefix)
            if kv_cache.allocate(request, cached + num_new) is None:
                raise RuntimeError(
                    "KV cache accounting is wrong: blocks counted as free could not be allocated"
                )
            if request.num_cached < 0:
                request.num_cached = cached
                request.scheduled_time = time.time()
                self.num_prompt_tokens += request.prompt_len
            request.row = self._free_rows.pop()
            self.running.append(request)
            request.num_computed = cached + num_new
            kv_cache.register_full_blocks(request, request.num_computed)
            owed += kv_cache.blocks_for(num_known) - len(request.block_ids)
            budget -= num_new
            if num_new == 1 and request.num_computed == num_known:
                decodes.append(request)
            else:
                chunks.append((request, num_new))
            engine_request = request.engine_request
            new_rows.append(
                NewRow(
                    request.row,
                    request.token_ids.copy(),
                    request.prompt_len,
                    request.params,
                    engine_request.seed,
                    request.block_ids.copy(),
                    engine_request.eos_token_ids,
                    request.max_total,
                )
            )

    def _make_plan(
        self,
        decodes: list[Request],
        chunks: list[tuple[Request, int]],
        new_rows: list[NewRow],
        new_blocks: list[tuple[int, int, list[int]]],
        history: list[tuple[int, list[int]]],
    ) -> StepPlan:
        num_decodes = len(decodes)
        rows = [r.row for r in decodes]
        starts = [r.num_computed - 1 for r in decodes]
        num_tokens = [1] * num_decodes
        sampled = list(range(num_decodes))
        samplers = decodes
        for request, num_new in chunks:
            if request.num_computed == len(
                request.token_ids
            ):  # a chunk's tokens are all known: none in flight
                sampled.append(len(rows))
                samplers.append(request)
            rows.append(request.row)
            starts.append(request.num_computed - num_new)
            num_tokens.append(num_new)
        self.num_steps += 1
        for request in samplers:
            request.num_in_flight += 1
            request.last_step = self.num_steps
        self._in_flight.append(samplers)
        released, self._released_rows = self._released_rows, []
        copies_out, copies_in = self.kv_cache.take_copies()
        return StepPlan(
            self.num_steps,
            rows,
            starts,
            num_tokens,
            num_decodes,
            sampled,
            new_rows,
            new_blocks,
            released,
            history,
            copies_out,
            copies_in,
        )

    def _preempt(self, request: Request) -> None:
        """Take a running request's blocks; it will be computed again from its known tokens."""
        self.kv_cache.free(request)
        request.num_computed = 0
        self._give_row_back(request)
        self.waiting.push(request, front=True)
        self.num_preemptions += 1

    # ---- taking in a step's result ----

    def update(self, result: StepResult) -> list[EngineOutput]:
        """Append the oldest step's sampled tokens; finish requests that met a stop condition."""
        outputs: list[EngineOutput] = []
        failed: list[EngineOutput] = []
        prompt_logprobs = result.prompt_logprobs
        logprobs = result.logprobs
        finished = False
        for i, (request, token) in enumerate(zip(self._in_flight.popleft(), result.token_ids)):
            request.num_in_flight -= 1
            if request.aborted:
                continue
            if token < 0:
                failed.append(self._fail(request))
                continue
            tokens = request.token_ids
            tokens.append(token)
            reason, stop = self._finish_reason(request, token)
            output = EngineOutput(request.request_id, [token], reason, stop)
            if len(tokens) == request.prompt_len + 1:
                output.num_cached_tokens = request.num_cached
                output.scheduled_time = request.scheduled_time
                if prompt_logprobs is not None and request.params.prompt_logprobs is not None:
                    entries: list[TokenLogprobs | None] = [None]
                    entries.extend(prompt_logprobs.get(i, ()))
                    output.prompt_logprobs = entries
            if logprobs is not None and i in logprobs:
                output.logprobs = [logprobs[i]]
            outputs.append(output)
            if reason is not None:
                finished = True
                self._end(request)
        self.num_generation_tokens += len(outputs)
        if finished or failed:
            self.running = [r for r in self.running if not r.aborted]
        return outputs + failed if failed else outputs

    def _fail(self, request: Request) -> EngineOutput:
        """End a request whose last step has no token for it; nobody gets what it has in the prefix cache."""
        self.kv_cache.forget(request)
        self._end(request)
        params = request.params
        limited = (
            params.logit_bias or params.allowed_token_ids or params.bad_words_token_ids or params.min_tokens
        )
        why = _COMPUTED_NAN + _LEFT_NONE if limited else _COMPUTED_NAN
        return EngineOutput(request.request_id, [], "error", error=why)

    def _end(self, request: Request) -> None:
        if request.row < 0:  # preempted while its last token was in flight
            self.waiting.remove(request)
        self._release(request)

    def _finish_reason(self, request: Request, token: int) -> tuple[str | None, int | None]:
        length = len(request.token_ids)
        if token in request.stops and length - request.prompt_len >= request.params.min_tokens:
            return "stop", None if token in request.eos else token
        if length >= request.max_total:
            return "length", None
        return None, None

    # ---- looking at the state ----

    def stats(self) -> EngineStats:
        return EngineStats(
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            kv_cache_usage=self.kv_cache.usage,
            prefix_cache_queries=self.kv_cache.prefix_queries,
            prefix_cache_hits=self.kv_cache.prefix_hits,
            num_preemptions=self.num_preemptions,
            prompt_tokens=self.num_prompt_tokens,
            generation_tokens=self.num_generation_tokens,
            num_steps=self.num_steps,
            prefix_cache_host_hits=self.kv_cache.host_hits,
            host_cache_usage=self.kv_cache.host_usage,
            blocks_copied_out=self.kv_cache.num_copied_out,
        )

    def check_integrity(self) -> None:
        """Recompute every invariant of scheduler and cache; raise AssertionError where one is broken."""
        self.kv_cache.check_integrity(self.requests.values())
        rows = [r.row for r in self.running]
        if -1 in rows or len(set(rows)) != len(rows) or set(rows) & set(self._free_rows):
            raise AssertionError("rows of running requests are not their own")
        if len(rows) + len(self._free_rows) != self.config.max_num_seqs:
            raise AssertionError("a row was lost")
        waiting = list(self.waiting)
        if len(waiting) + len(self.running) != len(self.requests):
            raise AssertionError("a request is neither waiting nor running")
        for request in waiting:
            if request.block_ids or request.row != -1:
                raise AssertionError(f"waiting request {request.request_id} holds blocks or a row")
        for request in self.running:
            if request.num_computed > len(request.token_ids) + request.num_in_flight:
                raise AssertionError(f"request {request.request_id} computed tokens that are not known")
            if len(request.block_ids) * self.kv_cache.block_size < request.num_computed:
                raise AssertionError(f"request {request.request_id} computed tokens without blocks")
