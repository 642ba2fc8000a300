"""Runs the source of a Gluon kernel whose tensors are a program's threads, without a GPU and without Triton.

The module is loaded with this in place of Triton: numbers are numpy's, with the types and the wrapping of the GPU's, and each
function in inline assembly is written down again here as what its instructions do. All threads of a program take a statement
together, programs run one after the other.

What is checked on the way: that loads and stores are inside and aligned, that a barrier's phase has ended when it is waited for,
and that nothing is written, and nothing read that the kernel before may write, before the wait for it. Shared memory and results begin
as NaN. What this can't show: races, and the order of memory between warps and programs.
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
    """A number of each thread, or one of all. Those of bfloat16 are fp32 numbers that it has."""

    type = SimpleNamespace(layout=None)

    def __init__(self, value: Any):
        self.value = np.asarray(value)

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.value.shape)

    def to(self, dtype: Any, bitcast: bool = False) -> Lanes:
        if dtype.name == "bfloat16":
            return Lanes(_fp32(_bf16(self.value)))
        return Lanes(self.value.view(dtype.numpy) if bitcast else self.value.astype(dtype.numpy))

    def __neg__(self) -> Lanes:
        return Lanes(-self.value)

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


def _bf16(x: Any) -> Any:
    """Bits of the nearest bfloat16 numbers, uint16."""
    bits = np.asarray(x, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16)


def _fp32(bits: Any) -> Any:
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Pointer:
    """Into a flat array, in its elements; those of 16-bit numbers are uint16 or fp16."""

    def __init__(self, array: Any, offset: Any = 0, element_ty: Any = None):
        self.array, self.offset = array, np.asarray(offset, np.int64)
        self.dtype = SimpleNamespace(element_ty=element_ty)

    def __add__(self, x: Any) -> Pointer:
        return Pointer(self.array, self.offset + np.asarray(plain(x)).astype(np.int64), self.dtype.element_ty)

    __radd__ = __add__

    def chunks(self, size: int, threads: int | None = None) -> list[Any]:
        """The array's ``size`` bytes at each thread's place, aligned to as much."""
        count = size // self.array.itemsize
        offsets = self.offset.reshape(-1) if threads is None else np.broadcast_to(self.offset, (threads,))
        assert (offsets % count == 0).all(), "not aligned"
        assert ((offsets >= 0) & (offsets + count <= self.array.size)).all(), "outside"
        return [self.array[at : at + count] for at in offsets]

    def bytes_at(self, thread: int, count: int) -> Any:
        first = int(self.offset.reshape(-1)[thread if self.offset.ndim else 0]) * self.array.itemsize
        data = self.array.view(np.uint8)
        assert 0 <= first <= data.size - count, "outside"
        return data[first : first + count]


def one(x: Any) -> int:
    """The number that all lanes have."""
    values = np.unique(np.asarray(plain(x)))
    assert values.size == 1
    return int(values[0])


def _words(rows: list[Any]) -> tuple[Lanes, ...]:
    table = np.stack([row.view(np.int32) for row in rows])
    return tuple(Lanes(table[:, i].copy()) for i in range(table.shape[1]))


def _bits(x: Any) -> Any:
    return plain(x).astype(np.int32).view(np.uint32)


def _numbers(words: Any, threads: int, bf16: bool) -> tuple[Any, Any]:
    """The low and the high number of each thread's word."""
    bits = np.broadcast_to(_bits(words), (threads,))
    low, high = (bits & 0xFFFF).astype(np.uint16), (bits >> 16).astype(np.uint16)
    if bf16:
        return _fp32(low), _fp32(high)
    return low.view(np.float16).astype(np.float32), high.view(np.float16).astype(np.float32)


class Program:
    """A program on its multiprocessor: what its instructions do."""

    def __init__(self) -> None:
        self.programs = 1
        self.begin(0, (), lambda source: True)

    def begin(
        self, shared_bytes: int, ids: tuple[int, ...], may_read_early: Callable[[Pointer], bool]
    ) -> None:
        self.ids = ids
        self.memory = np.full(shared_bytes, 0xFF, np.uint8)
        self.phases: dict[int, int] = {}
        self.barriers: set[int] = set()  # bytes that they are in
        self.waited, self.early_copies, self.may_read_early = False, 0, may_read_early

    # kubeinfer.kernels.gluon_bulk

    def wait_for_kernel_before(self, threads: Any) -> None:
        self.waited = True

    def all_threads(self, threads: Any) -> None:
        pass

    def before_copies(self, threads: Any) -> None:
        pass

    def warp_of(self, threads: Any) -> Lanes:
        return Lanes(plain(threads) // 32)

    def shared_base(self, threads: Any) -> Lanes:
        return Lanes(np.zeros_like(plain(threads)))

    def make_barrier(self, at: int, count: int) -> None:
        """The language's own, which its allocation lives by."""
        place = set(range(at, at + 8))
        assert max(place) < self.memory.size
        assert not place & self.barriers
        self.barriers |= place

    def init_barrier(self, at: Any, wanted: Any) -> None:
        for a, w in zip(plain(at), plain(wanted), strict=True):
            if w:
                self.make_barrier(int(a), 1)
                self.phases[int(a)] = 0

    def wait_barrier(self, at: Any, phase: Any) -> None:
        for barrier, wanted in zip(plain(at), np.broadcast_to(plain(phase), plain(at).shape), strict=True):
            ended = self.phases[int(barrier)]
            assert ended > 0
            assert (ended - 1) % 2 == wanted, "this would wait for ever, or not at all"

    def _copy(self, thread: int, to: int, sources: list[tuple[Pointer, int]]) -> None:
        for source, count in sources:
            if not self.waited:
                self.early_copies += 1
                assert self.may_read_early(source)
            assert not self.barriers.intersection(range(to, to + count)), (
                "what a barrier is in is nothing else"
            )
            self.memory[to : to + count] = source.bytes_at(thread, count)
            to += count

    def _of_warps(self, *values: Any) -> Iterator[tuple[int, ...]]:
        """Each warp's first thread, and that thread's ``values``, which all of its warp have."""
        threads = max(np.size(plain(value)) for value in values)
        table = np.stack([np.broadcast_to(plain(value), (threads,)) for value in values])
        for first in range(0, threads, 32):
            assert (table[:, first : first + 32] == table[:, first : first + 1]).all()
            yield (first, *(int(value) for value in table[:, first]))

    def copy_page(
        self, wanted: Any, barrier: Any, to: Any, seen: Any, keys: Pointer, values: Pointer
    ) -> None:
        for thread, asked, phase, place in self._of_warps(wanted, barrier, to):
            if asked:
                self._copy(thread, place, [(keys, 4096), (values, 2048)])
                self._copy(thread, place + 4096 + 2048 + 64, [(values + 2048 // values.array.itemsize, 2048)])
                self.phases[phase] += 1

    def copy2(
        self, leader: Any, wanted: Any, barrier: Any, to: Any, seen: Any, words: Pointer, metas: Pointer, a: int, b: int
    ) -> None:  # fmt: skip
        self._copy_pieces(leader, wanted, barrier, to, [(words, a), (metas, b)])

    def copy4(
        self, leader: Any, wanted: Any, barrier: Any, to: Any, seen: Any, words0: Pointer, words1: Pointer,
        metas0: Pointer, metas1: Pointer, a: int, b: int,
    ) -> None:  # fmt: skip
        self._copy_pieces(leader, wanted, barrier, to, [(words0, a), (words1, a), (metas0, b), (metas1, b)])

    def _copy_pieces(
        self, leader: Any, wanted: Any, barrier: Any, to: Any, sources: list[tuple[Pointer, int]]
    ) -> None:
        for thread, leads, asked, phase, place in self._of_warps(leader, wanted, barrier, to):
            if leads:
                if asked:
                    self._copy(thread, place, sources)
                self.phases[phase] += 1

    def _shared(self, at: Any, count: int) -> tuple[Lanes, ...]:
        return _words(Pointer(self.memory, plain(at)).chunks(4 * count))

    def shared4(self, at: Any) -> tuple[Lanes, ...]:
        return self._shared(at, 4)

    def shared2(self, at: Any) -> tuple[Lanes, ...]:
        return self._shared(at, 2)

    def shared_number(self, at: Any) -> Lanes:
        return Lanes(plain(self._shared(at, 1)[0]).view(np.float32))

    def shared_word_of_warp(self, at: Any) -> Lanes:
        return Lanes(np.int32(one(self._shared(at, 1)[0])))

    def put4(self, at: Any, wanted: Any, *words: Any) -> None:
        self._store(Pointer(self.memory, plain(at)), wanted, words)

    put_word = put_numbers2 = put_numbers4 = put4

    def count_up(self, counter: Pointer) -> Lanes:
        assert self.waited
        at = one(counter.offset)
        counter.array[at] += 1
        return Lanes(np.int32(counter.array[at] - 1))

    def next_number(self, counter: Pointer, wanted: Any, last: int) -> Lanes:
        assert self.waited
        found = np.zeros(np.size(plain(wanted)), np.int32)
        for thread in np.flatnonzero(plain(wanted)):
            at = one(counter.offset)
            found[thread] = counter.array[at]
            counter.array[at] = 0 if counter.array[at] >= last else counter.array[at] + 1
        return Lanes(found)

    # kubeinfer.kernels.triton_mma

    def read4(self, pointers: Pointer, wanted: Any, always: bool) -> tuple[Lanes, ...]:
        return self._load(pointers, wanted, always, 4)

    def load2(self, pointers: Pointer, wanted: Any, always: bool) -> tuple[Lanes, ...]:
        return self._load(pointers, wanted, always, 2)

    def fresh4(self, pointers: Pointer) -> tuple[Lanes, ...]:
        return self._load(pointers, 1, True, 4)

    def _load(self, pointers: Pointer, wanted: Any, always: bool, count: int) -> tuple[Lanes, ...]:
        """Zeros where not wanted; ``always`` goes without asking."""
        assert self.waited
        asked = np.broadcast_to(1 if always else plain(wanted) != 0, pointers.offset.shape)
        found = _words(Pointer(pointers.array, np.where(asked, pointers.offset, 0)).chunks(4 * count))
        return tuple(Lanes(np.where(asked, plain(words), 0)) for words in found)

    def write4(self, pointers: Pointer, wanted: Any, *words: Any) -> None:
        assert self.waited
        self._store(pointers, wanted, words)

    def _store(self, pointers: Pointer, wanted: Any, words: tuple[Any, ...]) -> None:
        threads = np.size(plain(words[0]))
        wanted = np.broadcast_to(plain(wanted), (threads,)) != 0
        table = np.stack([np.broadcast_to(plain(word), (threads,)).view(np.int32) for word in words], 1)
        places = Pointer(pointers.array, np.where(wanted, pointers.offset, 0)).chunks(4 * len(words), threads)
        for place, row, asked in zip(places, table, wanted, strict=True):
            if asked:
                place[:] = row.view(place.dtype)

    def from_thread(self, values: Any, place: Any) -> Lanes:
        threads = np.arange(np.size(plain(values)))
        return Lanes(plain(values)[threads // 32 * 32 + plain(place) % 32])

    def first_halves(self, a: Any, b: Any) -> Lanes:
        return Lanes((_bits(a) & 0xFFFF | _bits(b) << 16).view(np.int32))

    def second_halves(self, a: Any, b: Any) -> Lanes:
        return Lanes((_bits(a) >> 16 | _bits(b) & 0xFFFF0000).view(np.int32))

    def pair(self, low: Any, high: Any, bf16: bool) -> Lanes:
        halves = (
            _bf16(plain(v)) if bf16 else plain(v).astype(np.float16).view(np.uint16) for v in (low, high)
        )
        x, y = (half.astype(np.uint32) for half in halves)
        return Lanes((x | y << 16).view(np.int32))

    def times(self, x: Any, y: Any) -> Lanes:
        threads = np.size(plain(x))
        pairs = zip(_numbers(x, threads, True), _numbers(y, threads, True), strict=True)
        low, high = (a * b for a, b in pairs)
        return self.pair(low, high, True)

    def mma(
        self, a0: Any, a1: Any, a2: Any, a3: Any, b0: Any, b1: Any, c: Any, bf16: bool
    ) -> tuple[Lanes, ...]:
        """mma.m16n8k16 of each warp: the fragments' places are in the PTX reference."""
        threads = max(np.size(plain(x)) for x in (a0, a1, a2, a3, b0, b1, *c))
        warp, g, t = np.arange(threads) // 32, np.arange(threads) % 32 // 4, np.arange(threads) % 4
        a, b = np.zeros((threads // 32, 16, 16), np.float32), np.zeros((threads // 32, 16, 8), np.float32)
        for words, row, k in ((a0, 0, 0), (a1, 8, 0), (a2, 0, 8), (a3, 8, 8)):
            a[warp, g + row, 2 * t + k], a[warp, g + row, 2 * t + k + 1] = _numbers(words, threads, bf16)
        for words, k in ((b0, 0), (b1, 8)):
            b[warp, 2 * t + k, g], b[warp, 2 * t + k + 1, g] = _numbers(words, threads, bf16)
        product = np.matmul(a, b)
        return tuple(
            Lanes((plain(c[i]) + product[warp, g + 8 * (i // 2), 2 * t + i % 2]).astype(np.float32))
            for i in range(4)
        )


def _language(program: Program) -> SimpleNamespace:
    """``triton.experimental.gluon.language``."""

    def kind(name: str, numpy: Any = None) -> SimpleNamespace:
        return SimpleNamespace(name=name, numpy=numpy)

    bfloat16 = kind("bfloat16")

    def load(pointer: Pointer, mask: Any = True, other: float = 0.0, cache_modifier: str = "") -> Lanes:
        mask = np.broadcast_to(plain(mask), pointer.offset.shape)
        assert (~mask | (pointer.offset >= 0) & (pointer.offset < pointer.array.size)).all(), "outside"
        found = pointer.array[np.where(mask, pointer.offset, 0)]
        if pointer.dtype.element_ty is bfloat16:
            found = _fp32(found)
        return Lanes(np.where(mask, found, np.asarray(other, found.dtype)))

    def store(pointer: Pointer, value: Any, mask: Any = True) -> None:
        assert program.waited
        shape = np.broadcast_shapes(pointer.offset.shape, np.shape(plain(value)), np.shape(plain(mask)))
        value, mask, offset = (np.broadcast_to(plain(x), shape) for x in (value, mask, pointer.offset))
        if pointer.dtype.element_ty is bfloat16:
            value = _bf16(value)
        pointer.array[offset[mask]] = value[mask]

    def where(condition: Any, x: Any, y: Any) -> Lanes:
        if isinstance(x, (int, float)) and isinstance(y, (int, float)):
            x = np.asarray(x, np.float32 if isinstance(x, float) else np.int32)
        return Lanes(np.where(plain(condition), *_alike(x, y)))

    return SimpleNamespace(
        constexpr=lambda x: x, static_range=range, BlockedLayout=lambda *sizes: None, load=load, store=store, where=where,
        int32=kind("int32", np.int32), int64=kind("int64", np.int64), float32=kind("float32", np.float32),
        float16=kind("float16"), bfloat16=bfloat16,
        arange=lambda begin, end, layout: Lanes(np.arange(begin, end, dtype=np.int32)),
        zeros=lambda shape, dtype, layout: Lanes(np.zeros(shape, dtype.numpy)),
        full=lambda shape, value, dtype, layout: Lanes(np.full(shape, value, dtype.numpy)),
        program_id=lambda axis: Lanes(np.int32(program.ids[axis])),
        num_programs=lambda axis: Lanes(np.int32(program.programs)),
        minimum=lambda x, y: Lanes(np.minimum(*_alike(x, y))), maximum=lambda x, y: Lanes(np.maximum(*_alike(x, y))),
        cdiv=lambda x, y: (x + y - 1) // y, exp=lambda x: Lanes(np.exp(plain(x))), exp2=lambda x: Lanes(np.exp2(plain(x))),
        log2=lambda x: Lanes(np.log2(plain(x))), rsqrt=lambda x: Lanes(np.float32(1) / np.sqrt(plain(x))),
        allocate_shared_memory=lambda *sizes: SimpleNamespace(index=lambda i: 8 * i),
    )  # fmt: skip


def _jit(function: Any = None, **options: Any) -> Any:
    return function if function is not None else _jit


class _Anything(ModuleType):
    """A module that has every name; what is not written down here fails when it is called."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def unknown(*args: Any, **options: Any) -> None:
            raise NotImplementedError(name)

        return unknown


def load_kernel(name: str, program: Program, **modules: ModuleType) -> Any:
    """The module ``kubeinfer.kernels.NAME`` for ``program``; ``modules`` are others of that folder that it imports."""
    language = named("language", **vars(_language(program)))
    methods = {method: getattr(program, method) for method in dir(program) if not method.startswith("_")}
    own = named("own", **methods)
    gluon = named("gluon", jit=_jit, language=language)
    hopper = named("hopper", mbarrier=SimpleNamespace(MBarrierLayout=lambda: None, init=program.make_barrier))
    kernel = named("launch", Kernel=lambda function: SimpleNamespace(function=function))
    stand_ins = {
        "triton": named("triton", jit=_jit, language=language), "triton.language": language,
        "triton.language.extra.cuda": named("cuda"), "triton.experimental": named("experimental", gluon=gluon),
        "triton.experimental.gluon": gluon, "triton.experimental.gluon.language": language,
        "triton.experimental.gluon.language.nvidia.hopper": hopper,
        "triton.experimental.gluon.nvidia.hopper": named("descriptors"), "kubeinfer.kernels.triton_launch": kernel,
        **{f"kubeinfer.kernels.{other}": own
           for other in ("gluon_bulk", "gluon_pair", "triton_mma", "triton_attention_tiles", "triton_split", "fused_linear")},
        **{f"kubeinfer.kernels.{other}": module for other, module in modules.items()},
    }  # fmt: skip
    return import_with(stand_ins, name)


def import_with(stand_ins: dict[str, ModuleType], name: str) -> Any:
    """A copy of the module ``kubeinfer.kernels.NAME`` that has ``stand_ins`` in place of what it imports."""
    import kubeinfer.kernels

    path = Path(kubeinfer.kernels.__file__).parent / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_in_numpy", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with instead({**stand_ins, spec.name: module}):  # where dataclasses look for it
        spec.loader.exec_module(module)
    return module


def named(name: str, **names: Any) -> ModuleType:
    module = _Anything(name)
    module.__dict__.update(names)
    return module


@contextmanager
def instead(modules: dict[str, ModuleType]) -> Iterator[None]:
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
