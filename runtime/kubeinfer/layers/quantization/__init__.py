"""How a linear layer holds its weight and multiplies by it: one scheme a file, all behind `LinearMethod`."""

from __future__ import annotations

from kubeinfer.errors import ModelLoadError
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.layers.quantization.base import LinearMethod, LoadingWeight, Part, Shard
from kubeinfer.layers.quantization.dense import DenseWeight
from kubeinfer.quantization import FP8Config, GGUFConfig, ignores

__all__ = ["LinearMethod", "LoadingWeight", "Part", "Shard", "loading_weight"]


def loading_weight(store: ParameterStore, shard: Shard) -> LoadingWeight:
    """The weight of one layer of a model whose quantization is ``store.quantization``.

    Raises :class:`OptionError` where the tensor-parallel slices do not fit the scheme, :class:`ModelLoadError` where a fused
    layer would be quantized in part.
    """
    config = store.quantization
    if config is None:
        return DenseWeight(store, shard)
    if isinstance(config, GGUFConfig):
        from kubeinfer.layers.quantization.gguf import gguf_weight

        return gguf_weight(store, shard, config)
    skipped = [part.name for part in shard.parts if ignores(config, part.name)]
    if len(skipped) == len(shard.parts):
        return DenseWeight(store, shard)
    if skipped:
        others = ", ".join(part.name for part in shard.parts if part.name not in skipped)
        raise ModelLoadError(
            f"the checkpoint leaves {', '.join(skipped)} unquantized but not {others}; they are one product here."
        )
    if isinstance(config, FP8Config):
        from kubeinfer.layers.quantization.fp8 import FP8Weight

        return FP8Weight(store, shard, config)
    from kubeinfer.layers.quantization.grouped_int import GroupedIntWeight

    return GroupedIntWeight(store, shard, config)
