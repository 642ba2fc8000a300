"""Weights that live in host memory and visit the device for each step (``cpu_offload_gb``).

Whole decoder layers are chosen, evenly spread, and their matrices are copied ahead of their use into two staging
buffers in turn: while one layer computes, the next streamed one arrives.
"""

from __future__ import annotations

from inspect import ismethod
from typing import Any

import torch
from torch import Tensor

from kubeinfer.errors import OptionError
from kubeinfer.layers.parameters import ParameterStore
from kubeinfer.worker.host_pool import copy_async, page_lock, page_unlock

_ALIGNMENT = 256  # bytes; kernels want 16, copies like more


def choose_layers(layer_bytes: dict[int, int], budget: int) -> frozenset[int]:
    """Layers, evenly spread, whose move to the host frees ``budget`` bytes of the device, staging taken off.

    All of them where that is less; none where two or fewer layers leave nothing to gain.
    """
    layers, sizes = list(layer_bytes), list(layer_bytes.values())
    total = len(layers)
    chosen: list[int] = []
    for count in range(3, total + 1):
        chosen = [(2 * i + 1) * total // (2 * count) for i in range(count)]
        if freed_bytes([sizes[i] for i in chosen]) >= budget:
            break
    return frozenset(layers[i] for i in chosen)


def freed_bytes(sizes: list[int]) -> int:
    """Bytes that moving layers of ``sizes`` to the host frees on the device: all but two staging buffers."""
    return sum(sizes) - 2 * max(sizes, default=0)


class WeightStreamer:
    """Brings each streamed layer's matrices to the device before the layer runs.

    ``layers``: the host tensors of each streamed layer, in the order in which they run. ``views`` stand for them on the
    device, at addresses that never change, so that a CUDA graph may hold them: a captured step holds its copies too.

    The calls of one step: ``begin``, then ``enter(i)`` and ``leave(i)`` around each streamed layer ``i`` in order.
    """

    def __init__(self, layers: list[list[Tensor]], device: torch.device):
        self.device = device
        self._layers = layers
        places = [_places(tensors) for tensors in layers]
        self.staging_bytes = 2 * max(end for _, end in places)
        self._staging = [
            torch.empty(self.staging_bytes // 2, dtype=torch.uint8, device=device) for _ in range(2)
        ]
        self.views = [
            [_view(self._staging[i % 2], start, tensor) for start, tensor in zip(starts, tensors)]
            for i, (tensors, (starts, _)) in enumerate(zip(layers, places))
        ]
        on_gpu = device.type == "cuda"
        self._side: Any = torch.cuda.Stream(device) if on_gpu else None
        self._filled: list[Any] = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._used: list[Any] = [torch.cuda.Event() for _ in range(2)] if on_gpu else []
        self._locked: list[Tensor] = []
        self._fence = torch.zeros(1, dtype=torch.int32, device=device)

    @property
    def host_tensors(self) -> list[Tensor]:
        return [tensor for of_layer in self._layers for tensor in of_layer]

    def lock_pages(self) -> None:
        """Page-lock the host tensors, so that copies run beside the device's work. Raises :class:`OptionError`."""
        if self._side is None:
            return
        for tensor in self.host_tensors:
            if not page_lock(tensor):
                raise OptionError(
                    "cpu_offload_gb: the driver refused to page-lock the host memory of the weights; allow the process "
                    "to lock memory (ulimit -l unlimited), or lower --cpu-offload-gb.",
                    "cpu_offload_gb",
                )
            self._locked.append(tensor)

    def close(self) -> None:
        """Unlock the host memory. No step may run after it."""
        if self._locked:
            torch.cuda.synchronize(self.device)
            for tensor in self._locked:
                page_unlock(tensor)
            self._locked.clear()

    def begin(self) -> None:
        """A step begins: bring the first two layers. The step before is done with both buffers."""
        if self._side is not None:
            self._side.wait_stream(torch.cuda.current_stream(self.device))
        for i in range(min(2, len(self._layers))):
            self._fetch(i)

    def enter(self, i: int) -> None:
        """Wait (on the device) until layer ``i``'s matrices are there."""
        if self._side is not None:
            torch.cuda.current_stream(self.device).wait_event(self._filled[i % 2])
            # A kernel of the layer may be launched to overlap the end of the one before it, weights first. This one
            # is not, so it stands between the copy and any such read.
            self._fence.add_(1)

    def leave(self, i: int) -> None:
        """Layer ``i`` is done (in the order of the device): the next layer but one takes its place."""
        if i + 2 >= len(self._layers):
            return
        if self._side is not None:
            self._used[i % 2].record(torch.cuda.current_stream(self.device))
            self._side.wait_event(self._used[i % 2])
        self._fetch(i + 2)

    def _fetch(self, i: int) -> None:
        if self._side is None:
            for view, tensor in zip(self.views[i], self._layers[i]):
                view.copy_(tensor)
            return
        with torch.cuda.stream(self._side):
            for view, tensor in zip(self.views[i], self._layers[i]):
                copy_async(view, tensor)
            self._filled[i % 2].record(self._side)


class StreamedLayer:
    """A decoder layer with the streamer's calls around whatever of it is called.

    ``number``: its place among the streamed ones, if it is one.
    """

    def __init__(self, layer: Any, streamer: WeightStreamer, number: int | None, first: bool):
        self._layer = layer
        self._streamer = streamer
        self._number = number
        self._first = first

    def __call__(self, *args: Any) -> Any:
        return self._run(self._layer, args)

    def _run(self, function: Any, args: tuple[Any, ...]) -> Any:
        if self._first:
            self._streamer.begin()
        if self._number is None:
            return function(*args)
        self._streamer.enter(self._number)
        result = function(*args)
        self._streamer.leave(self._number)
        return result

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._layer, name)
        return (lambda *args: self._run(value, args)) if ismethod(value) else value


def stream_layers(model: Any, store: ParameterStore) -> WeightStreamer:
    """Make ``model`` (loaded, not yet finished) run with the matrices that ``store`` made in host memory."""
    streamed = [number for number in store.layer_bytes if number in store.host_tensors]
    streamer = WeightStreamer([store.host_tensors[number] for number in streamed], store.device)
    layers: list[StreamedLayer] = []
    for number, layer in zip(store.layer_bytes, model.layers, strict=True):
        place = None
        if number in store.host_tensors:
            place = streamed.index(number)
            tensors = store.host_tensors[number]
            views = {id(tensor): view for tensor, view in zip(tensors, streamer.views[place])}
            if _replace(layer, views) != len(tensors):
                raise RuntimeError(f"decoder layer {number} does not hold every matrix that was made for it")
        layers.append(StreamedLayer(layer, streamer, place, first=not layers))
    model.layers = layers
    return streamer


def check_streamed(model: Any, streamer: WeightStreamer) -> None:
    """Raise :class:`OptionError` where finishing the load replaced a matrix: what is streamed would be read by nobody."""
    views = {id(view): view for of_layer in streamer.views for view in of_layer}
    if sum(_replace(layer._layer, views) for layer in model.layers) != len(views):
        raise OptionError(
            "cpu_offload_gb cannot stream this model's weights: their kernels read them in a form made at load "
            "(quantized or packed). Leave cpu_offload_gb out, or use the unquantized model.",
            "cpu_offload_gb",
        )


def _replace(part: Any, by_id: dict[int, Tensor]) -> int:
    """Put the tensors of ``by_id`` in place of those whose id they stand under, in ``part`` and its parts."""
    count = 0
    for name, value in list(vars(part).items()):
        if isinstance(value, Tensor):
            if id(value) in by_id:
                setattr(part, name, by_id[id(value)])
                count += 1
        elif type(value).__module__.startswith("kubeinfer.layers.") and hasattr(value, "__dict__"):
            count += _replace(value, by_id)
    return count


def _places(tensors: list[Tensor]) -> tuple[list[int], int]:
    """Where each tensor begins in a staging buffer, and where the last one ends, in bytes."""
    starts, end = [], 0
    for tensor in tensors:
        starts.append(end)
        end += -(-tensor.numel() * tensor.element_size() // _ALIGNMENT) * _ALIGNMENT
    return starts, end


def _view(staging: Tensor, start: int, like: Tensor) -> Tensor:
    size = like.numel() * like.element_size()
    return staging[start : start + size].view(like.dtype).view(like.shape)
