"""Linear layers, whole or split over a tensor-parallel group (Megatron-LM: columns first, rows second, one all-reduce)."""

from __future__ import annotations

from torch import Tensor

from kubeinfer.errors import OptionError
from kubeinfer.kernels.fp8 import RowQuantizer
from kubeinfer.kernels.linear import PackedWeight
from kubeinfer.kernels.norm import NormBegun
from kubeinfer.layers.norm import RMSNorm
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.quantization import LinearMethod, LoadingWeight, Part, Shard, loading_weight


class Linear:
    """``y = x W^T + b`` with this rank's shard of the weight; the bias is ``[out]``.

    How the weight is held and multiplied by is its ``method``'s business (``layers/quantization``).
    """

    def __init__(self, store: ParameterStore, shard: Shard, bias: bool):
        self._loading: LoadingWeight | None = loading_weight(store, shard)
        self.method: LinearMethod
        self.bias = store.empty(shard.out_features) if bias else None
        if self.bias is None:
            return
        for part in shard.parts:
            into = self.bias.narrow(0, part.offset, part.length)
            store.expect(f"{part.name}.bias", into, 0, part.start, part.length)

    def finish_loading(self) -> None:
        """Put the weight into the form its kernel reads fastest."""
        if self._loading is not None:
            self.method = self._loading.finish()
            self._loading = None  # what was loaded is kept only in the method's form

    @property
    def packed(self) -> PackedWeight | None:
        """The weight in the CPU kernels' layout, if it is in that."""
        return self.method.packed

    def __call__(self, x: Tensor) -> Tensor:
        return self.method.apply(x, self.bias)

    def quantized_by(self, before: RMSNorm | GatedLinear) -> None:
        """Let the layer before, whose output is only for this one, give it quantized where this one's weight is so."""
        before.quantizer = self.method.quantizer

    def after_norm(self, x: Tensor, norm: RMSNorm, begun: NormBegun | None = None) -> Tensor:
        """This layer of ``norm(x)``, which the layer before may have ``begun``."""
        return self.method.after_norm(x, norm, self.bias, begun)


class ReplicatedLinear(Linear):
    """The whole weight on every rank."""

    def __init__(self, store: ParameterStore, name: str, out_features: int, in_features: int, bias: bool):
        part = Part(name, 0, 0, out_features, out_features)
        super().__init__(store, Shard((part,), in_features, 0, in_features), bias)


class ColumnLinear(Linear):
    """Outputs split over the ranks; several checkpoint weights may be fused one under the other."""

    def __init__(
        self, store: ParameterStore, names: list[str], out_features: list[int], in_features: int, bias: bool
    ):
        rank, size = store.group.rank, store.group.size
        parts: list[Part] = []
        for name, total in zip(names, out_features):
            check_divisible(total, size, f"{names[0]} outputs")
            length = total // size
            offset = parts[-1].offset + parts[-1].length if parts else 0
            parts.append(Part(name, offset, rank * length, length, total))
        super().__init__(store, Shard(tuple(parts), in_features, 0, in_features), bias)


class GatedLinear(ColumnLinear):
    """``silu(gate(x)) * up(x)``, gate and up in one weight, outputs split over the ranks."""

    def __init__(
        self, store: ParameterStore, gate: str, up: str, out_features: int, in_features: int, bias: bool
    ):
        super().__init__(store, [gate, up], [out_features, out_features], in_features, bias)
        self.quantizer: RowQuantizer | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if self.quantizer is not None and self.quantizer.wants(x):
            return self.quantizer.silu_and_mul(self.method.apply(x, self.bias))
        return self.method.gated(x, self.bias)

    def after_norm(self, x: Tensor, norm: RMSNorm, begun: NormBegun | None = None) -> Tensor:
        if self.quantizer is not None and self.quantizer.wants(x):
            return self.quantizer.silu_and_mul(self.method.after_norm(x, norm, self.bias, begun))
        return self.method.gated(x, self.bias, norm, begun)


class QKVLinear(Linear):
    """Query, key and value projections in one weight. KV heads are replicated where there are fewer than ranks."""

    def __init__(
        self,
        store: ParameterStore,
        names: tuple[str, str, str],
        hidden: int,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        bias: bool,
    ):
        rank, size = store.group.rank, store.group.size
        check_divisible(num_heads, size, "attention heads")
        if num_kv_heads >= size:
            check_divisible(num_kv_heads, size, "KV heads")
        else:
            check_divisible(size, num_kv_heads, "ranks per KV head")
        self.num_heads = num_heads // size
        self.num_kv_heads = max(1, num_kv_heads // size)
        q, kv = self.num_heads * head_dim, self.num_kv_heads * head_dim
        kv_start, kv_total = (rank * num_kv_heads // size) * head_dim, num_kv_heads * head_dim
        parts = (
            Part(names[0], 0, rank * q, q, num_heads * head_dim),
            Part(names[1], q, kv_start, kv, kv_total),
            Part(names[2], q + kv, kv_start, kv, kv_total),
        )
        super().__init__(store, Shard(parts, hidden, 0, hidden), bias)


class RowLinear(Linear):
    """Inputs split over the ranks; the partial results are summed. The bias is added once, on rank 0."""

    def __init__(self, store: ParameterStore, name: str, out_features: int, in_features: int, bias: bool):
        self.group = store.group
        rank, size = self.group.rank, self.group.size
        check_divisible(in_features, size, f"{name} inputs")
        shard = in_features // size
        self.out_features = out_features
        part = Part(name, 0, 0, out_features, out_features)
        super().__init__(store, Shard((part,), shard, rank * shard, in_features), bias)

    def finish_loading(self) -> None:
        if self.bias is not None and self.group.rank > 0:
            self.bias.zero_()
        super().finish_loading()

    def __call__(self, x: Tensor) -> Tensor:
        return self.group.all_reduce(self.partial(x))

    def partial(self, x: Tensor) -> Tensor:
        """This rank's part of the sum, where the group's next sum reads it best."""
        out = self.group.buffer(x.shape[0], self.out_features, x.dtype)
        return self.method.apply_into(x, self.bias, out)

    def adds(self, residual: Tensor) -> bool:
        """Whether `add_to` costs less than a norm that does the addition."""
        return self.method.adds(residual)

    def add_to(self, residual: Tensor, x: Tensor, next_norm: RMSNorm | None = None) -> NormBegun | None:
        """``residual += self(x)`` in place; a group of one rank only. ``next_norm`` of the sum may be begun."""
        if next_norm is not None:
            return self.method.add_before_norm(residual, x, self.bias, next_norm)
        self.method.add_to(residual, x, self.bias)
        return None


def check_divisible(total: int, parts: int, what: str) -> None:
    if total % parts:
        raise OptionError(
            f"tensor_parallel_size {parts} does not divide the model's {total} {what}; choose a divisor.",
            "tensor_parallel_size",
        )
