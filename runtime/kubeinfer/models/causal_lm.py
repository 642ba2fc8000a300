"""What every decoder-only model has at its ends, shared out over the stages of a pipeline: embedding and output head."""

from __future__ import annotations

from torch import Tensor

from kubeinfer.layers.embedding import VocabEmbedding
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.model_config import ModelConfig


class CausalLM:
    """One rank's part of a model, and which of the checkpoint's tensors it needs."""

    def __init__(
        self,
        config: ModelConfig,
        store: ParameterStore,
        prefix: str,
        width: int,
        *,
        first_only: tuple[str, ...] = (),
        last_only: tuple[str, ...],
    ):
        """``prefix`` is where the checkpoint has layers and embedding, ``width`` the embedding's.

        ``first_only`` and ``last_only`` are names below ``prefix`` that only the first or last stage has.
        """
        self.config = config
        self.group = store.group
        stage, tied = store.stage, config.tie_word_embeddings
        self.embedding: VocabEmbedding | None = None
        self.head: VocabEmbedding | None = None
        self._embedding_name = f"{prefix}.embed_tokens"
        self._width = width
        if stage.first:
            self.embedding = VocabEmbedding(store, self._embedding_name, config.vocab_size, width)
        elsewhere = stage.layers_elsewhere(f"{prefix}.layers", config.num_layers)
        if not stage.first:
            elsewhere += [f"{prefix}.{name}." for name in first_only]
        if not stage.last:
            elsewhere += [*(f"{prefix}.{name}." for name in last_only), "lm_head."]
        if not (stage.first or (stage.last and tied)):
            elsewhere.append(f"{self._embedding_name}.")
        self.weights_elsewhere = tuple(elsewhere)  # beginnings of names that belong to other stages
        self.optional_weights = frozenset({"lm_head.weight"} if tied else ())

    def make_head(self, store: ParameterStore) -> None:
        """On the last stage, after its layers: the embedding's tensor where tied and here, else one of its own."""
        if not store.stage.last:
            return
        tied = self.config.tie_word_embeddings
        if tied and self.embedding is not None:
            self.head = self.embedding
        else:
            name = self._embedding_name if tied else "lm_head"
            self.head = VocabEmbedding(store, name, self.config.vocab_size, self._width)

    def logits(self, hidden: Tensor, out: Tensor | None = None) -> Tensor:
        """``hidden [N, width]`` -> ``[N, vocab_size]``; into ``out`` where given. The last stage's."""
        if self.head is None:
            raise RuntimeError("only the last stage has the output head")
        return self.head.logits(hidden, out)
