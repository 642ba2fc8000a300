"""Runs the source of a Gluon kernel whose tensors are a warp's 32 lanes, without a GPU and without Triton.

The module is loaded with this in place of Triton: numbers are numpy's, with the types and the wrapping of the GPU's, and each
function in inline assembly is written down again here as what its instructions do. Warps run one after the other.

What is checked on the way: that loads and stores are inside and aligned, that a barrier's phase has ended when it is waited for,
and that nothing is written, and nothing read that the kernel before may write, before the wait for it. Shared memory and results begin
as NaN. What this can't show: races, and the order of memory between warps.
"""

from __future__ import annotations

import importlib.util
import operator
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

LANES = 32
_INTEGERS = "iub"


def plain(x: Any) -> Any:
    return x.value if isinstance(x, Lanes) else x


def _alike(x: Any, y: Any) -> tuple[Any, Any]:
    """Python's numbers take the other's type, as in Triton."""
    x, y = plain(x), plain(y)
    if isinstance(x, (bool, int, float)) and isinstance(y, (np.ndarray, np.generic)):
        y, x = _alike(y, x)
    elif isinstance(y, (bool, int)) and x.dtype.kind in _INTEGERS:
        y = np.asarray(y, np.int32 if x.dtype.kind == "b" else x.dtype)
    elif isinstance(y, (int, float)) and x.dtype.kind == "f":
        y = np.float32(y)
    return x, y


def _operator(f: Callable[[Any, Any], Any], swapped: bool = False) -> Callable[[Any, Any], Any]:
    def apply(a: Any, b: Any) -> Any:
        if isinstance(b, Pointer):
            return NotImplemented
        x, y = _alike(a, b)
        return Lanes(f(y, x) if swapped else f(x, y))

    return apply


class Lanes:
    """A tensor of 32 numbers, or one number of all lanes."""

    type = SimpleNamespace(layout=None)

    def __init__(self, value: Any):
        self.value = np.asarray(value)

    def to(self, dtype: Any, bitcast: bool = False) -> Lanes:
        return Lanes(self.value.view(dtype.numpy) if bitcast else self.value.astype(dtype.numpy))

    def __bool__(self) -> bool:
        return bool(self.value)

    def __index__(self) -> int:
        return int(self.value)

    __hash__ = None  # type: ignore[assignment]


for _name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "and", "or", "xor", "rshift", "lshift"):
    _function = getattr(operator, _name + ("_" if _name in ("and", "or") else ""))
    setattr(Lanes, f"__{_name}__", _operator(_function))
    setattr(Lanes, f"__r{_name}__", _operator(_function, swapped=True))
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(Lanes, f"__{_name}__", _operator(getattr(operator, _name)))


class Pointer:
    """Into a flat array, in its elements."""

    def __init__(self, array: Any, offset: Any = 0, element_ty: Any = None):
        self.array, self.offset = array, np.asarray(offset, np.int64)
        self.dtype = SimpleNamespace(element_ty=element_ty)

    def __add__(self, x: Any) -> Pointer:
        return Pointer(self.array, self.offset + np.asarray(plain(x)).astype(np.int64), self.dtype.element_ty)

    __radd__ = __add__

    def chunks(self, size: int) -> list[Any]:
        """The array's ``size`` bytes at each lane's place, aligned to as much."""
        count = size // self.array.itemsize
        offsets = np.broadcast_to(self.offset, (LANES,))
        assert (offsets % count == 0).all(), "not aligned"
        assert ((offsets >= 0) & (offsets + count <= self.array.size)).all(), "outside"
        return [self.array[at : at + count] for at in offsets]


def one(x: Any) -> int:
    """The number that all lanes have."""
    values = np.unique(np.asarray(plain(x)))
    assert values.size == 1
    return int(values[0])


def _words(rows: list[Any]) -> tuple[Lanes, ...]:
    table = np.stack([row.view(np.int32) for row in rows])
    return tuple(Lanes(table[:, i].copy()) for i in range(table.shape[1]))


def _numbers(words: Any) -> tuple[Any, Any]:
    """The low and the high fp16 number of each word."""
    bits = np.broadcast_to(plain(words), (LANES,)).astype(np.int32).view(np.uint32)
    return tuple(
        half.astype(np.uint16).view(np.float16).astype(np.float32) for half in (bits & 0xFFFF, bits >> 16)
    )


def _bits(x: Any) -> Any:
    return plain(x).astype(np.int32).view(np.uint32)


class Warp:
    """A program of one warp on its multiprocessor: what its instructions do."""

    def __init__(self) -> None:
        self.ids: tuple[int, ...] = (0, 0)
        self.programs = 1
        self.waited = True
        self.begin(0, lambda keys: True)

    def begin(self, shared_bytes: int, may_read_early: Callable[[Pointer], bool], *ids: int) -> None:
        self.ids = ids
        self.memory = np.full(shared_bytes, 0xFF, np.uint8)
        self.phases: dict[int, int] = {}
        self.waited, self.early_copies, self.may_read_early = False, 0, may_read_early

    # kubeinfer.kernels.gluon_bulk

    def wait_for_kernel_before(self, threads: Any) -> None:
        self.waited = True

    def shared_base(self, threads: Any) -> Lanes:
        return Lanes(np.zeros(LANES, np.int32))

    def init_barrier(self, at: Any, wanted: Any) -> None:
        self.phases |= {int(a): 0 for a, w in zip(plain(at), plain(wanted), strict=True) if w}

    def wait_barrier(self, at: Any, phase: Any) -> None:
        ended = self.phases[one(at)]
        assert ended > 0
        assert (ended - 1) % 2 == one(phase), "this would wait for ever, or not at all"

    def copy_page(
        self, wanted: Any, barrier: Any, to: Any, seen: Any, keys: Pointer, values: Pointer
    ) -> None:
        if not one(wanted):
            return
        if not self.waited:
            self.early_copies += 1
            assert self.may_read_early(keys)
        place = one(to)
        for source, begin, end, at in (
            (keys, 0, 4096, 0),
            (values, 0, 2048, 4096),
            (values, 2048, 4096, 6208),
        ):
            data = source.chunks(16)[0].base.reshape(-1).view(np.uint8)
            first = int(source.offset) * source.array.itemsize
            assert first + end <= data.size
            self.memory[place + at : place + at + end - begin] = data[first + begin : first + end]
        self.phases[one(barrier)] += 1

    def before_copies(self, threads: Any) -> None:
        pass

    def shared4(self, at: Any) -> tuple[Lanes, ...]:
        return _words(Pointer(self.memory, plain(at)).chunks(16))

    def put4(self, at: Any, wanted: Any, *words: Any) -> None:
        self._store(Pointer(self.memory, plain(at)), wanted, words)

    def count_up(self, counter: Pointer) -> Lanes:
        assert self.waited
        at = one(counter.offset)
        counter.array[at] += 1
        return Lanes(np.int32(counter.array[at] - 1))

    # kubeinfer.kernels.triton_mma

    def read4(self, pointers: Pointer, wanted: Any, always: bool) -> tuple[Lanes, ...]:
        assert self.waited
        assert always
        return _words(pointers.chunks(16))

    def fresh4(self, pointers: Pointer) -> tuple[Lanes, ...]:
        return _words(pointers.chunks(16))

    def write4(self, pointers: Pointer, wanted: Any, *words: Any) -> None:
        assert self.waited
        self._store(pointers, wanted, words)

    def _store(self, pointers: Pointer, wanted: Any, words: tuple[Any, ...]) -> None:
        wanted = np.broadcast_to(plain(wanted), (LANES,)) != 0
        table = np.stack([plain(word).astype(np.int32) for word in words], 1)
        offsets = np.where(wanted, pointers.offset, 0)
        for lane, place in enumerate(Pointer(pointers.array, offsets).chunks(16)):
            if wanted[lane]:
                place[:] = table[lane].view(place.dtype)

    def from_thread(self, values: Any, place: Any) -> Lanes:
        return Lanes(plain(values)[plain(place) % LANES])

    def first_halves(self, a: Any, b: Any) -> Lanes:
        return Lanes((_bits(a) & 0xFFFF | _bits(b) << 16).view(np.int32))

    def second_halves(self, a: Any, b: Any) -> Lanes:
        return Lanes((_bits(a) >> 16 | _bits(b) & 0xFFFF0000).view(np.int32))

    def pair(self, low: Any, high: Any, bf16: bool) -> Lanes:
        assert not bf16
        x, y = (plain(v).astype(np.float16).view(np.uint16).astype(np.uint32) for v in (low, high))
        return Lanes((x | y << 16).view(np.int32))

    def mma(
        self, a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c: Any, bf16: bool
    ) -> tuple[Lanes, ...]:
        """mma.m16n8k16: the fragments' places are in the PTX reference."""
        assert not bf16
        g, t = np.arange(LANES) // 4, np.arange(LANES) % 4
        a, b = np.zeros((16, 16), np.float32), np.zeros((16, 8), np.float32)
        for words, row, k in ((a0, 0, 0), (a1, 8, 0), (a2, 0, 8), (a3, 8, 8)):
            a[g + row, 2 * t + k], a[g + row, 2 * t + k + 1] = _numbers(words)
        for words, k in ((b0, 0), (b1, 8)):
            b[2 * t + k, g], b[2 * t + k + 1, g] = _numbers(words)
        product = a @ b
        return tuple(
            Lanes((plain(c[i]) + product[g + 8 * (i // 2), 2 * t + i % 2]).astype(np.float32))
            for i in range(4)
        )


def _language(warp: Warp) -> SimpleNamespace:
    """``triton.experimental.gluon.language``."""

    def load(pointer: Pointer, cache_modifier: str = "") -> Lanes:
        assert ((pointer.offset >= 0) & (pointer.offset < pointer.array.size)).all(), "outside"
        return Lanes(pointer.array[pointer.offset])

    def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
        assert warp.waited
        value = np.broadcast_to(np.asarray(plain(value)), pointer.offset.shape)
        mask = np.broadcast_to(plain(mask), pointer.offset.shape)
        pointer.array[pointer.offset[mask]] = value[mask]

    def where(condition: Any, x: Any, y: Any) -> Lanes:
        x, y = (np.float32(v) if isinstance(v, float) else plain(v) for v in (x, y))
        return Lanes(np.where(plain(condition), x, y))

    def kind(name: str, numpy: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, numpy=numpy)

    return SimpleNamespace(
        constexpr=lambda x: x, static_range=range, BlockedLayout=lambda *sizes: None, load=load, store=store, where=where,
        int32=kind("int32", np.int32), int64=kind("int64", np.int64), float32=kind("float32", np.float32),
        float16=kind("float16"), bfloat16=kind("bfloat16"),
        arange=lambda begin, end, layout: Lanes(np.arange(begin, end, dtype=np.int32)),
        zeros=lambda shape, dtype, layout: Lanes(np.zeros(shape, dtype.numpy)),
        program_id=lambda axis: Lanes(np.int32(warp.ids[axis])), num_programs=lambda axis: Lanes(np.int32(warp.programs)),
        minimum=lambda x, y: Lanes(np.minimum(*_alike(x, y))), maximum=lambda x, y: Lanes(np.maximum(*_alike(x, y))),
        cdiv=lambda x, y: (x + y - 1) // y, exp2=lambda x: Lanes(np.exp2(plain(x))), log2=lambda x: Lanes(np.log2(plain(x))),
        allocate_shared_memory=lambda *sizes: SimpleNamespace(index=lambda i: None),
    )  # fmt: skip


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _jit


class _Anything(ModuleType):
    """A module that has every name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **options: None


def load_kernel(name: str, warp: Warp, **constants: Any) -> Any:
    """The module ``kubeinfer.kernels.NAME`` for ``warp``; ``constants`` are what it imports beside functions."""
    import kubeinfer.kernels

    folder = Path(kubeinfer.kernels.__file__).parent
    bulk, mma, gluon, language = (_Anything(kind) for kind in ("bulk", "mma", "gluon", "language"))
    for module in (bulk, mma):
        for method in dir(warp):
            if callable(getattr(warp, method)) and not method.startswith("_"):
                setattr(module, method, getattr(warp, method))
    language.__dict__.update(vars(_language(warp)))
    gluon.__dict__.update(jit=_jit, language=language)
    hopper = _Anything("hopper")
    hopper.__dict__["mbarrier"] = SimpleNamespace(
        MBarrierLayout=lambda: None, init=lambda barrier, count: None
    )
    runs, experimental = _Anything("runs"), _Anything("experimental")
    runs.__dict__.update(constants)
    experimental.__dict__["gluon"] = gluon
    stand_ins = {
        "triton": _Anything("triton"), "triton.experimental": experimental, "triton.experimental.gluon": gluon,
        "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia.hopper": _Anything("descriptors"),
        "kubeinfer.kernels.gluon_bulk": bulk, "kubeinfer.kernels.triton_mma": mma,
        "kubeinfer.kernels.triton_decode_runs": runs, "kubeinfer.kernels.triton_launch": _Anything("launch"),
        "kubeinfer.kernels.triton_split": _Anything("split"), "kubeinfer.kernels.fused_linear": _Anything("fused"),
    }  # fmt: skip
    spec = importlib.util.spec_from_file_location(f"{name}_in_numpy", folder / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with _instead(stand_ins):
        spec.loader.exec_module(module)
    return module


@contextmanager
def _instead(modules: dict[str, ModuleType]) -> Iterator[None]:
    before = {name: sys.modules.get(name) for name in modules}
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
