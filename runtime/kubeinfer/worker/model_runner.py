"""Runs a step: builds the batch's inputs, calls the model, samples."""

from __future__ import annotations

from bisect import bisect_left
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kubeinfer.distributed.pipeline import Pipeline
from kubeinfer.engine.messages import TokenLogprobs
from kubeinfer.engine.plan import StepPlan, StepResult
from kubeinfer.kernels.attention import DecodeWorkspace, plan_decodes
from kubeinfer.kernels.shared_prefix import SharedPrefix
from kubeinfer.layers.attention import StepContext, each_token_alone
from kubeinfer.layers.parallel import Stage
from kubeinfer.worker.cuda_graph import DecodeGraphs
from kubeinfer.worker.mixed_graph import MixedGraphs
from kubeinfer.worker.packing import pack
from kubeinfer.worker.returned_tokens import ReturnedTokens
from kubeinfer.worker.sampler import Sampler, token_logprobs
from kubeinfer.worker.shared_prefix import SharedBlocks, SharedPrefixFinder
from kubeinfer.worker.tables import RowTables, to_device


class PendingResult:
    """A step that has been launched. ``wait`` gives its result once the device is done."""

    def __init__(
        self,
        tokens: Tensor,
        logprobs: dict[int, TokenLogprobs] | None = None,
        prompt_logprobs: dict[int, list[TokenLogprobs]] | None = None,
        keep: list[int] | None = None,
        arrives: bool = False,
    ):
        """``arrives``: ``tokens`` are in the host's memory, where what was launched writes them."""
        self._keep = keep  # which of ``tokens`` are the step's; None: all
        self._logprobs = logprobs
        self._prompt_logprobs = prompt_logprobs
        self._event: Any = None
        self._tokens = tokens
        if tokens.is_cuda:
            self._tokens = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=True)
            self._tokens.copy_(tokens, non_blocking=True)
        if tokens.is_cuda or arrives:
            self._event = torch.cuda.Event()
            self._event.record()

    def wait(self) -> StepResult:
        if self._event is not None:
            self._event.synchronize()
        tokens = self._tokens.tolist()
        if self._keep is not None:
            tokens = [tokens[i] for i in self._keep]
        return StepResult(tokens, self._logprobs, self._prompt_logprobs)


class ModelRunner:
    """One rank's model with its KV cache and tables."""

    def __init__(
        self,
        model: Any,
        kv_caches: list[Tensor],
        block_size: int,
        max_rows: int,
        max_blocks: int,
        device: torch.device,
        pipeline: Pipeline | None = None,
        batch_invariant: bool = False,
    ):
        self.model = model
        self.batch_invariant = batch_invariant
        # On CPUs only the library's stack of layers computes every row for itself; torch's kernels need a row at a time.
        self._one_by_one = batch_invariant and device.type == "cpu" and getattr(model, "stack", None) is None
        self.pipeline = pipeline
        self.stage = pipeline.stage if pipeline is not None else Stage()
        self.kv_caches = kv_caches
        self.block_size = block_size
        self.device = device
        self.dtype: torch.dtype = getattr(torch, model.config.dtype)
        self.tables = RowTables(max_rows, max_blocks, device)
        self._returned = (
            ReturnedTokens(pipeline, self.tables) if pipeline is not None and self.stage.first else None
        )
        self.sampler = Sampler(max_rows, model.config.vocab_size, device)
        self.workspace: DecodeWorkspace | None = None
        self.graphs: DecodeGraphs | None = None
        self.mixed_graphs: MixedGraphs | None = None
        # None: decode rows read their prefixes each for itself. Set where the device's kernels can share them.
        self.shared_prefixes: SharedPrefixFinder | None = None
        self._prompt_logprobs: dict[
            int, tuple[int, int, list[TokenLogprobs]]
        ] = {}  # row -> (k, prompt_len, found)

    @torch.inference_mode()
    def execute(self, plan: StepPlan) -> PendingResult:
        """Launch the step. Rows released earlier are gone, new rows are taken in first."""
        self.tables.apply(plan)
        if self.stage.last:
            self._apply_sampling(plan)
        rows = np.array(plan.rows, np.int32)
        if self._returned is not None:
            self._returned.take(plan, rows)
        result = self._launch(plan, rows)
        if self._returned is not None:
            self._returned.expect(plan, rows)
        return result

    def _apply_sampling(self, plan: StepPlan) -> None:
        self.sampler.apply(plan)
        for row in plan.released_rows:
            self._prompt_logprobs.pop(row, None)
        for new in plan.new_rows:
            if new.params.prompt_logprobs is not None:
                self._prompt_logprobs[new.row] = (new.params.prompt_logprobs, new.prompt_len, [])

    def _launch(self, plan: StepPlan, rows: NDArray[np.int32]) -> PendingResult:
        starts = np.array(plan.starts, np.int32)
        if self.graphs is not None and plan.num_decodes == len(rows) and self.graphs.fits(len(rows)):
            return self._replay(plan, rows, starts)
        if self.mixed_graphs is not None and not self._prompt_logprobs:
            decodes = plan.num_decodes
            key = self.mixed_graphs.pick(decodes, plan.chunk_tokens, len(rows) - decodes)
            if key is not None:
                return self._replay_mixed(key, plan, rows, starts)
        inputs, step = self._inputs(plan, rows, starts)
        if self.pipeline is not None and not self.stage.first:
            inputs = self.pipeline.receive_hidden(self._hidden(len(inputs)))
        if self.batch_invariant:
            step = each_token_alone(step)
        hidden = (self._forward_one_by_one if self._one_by_one else self.model.forward)(inputs, step)
        if self.pipeline is not None and not self.stage.last:
            self.pipeline.send_hidden(hidden)
            return PendingResult(torch.empty(0, dtype=torch.int64))
        return self._sample(plan, hidden, rows, starts, step.wanted is not None)

    def _forward_one_by_one(self, inputs: Tensor, step: StepContext) -> Tensor:
        """The model's ``forward``, a token at a time, positions in order: a prefix may be another row's of this step."""
        results: dict[int, Tensor] = {}
        for i in torch.argsort(step.positions, stable=True).tolist():
            at = slice(i, i + 1)
            alone = replace(
                step, positions=step.positions[at], slot_mapping=step.slot_mapping[at], seq_lens=step.seq_lens[at],
                query_start=step.query_start[:2], block_table=step.block_table[at], num_decodes=1, wanted=None,
            )  # fmt: skip
            results[i] = self.model.forward(inputs[at].clone(), alone)
        hidden = torch.cat([results[i] for i in range(len(results))])
        return hidden if step.wanted is None else hidden.index_select(0, step.wanted)

    def _hidden(self, tokens: int) -> Tensor:
        """Room for hidden states ``[tokens, H]``."""
        return torch.empty(tokens, self.model.config.hidden_size, dtype=self.dtype, device=self.device)

    def _keep_tokens(self, rows: NDArray[np.int32], tokens: Tensor) -> None:
        """Where the next step of ``rows`` finds the tokens that they sampled."""
        if self.pipeline is not None:
            self.pipeline.send_tokens(tokens)
        else:
            self.tables.last_tokens[self._to(rows)] = tokens

    def _shared_blocks(self, rows: NDArray[np.int32], starts: NDArray[np.int32]) -> SharedBlocks | None:
        """What the decode rows share, if reading it once pays."""
        return self.shared_prefixes.find(rows, starts) if self.shared_prefixes is not None else None

    def _replay(self, plan: StepPlan, rows: NDArray[np.int32], starts: NDArray[np.int32]) -> PendingResult:
        if self.graphs is None:
            raise RuntimeError("no graph was captured")
        if self.pipeline is not None and not self.stage.first:
            self.pipeline.receive_hidden(self.graphs.hidden_in[: len(rows)])
        tokens, logits = self.graphs.replay(rows, starts, self._shared_blocks(rows, starts))
        if self.pipeline is not None and not self.stage.last:
            self.pipeline.send_hidden(self.graphs.hidden_out[: len(rows)].clone())
            return PendingResult(torch.empty(0, dtype=torch.int64))
        if self.sampler.is_plain(rows):
            if self.pipeline is not None:
                self.pipeline.send_tokens(tokens.clone())
            return PendingResult(tokens, arrives=self.pipeline is None)
        tokens, logprobs = self.sampler.sample(logits, rows, starts + 1, plan)
        self._keep_tokens(rows, tokens)
        return PendingResult(tokens, logprobs)

    def _replay_mixed(
        self, key: tuple[int, int], plan: StepPlan, rows: NDArray[np.int32], starts: NDArray[np.int32]
    ) -> PendingResult:
        graphs = self.mixed_graphs
        if graphs is None:
            raise RuntimeError("no graph was captured")
        decodes = plan.num_decodes
        shared = self._shared_blocks(rows[:decodes], starts[:decodes]) if graphs.takes_shared(key) else None
        real = graphs.replay(key, plan, rows, starts, shared)
        if not len(real):
            return PendingResult(torch.empty(0, dtype=torch.int64))
        sampled = np.array(plan.sampled, np.int32)
        rows = rows[sampled]
        if self.sampler.is_plain(rows):
            return PendingResult(graphs.tokens[: int(real[-1]) + 1], keep=real.tolist())
        positions = starts[sampled] + np.array(plan.num_tokens, np.int32)[sampled]
        tokens, logprobs = self.sampler.sample(graphs.logits[self._to(real)], rows, positions, plan)
        self._keep_tokens(rows, tokens)
        return PendingResult(tokens, logprobs)

    def _host_inputs(
        self, plan: StepPlan, rows: NDArray[np.int32], starts: NDArray[np.int32]
    ) -> dict[str, NDArray[np.int32]]:
        """The step's inputs as int32 arrays. Ids of decodes are 0: the device knows them."""
        num_decodes = plan.num_decodes
        lengths = np.array(plan.num_tokens, np.int32)
        query_start = np.zeros(len(rows) + 1, np.int32)
        np.cumsum(lengths, out=query_start[1:])
        if num_decodes == len(rows):
            positions, owners = starts, rows
            ids = np.zeros(num_decodes, np.int32)
        else:
            offsets = np.arange(query_start[-1], dtype=np.int32) - np.repeat(query_start[:-1], lengths)
            positions = np.repeat(starts, lengths) + offsets
            owners = np.repeat(rows, lengths)
            known = [
                self.tables.tokens[row][start : start + n]
                for row, start, n in zip(
                    plan.rows[num_decodes:], plan.starts[num_decodes:], plan.num_tokens[num_decodes:]
                )
            ]
            ids = np.concatenate((np.zeros(num_decodes, np.int32), *known))
        size = self.block_size
        return {
            "rows": rows,
            "ids": ids,
            "positions": positions,
            "slots": self.tables.block_table[owners, positions // size] * size + positions % size,
            "query_start": query_start,
            "seq_lens": starts + lengths,
        }

    def _inputs(
        self, plan: StepPlan, rows: NDArray[np.int32], starts: NDArray[np.int32]
    ) -> tuple[Tensor, StepContext]:
        host = self._host_inputs(plan, rows, starts)
        max_seq_len = int(host["seq_lens"].max())
        # Where not every token is sampled from, the model finishes only those that are.
        partial = self.stage.last and plan.num_decodes < len(rows) and not self._prompt_logprobs
        if partial:
            host["wanted"] = self._padded(host["query_start"][1:][np.array(plan.sampled, np.int32)] - 1)
        decodes = plan.num_decodes
        shared = self._shared_blocks(rows[:decodes], starts[:decodes])
        if shared is not None:
            host["members"], host["shared_tokens"] = np.empty((2, decodes), np.int32)
            shared.fill(host["members"], host["shared_tokens"])
        inputs = self._upload(host)
        if plan.num_decodes and self.stage.first:
            decoding = inputs["rows"][: plan.num_decodes]
            inputs["ids"][: plan.num_decodes] = self.tables.last_tokens[decoding].int()
        units = None
        if shared is None:
            units = plan_decodes(inputs["seq_lens"], decodes, max_seq_len, self.kv_caches[0])
        # A width of a multiple of 16 keeps to one compiled form of each kernel.
        width = min(-(-max_seq_len // self.block_size // 16) * 16, self.tables.block_table.shape[1])
        step = StepContext(
            positions=inputs["positions"],
            slot_mapping=inputs["slots"],
            query_start=inputs["query_start"],
            seq_lens=inputs["seq_lens"],
            block_table=self.tables.block_table_device[inputs["rows"], :width],
            max_query_len=max(plan.num_tokens),
            max_seq_len=max_seq_len,
            num_decodes=plan.num_decodes,
            kv_caches=self.kv_caches,
            workspace=self.workspace,
            wanted=inputs["wanted"] if partial else None,
            prefill_kv_tokens=int(host["seq_lens"][plan.num_decodes :].sum()),
            shared=None if shared is None else SharedPrefix(inputs["members"], inputs["shared_tokens"]),
            units=units,
        )
        return inputs["ids"], step

    def _padded(self, wanted: NDArray[np.int32]) -> NDArray[np.int32]:
        """``wanted``, its last repeated up to a number that decode steps were captured for.

        cuBLAS chooses a kernel by the number of rows, and loading one that no step has had waits for the device.
        """
        sizes = self.graphs.sizes if self.graphs is not None else []
        place = bisect_left(sizes, len(wanted))
        if not len(wanted) or place == len(sizes):
            return wanted
        return np.pad(wanted, (0, sizes[place] - len(wanted)), mode="edge")

    def _sample(
        self,
        plan: StepPlan,
        hidden: Tensor,
        rows: NDArray[np.int32],
        starts: NDArray[np.int32],
        partial: bool,
    ) -> PendingResult:
        """``hidden``: states of the sampled tokens, and perhaps of some more, if ``partial``, else of all."""
        found_prompt = self._collect_prompt_logprobs(plan, hidden) if self._prompt_logprobs else None
        if not plan.sampled:
            return PendingResult(torch.empty(0, dtype=torch.int64))
        lengths = np.array(plan.num_tokens, np.int32)
        if not partial and plan.num_decodes < len(rows):
            hidden = hidden[self._to((np.cumsum(lengths) - 1)[plan.sampled])]
        if len(plan.sampled) < len(rows):
            sampled = np.array(plan.sampled, np.int32)
            rows, starts, lengths = rows[sampled], starts[sampled], lengths[sampled]
        logits = self.model.logits(hidden)[: len(rows)]
        tokens, logprobs = self.sampler.sample(logits, rows, starts + lengths, plan)
        self._keep_tokens(rows, tokens)
        return PendingResult(tokens, logprobs, found_prompt)

    def _collect_prompt_logprobs(
        self, plan: StepPlan, hidden: Tensor
    ) -> dict[int, list[TokenLogprobs]] | None:
        """Log-probabilities of the prompt tokens that follow this step's positions; complete ones are returned."""
        done: dict[int, list[TokenLogprobs]] = {}
        sampled_index = {entry: i for i, entry in enumerate(plan.sampled)}
        offset = 0
        for entry, (row, start, length) in enumerate(zip(plan.rows, plan.starts, plan.num_tokens)):
            state = self._prompt_logprobs.get(row)
            if state is not None:
                k, prompt_len, found = state
                count = min(length, prompt_len - 1 - start)
                if count > 0:
                    logits = self.model.logits(hidden[offset : offset + count])
                    following = self.tables.tokens[row][start + 1 : start + 1 + count].astype(np.int64)
                    found.extend(token_logprobs(logits, self._to(following), [k] * count))
                if entry in sampled_index:
                    done[sampled_index[entry]] = found
                    del self._prompt_logprobs[row]
            offset += length
        return done or None

    def close(self) -> None:
        """Wait until nothing of this rank's is on its way to or from another stage."""
        if self._returned is not None:
            self._returned.close()
        if self.pipeline is not None:
            self.pipeline.close()

    def _upload(self, arrays: dict[str, NDArray[np.int32]]) -> dict[str, Tensor]:
        """int32 arrays as tensors on the device, in one transfer."""
        if self.device.type == "cpu":
            return {name: torch.from_numpy(np.ascontiguousarray(a)) for name, a in arrays.items()}
        buffer, packing = pack(arrays)
        return packing.views(self._to(buffer))

    def _to(self, array: NDArray[Any]) -> Tensor:
        return to_device(array, self.device)
