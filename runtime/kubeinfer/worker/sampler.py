"""Turns a step's logits into tokens: what each request asked for, on the device."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kubeinfer.engine.messages import TokenLogprobs
from kubeinfer.engine.plan import NewRow, StepPlan
from kubeinfer.kernels import sampling as kernels
from kubeinfer.kernels.batch_invariance import batch_invariant
from kubeinfer.worker.packing import pack
from kubeinfer.worker.tables import to_device

_NEVER = float("-inf")


@dataclass(slots=True)
class _Special:
    """A row whose logits are edited before sampling: beyond temperature and truncation."""

    bias: tuple[list[int], list[float]] | None = None
    allowed: list[int] | None = None
    min_until: int = 0  # position before which ``stops`` may not be sampled
    stops: list[int] = field(default_factory=list)
    bad_words: list[list[int]] = field(default_factory=list)
    penalty_slot: int = -1


MIN_TEMPERATURE = 0.01  # as in vLLM; 0 is greedy


class Sampler:
    """Sampling state of every row, and the step that uses it."""

    def __init__(self, max_rows: int, vocab_size: int, device: torch.device):
        self.device = device
        self.vocab_size = vocab_size
        self.temperature: NDArray[np.float32] = np.zeros(max_rows, np.float32)
        self.top_k: NDArray[np.int32] = np.zeros(max_rows, np.int32)
        self.top_p: NDArray[np.float32] = np.ones(max_rows, np.float32)
        self.min_p: NDArray[np.float32] = np.zeros(max_rows, np.float32)
        self.seeds: NDArray[np.int64] = np.zeros(max_rows, np.int64)
        self.presence: NDArray[np.float32] = np.zeros(max_rows, np.float32)
        self.frequency: NDArray[np.float32] = np.zeros(max_rows, np.float32)
        self.repetition: NDArray[np.float32] = np.ones(max_rows, np.float32)
        self.num_logprobs: NDArray[np.int32] = np.full(max_rows, -2, np.int32)  # -2: none asked for
        self._special: dict[int, _Special] = {}
        self._penalised: dict[int, int] = {}  # row -> slot
        self._free_slots: list[int] = []
        self._prompt_mask: Tensor | None = None
        self._output_counts: Tensor | None = None

    # ---- rows come and go ----

    def apply(self, plan: StepPlan) -> None:
        for row in plan.released_rows:
            special = self._special.pop(row, None)
            if special is not None and special.penalty_slot >= 0:
                self._free_slots.append(special.penalty_slot)
                del self._penalised[row]
            self.num_logprobs[row] = -2
        for new in plan.new_rows:
            self._add(new)

    def _add(self, new: NewRow) -> None:
        params, row = new.params, new.row
        # Logits are divided by it: of the least fp32 numbers nothing would be left. What is so low is as good as greedy.
        self.temperature[row] = max(params.temperature, MIN_TEMPERATURE) if params.temperature else 0.0
        self.top_k[row] = min(max(0, params.top_k), self.vocab_size)
        self.top_p[row] = params.top_p
        self.min_p[row] = params.min_p
        self.seeds[row] = new.seed
        self.num_logprobs[row] = -2 if params.logprobs is None else params.logprobs
        special = _Special()
        needed = False
        if params.logit_bias:
            special.bias = (list(params.logit_bias), list(params.logit_bias.values()))
            needed = True
        if params.allowed_token_ids:
            special.allowed = params.allowed_token_ids
            needed = True
        if params.min_tokens > 0:
            special.min_until = new.prompt_len + params.min_tokens
            special.stops = sorted(
                {t for t in (*new.eos_token_ids, *(params.stop_token_ids or ())) if t < self.vocab_size}
            )
            needed = True
        if params.bad_words_token_ids:
            special.bad_words = params.bad_words_token_ids
            needed = True
        if params.presence_penalty or params.frequency_penalty or params.repetition_penalty != 1.0:
            self.presence[row] = params.presence_penalty
            self.frequency[row] = params.frequency_penalty
            self.repetition[row] = params.repetition_penalty
            special.penalty_slot = self._take_slot()
            self._penalised[row] = special.penalty_slot
            self._fill_slot(special.penalty_slot, new.token_ids, new.prompt_len)
            needed = True
        if needed:
            self._special[row] = special

    def _take_slot(self) -> int:
        if not self._free_slots:
            old = 0 if self._prompt_mask is None else self._prompt_mask.shape[0]
            size = max(8, 2 * old)
            mask = torch.zeros(size, self.vocab_size, dtype=torch.bool, device=self.device)
            counts = torch.zeros(size, self.vocab_size, dtype=torch.int32, device=self.device)
            if self._prompt_mask is not None and self._output_counts is not None:
                mask[:old], counts[:old] = self._prompt_mask, self._output_counts
            self._prompt_mask, self._output_counts = mask, counts
            self._free_slots = list(range(size - 1, old - 1, -1))
        return self._free_slots.pop()

    def _fill_slot(self, slot: int, token_ids: list[int], prompt_len: int) -> None:
        mask, counts = self._prompt_mask, self._output_counts
        if mask is None or counts is None:
            raise RuntimeError("penalty tables are made before a slot is filled")
        mask[slot].zero_()
        counts[slot].zero_()
        mask[slot, self._to(token_ids[:prompt_len])] = True
        if len(token_ids) > prompt_len:
            output = self._to(token_ids[prompt_len:])
            counts[slot].scatter_add_(0, output, torch.ones_like(output, dtype=torch.int32))

    # ---- a step ----

    def is_plain(self, rows: NDArray[np.int32]) -> bool:
        """Whether every row is greedy and asks for nothing else, so that argmax is all there is to do."""
        return (
            not self.temperature[rows].any()
            and not (self.num_logprobs[rows] != -2).any()
            and not (self._special and any(int(r) in self._special for r in rows))
        )

    def sample(
        self, logits: Tensor, rows: NDArray[np.int32], positions: NDArray[np.int32], plan: StepPlan
    ) -> tuple[Tensor, dict[int, TokenLogprobs] | None]:
        """Tokens int64 ``[S]`` for ``logits [S, V]`` of ``rows``, to stand at ``positions``; logprobs where asked for."""
        if self.is_plain(rows):
            return kernels.sample(
                logits,
                *self._no_params(logits),
                any_sampled=False,
                any_top_k=False,
                any_top_p=False,
                any_min_p=False,
            ), None
        asked = np.flatnonzero(self.num_logprobs[rows] != -2)
        raw = logits
        logits = self._edit(logits, rows, positions, plan)
        temperature = self.temperature[rows]
        sampled = temperature > 0
        top_k, top_p, min_p = self.top_k[rows], self.top_p[rows], self.min_p[rows]
        # In one transfer: a decode step sends them again and again.
        buffer, packing = pack(
            {
                "temperature": temperature.view(np.int32),
                "top_k": top_k,
                "top_p": top_p.view(np.int32),
                "min_p": min_p.view(np.int32),
                "seeds": self.seeds[rows].view(np.int32),
                "positions": positions,
            }
        )
        sent = packing.views(self._to(buffer))
        tokens = kernels.sample(
            logits,
            sent["temperature"].view(torch.float32),
            sent["top_k"],
            sent["top_p"].view(torch.float32),
            sent["min_p"].view(torch.float32),
            sent["seeds"].view(torch.int64),
            sent["positions"],
            any_sampled=bool(sampled.any()),
            any_top_k=bool((sampled & (top_k > 0)).any()),
            any_top_p=bool((sampled & (top_p < 1)).any()),
            any_min_p=bool((sampled & (min_p > 0)).any()),
        )
        self._count(tokens, rows)
        found = None
        if asked.size:
            found = self._logprobs(raw, tokens, rows, asked)
        return tokens, found

    def _no_params(self, logits: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
        """Placeholders of the right sizes: a greedy step reads none of them but the temperatures (all 0)."""
        count = logits.shape[0]
        zeros = torch.zeros(count, dtype=torch.float32, device=logits.device)
        ints = torch.zeros(count, dtype=torch.int64, device=logits.device)
        return zeros, ints, zeros, zeros, ints, ints

    def _to(self, values: NDArray[np.generic] | list[int] | list[float]) -> Tensor:
        return to_device(values, self.device)

    def _edit(
        self, logits: Tensor, rows: NDArray[np.int32], positions: NDArray[np.int32], plan: StepPlan
    ) -> Tensor:
        """Biases, allowed tokens, minimum lengths, bad words and penalties; a copy if any applies."""
        found = (
            [(i, int(row)) for i, row in enumerate(rows) if int(row) in self._special]
            if self._special
            else []
        )
        if not found:
            return logits
        logits = logits.float().clone()
        history = dict(plan.history)
        for i, row in found:
            special = self._special[row]
            if special.allowed is not None:
                keep = self._to(special.allowed)
                line = torch.full_like(logits[i], _NEVER)
                line[keep] = logits[i, keep]
                logits[i] = line
            if special.bias is not None:
                ids, values = special.bias
                logits[i, self._to(ids)] += self._to(values)
            if special.stops and positions[i] < special.min_until:
                logits[i, self._to(special.stops)] = _NEVER
            banned = [w[-1] for w in special.bad_words if _ends_with(history.get(row, []), w[:-1])]
            if banned:
                logits[i, self._to(banned)] = _NEVER
        if self._penalised and self._prompt_mask is not None and self._output_counts is not None:
            slots = np.array([self._penalised.get(int(r), -1) for r in rows], np.int32)
            if (slots >= 0).any():
                kernels.apply_penalties(
                    logits,
                    self._prompt_mask,
                    self._output_counts,
                    self._to(slots),
                    self._to(self.presence[rows]),
                    self._to(self.frequency[rows]),
                    self._to(self.repetition[rows]),
                )
        return logits

    def _count(self, tokens: Tensor, rows: NDArray[np.int32]) -> None:
        if self._penalised and self._output_counts is not None:
            slots = np.array([self._penalised.get(int(r), -1) for r in rows], np.int32)
            kernels.count_tokens(self._output_counts, self._to(slots), tokens)

    def _logprobs(
        self, logits: Tensor, tokens: Tensor, rows: NDArray[np.int32], asked: NDArray[np.intp]
    ) -> dict[int, TokenLogprobs]:
        counts = self.num_logprobs[rows[asked]]
        where = self._to(asked)
        chosen = tokens[where].clamp(min=0)  # of `NO_TOKEN` nothing is told
        entries = token_logprobs(logits[where], chosen, [int(c) for c in counts])
        return dict(zip((int(i) for i in asked), entries))


def _ends_with(history: list[int], prefix: list[int]) -> bool:
    return not prefix or history[-len(prefix) :] == prefix


def token_logprobs(logits: Tensor, tokens: Tensor, counts: list[int]) -> list[TokenLogprobs]:
    """For each row of ``logits [N, V]``: the chosen token's log-probability and rank, then the ``counts[i]`` likeliest
    (-1: all)."""
    if (
        batch_invariant() and len(counts) > 1
    ):  # which of equal entries come first may depend on rows and on their number
        rows = zip(logits.split(1), tokens.split(1), counts, strict=True)
        return [entry for row, token, count in rows for entry in token_logprobs(row, token, [count])]
    vocab = logits.shape[1]
    wanted = [vocab if c < 0 else min(c, vocab) for c in counts]
    chosen, ranks, values, ids = kernels.logprobs(logits, tokens, max(wanted, default=0))
    chosen_list, rank_list, token_list = chosen.tolist(), ranks.tolist(), tokens.tolist()
    value_list, id_list = values.tolist(), ids.tolist()
    return [
        TokenLogprobs([token_list[i], *id_list[i][:k]], [chosen_list[i], *value_list[i][:k]], rank_list[i])
        for i, k in enumerate(wanted)
    ]
