"""A step's plan (scheduler to worker) and its result (worker to scheduler)."""

from __future__ import annotations

import msgspec

from kubeinfer.engine.messages import TokenLogprobs
from kubeinfer.sampling_params import SamplingParams


class NewRow(msgspec.Struct, array_like=True):
    """A request that takes a row of the worker's tables, new or resumed after a preemption."""

    row: int
    token_ids: list[int]  # all that are known: the prompt, and outputs of a resumed request
    prompt_len: int
    params: SamplingParams
    seed: int
    block_ids: list[int]
    eos_token_ids: list[int]
    max_total: int


class StepPlan(msgspec.Struct, array_like=True):
    """One forward pass: ``num_tokens[i]`` tokens of row ``rows[i]``, from position ``starts[i]``.

    The first ``num_decodes`` entries compute just a sequence's last token. ``sampled`` are the indices (into ``rows``)
    of entries that reach their sequence's end and so sample its next token.
    """

    step: int
    rows: list[int]
    starts: list[int]
    num_tokens: list[int]
    num_decodes: int
    sampled: list[int]
    new_rows: list[NewRow]
    # blocks appended to rows that the worker knows already: row, first index in its table, ids
    new_blocks: list[tuple[int, int, list[int]]]
    released_rows: list[int]
    # tokens that rows sampled earlier, for rows whose sampling looks back at them on the host
    history: list[tuple[int, list[int]]] = []
    # KV blocks to copy before the step, first out (device block, host block), then in (host block, device block)
    copies_out: list[tuple[int, int]] = []
    copies_in: list[tuple[int, int]] = []

    @property
    def chunk_tokens(self) -> int:
        """Tokens of the entries that are no decodes."""
        return sum(self.num_tokens[self.num_decodes :])


class StepResult(msgspec.Struct, array_like=True):
    """What the worker sampled, in the order of ``StepPlan.sampled``."""

    token_ids: list[int]
    logprobs: dict[int, TokenLogprobs] | None = None  # by index into ``sampled``
    # by index into ``sampled``: the whole prompt from its second token on, with the request's first sampled token
    prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None
