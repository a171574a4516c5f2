"""Bytes: what tensors hold, and by how much the process grows."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from tenfold.models.inference import synchronize
from tenfold.models.quantised import is_packed

_STATUS = Path("/proc/self/status")
_CLEAR_REFS = Path("/proc/self/clear_refs")
_SAMPLE_SECONDS = 0.001


@dataclass
class MemoryGrowth:
    """How far memory rose above the state at entry.

    Args:
        method: how it was measured: ``cuda allocator``, ``VmHWM`` (the kernel's high-water mark of this process: exact)
            or ``sampled`` (resident memory every millisecond: short peaks may be missed).
        start: bytes in use at entry.
        peak: most bytes in use until the end, at least ``start``; filled in at the end.
    """

    method: str
    start: int
    peak: int = 0

    @property
    def growth(self) -> int:
        """Bytes above the state at entry."""
        return max(0, self.peak - self.start)


@contextlib.contextmanager
def measure_growth(device: torch.device | str = "cpu") -> Iterator[MemoryGrowth]:
    """Measure the peak growth of memory over the state at entry, of the process (CPU) or of the allocator (CUDA).

    On the CPU, memory that earlier work freed is first given back to the system; otherwise the block could grow into it
    unseen. Other threads of the process count too.

    >>> with measure_growth() as memory:
    ...     block = torch.ones(2**20, 16)
    >>> memory.growth > 0.9 * 2**26  # the process may free a little of its own meanwhile
    True
    """
    device = torch.device(device)
    gc.collect()
    if device.type == "cuda":
        synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        memory = MemoryGrowth("cuda allocator", torch.cuda.memory_allocated(device))
        yield memory
        synchronize(device)
        memory.peak = torch.cuda.max_memory_allocated(device)
        return
    _trim()
    if _reset_high_water_mark():
        memory = MemoryGrowth("VmHWM", _status("VmRSS"))
        yield memory
        memory.peak = max(_status("VmHWM"), memory.start)
        return
    with _sampling() as memory:
        yield memory


def peak_growth(fn: Callable[[], object], device: torch.device | str = "cpu") -> MemoryGrowth:
    """``measure_growth`` around one call.

    >>> peak_growth(lambda: torch.ones(2**20, 16).sum()).growth > 0.9 * 2**26
    True
    """
    with measure_growth(device) as memory:
        fn()
    return memory


def _trim() -> None:
    """Ask glibc to return free memory; other C libraries have no such call and keep less."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _reset_high_water_mark() -> bool:
    try:
        _CLEAR_REFS.write_text("5")
    except OSError:
        return False
    return True


def _status(key: str) -> int:
    """A line of the kernel's status of this process, in bytes."""
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


@contextlib.contextmanager
def _sampling() -> Iterator[MemoryGrowth]:
    import psutil

    process = psutil.Process()
    memory = MemoryGrowth("sampled", process.memory_info().rss)
    memory.peak = memory.start
    done = threading.Event()

    def sample() -> None:
        while not done.wait(_SAMPLE_SECONDS):
            memory.peak = max(memory.peak, process.memory_info().rss)

    thread = threading.Thread(target=sample, daemon=True)
    thread.start()
    try:
        yield memory
    finally:
        done.set()
        thread.join()
        memory.peak = max(memory.peak, process.memory_info().rss)


def stored_bytes(thing: object) -> int:
    """Bytes of all tensors that a cache (or any object made of plain Python) holds, shared storage counted once.

    A view counts with the whole storage it keeps alive. Lists, tuples, dictionaries, attributes and the inner parts of
    tensor subclasses are followed; modules are not, for their weights are not a cache.

    >>> keys = torch.zeros(4, 8)
    >>> stored_bytes({"keys": keys, "the same": keys[:1]})
    128
    """
    storages: dict[tuple[torch.device, int], int] = {}
    seen: dict[int, object] = {}  # holds what it has seen, lest an id be used again
    queue = [thing]
    while queue:
        item = queue.pop()
        if id(item) in seen:
            continue
        seen[id(item)] = item
        if isinstance(item, torch.Tensor):
            if hasattr(item, "__tensor_flatten__"):
                queue += [getattr(item, name) for name in item.__tensor_flatten__()[0]]
            elif item.device.type != "meta":
                storage = item.untyped_storage()
                storages[item.device, storage.data_ptr()] = storage.nbytes()
        elif isinstance(item, dict):
            queue += item.values()
        elif isinstance(item, list | tuple | set):
            queue += item
        elif not isinstance(item, torch.nn.Module | type) and hasattr(item, "__dict__"):
            queue += vars(item).values()
    return sum(storages.values())


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of parameters and buffers, tied ones counted once, and of the scales of packed ones.

    bitsandbytes keeps those beside the codes: on the parameter or, after a first pass of 8-bit layers, on the layer.
    """
    packed = [module for module in model.modules() if is_packed(module)]
    scales = [
        (vars(module).get("state"), getattr(module._parameters.get("weight"), "__dict__", {})) for module in packed
    ]
    return stored_bytes([*model.parameters(), *model.buffers(), *scales])
