"""A simulated accelerator called ``npu``: PyTorch's private-use backend, renamed, whose memory is the host's.

Its tensors report the device ``npu:0``, cannot be mixed with the host's, and live in a memory that is counted. Whatever
makes the host wait for the device is written down, with the line of code that asked for it, and so is every tensor in
double precision, which NPUs do not compute in. Renaming holds for the process and cannot be undone: use it in one of
its own.

What is not simulated: speed, streams, the order in which a real device gets its work done, and its kernels. Uploads of
memory that is not pinned are not counted, though devices may wait for those, too.
"""

from __future__ import annotations

import sys
import weakref
from collections import Counter
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

import dithooks

PACKAGE = Path(dithooks.__file__).parent
TORCH = Path(torch.__file__).parent
# What returns numbers to Python, or has to know them to tell the shape of its result.
READS = {"_local_scalar_dense", "equal", "is_nonzero", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount"}
COPIES = {"_to_copy", "copy_", "_copy_from"}
MIXES = {"index", "index_put", "index_put_", "_index_put_impl_"}  # indices may lie on the host


class NpuTensor(Tensor):
    """A tensor on the simulated device; ``memory`` is where its numbers are."""

    memory: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, memory: Tensor) -> NpuTensor:
        layout = {"strides": memory.stride(), "storage_offset": memory.storage_offset()}
        made = Tensor._make_wrapper_subclass(cls, memory.shape, dtype=memory.dtype, device="npu:0", **layout)
        made.memory = memory
        return made

    def data_ptr(self) -> int:
        return self.memory.data_ptr()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: NpuTensor) -> None:
        Tensor.data.__set__(self, other)
        self.memory = other.memory

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise AssertionError(f"{func} reached a tensor of the simulated device outside of `with Npu()`")


class Npu(TorchDispatchMode):
    """The device at work. ``waits`` counts what the host waited for, ``doubles`` what is float64, by line of code."""

    def __init__(self) -> None:
        super().__init__()
        self.waits: Counter[str] = Counter()
        self.synchronized = 0
        self.queued: Counter[str] = Counter()  # copies in either direction that nobody waited for
        self.doubles: Counter[str] = Counter()
        self.pins = True  # whether the host's memory can be pinned
        self._pinned: dict[int, weakref.ref] = {}
        self._alive: dict[int, weakref.ref] = {}

    # -- what torch.npu and torch.accelerator say -----------------------------------------------------------------

    def synchronize(self, device=None) -> None:
        self.synchronized += 1

    def memory_allocated(self, device=None) -> int:
        """Bytes of all tensors on the device, each storage once."""
        tensors = [ref() for ref in list(self._alive.values())]
        storages = [tensor.memory.untyped_storage() for tensor in tensors if tensor is not None]
        return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())

    @property
    def ours(self) -> Counter[str]:
        """Waits that the library asked for itself; the pipeline that ships with it is not it."""
        return Counter(
            {line: n for line, n in self.waits.items() if line.startswith("dithooks/") and "/demo/" not in line}
        )

    # -- operators ------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        name = func._schema.name.removeprefix("aten::")
        tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
        here = [tensor for tensor in tensors if isinstance(tensor, NpuTensor)]
        target = kwargs.get("device")
        arrives = target is not None and torch.device(target).type == "npu"
        pinned = kwargs.pop("pin_memory", None)
        if name == "is_pinned":
            return id(tensors[0]) in self._pinned
        if pinned and not self.pins:
            raise NotImplementedError("this backend has no allocator for pinned memory")
        if not here and not arrives:
            made = func(*args, **kwargs)
            if pinned:
                self._note(self._pinned, made)
            return made
        if here and name not in COPIES | MIXES and any(t.dim() for t in tensors if not isinstance(t, NpuTensor)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but found npu:0 and cpu! ({name})")
        if name in COPIES:
            self._copied(name, args, kwargs, arrives)
        elif name in READS or (name in MIXES and self._looks(args)):
            self.waits[asked()] += 1
        stays = arrives or target is None  # else it is taken to the host
        if arrives:
            kwargs["device"] = "cpu"
        homes = {id(tensor.memory): tensor for tensor in here}
        args, kwargs = tree_map(lambda leaf: leaf.memory if isinstance(leaf, NpuTensor) else leaf, (args, kwargs))
        result = func(*args, **kwargs)
        if not stays or name == "_local_scalar_dense" or (name == "copy_" and id(args[0]) not in homes):
            return result

        def placed(leaf):
            known = homes.get(id(leaf))
            return leaf if not isinstance(leaf, Tensor) else self._made(leaf) if known is None else known

        return tree_map(placed, result)

    def _made(self, memory: Tensor) -> NpuTensor:
        tensor = NpuTensor(memory)
        if memory.dtype in (torch.float64, torch.complex128):
            self.doubles[asked()] += 1
        self._note(self._alive, tensor)
        return tensor

    def _copied(self, name, args, kwargs, arrives) -> None:
        """Copies that cross: to the host they wait, unless queued into pinned memory; from it, unless out of such."""
        if name == "_to_copy":
            source, crosses = args[0], (kwargs.get("device") is not None and arrives != isinstance(args[0], NpuTensor))
            host = None if isinstance(source, NpuTensor) else source
            queued = kwargs.get("non_blocking", False)
        else:
            into, source = args[:2]
            crosses = isinstance(into, NpuTensor) != isinstance(source, NpuTensor)
            host = source if isinstance(into, NpuTensor) else into
            queued = (len(args) > 2 and args[2]) or kwargs.get("non_blocking", False)
        if not crosses:
            return
        free = queued and host is not None and id(host) in self._pinned
        up = not isinstance(source, NpuTensor)
        if free:
            self.queued["up" if up else "down"] += 1
        elif not up:
            self.waits[asked()] += 1

    @staticmethod
    def _looks(args) -> bool:
        return any(t is not None and t.dtype == torch.bool for t in args[1])

    @staticmethod
    def _note(known: dict[int, weakref.ref], tensor: Tensor) -> None:
        number = id(tensor)
        known[number] = weakref.ref(tensor, lambda _: known.pop(number, None))

    def __enter__(self):
        _CURRENT.append(self)
        return super().__enter__()

    def __exit__(self, *error):
        _CURRENT.remove(self)
        return super().__exit__(*error)


_CURRENT: list[Npu] = []


def asked() -> str:
    """The innermost line of code that is neither PyTorch's nor this file's; of the library with its folder."""
    frame = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        if path != Path(__file__) and TORCH not in path.parents and not frame.f_code.co_filename.startswith("<"):
            near = path.relative_to(PACKAGE.parent) if PACKAGE in path.parents else Path(path.name)
            return f"{near.as_posix()}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "?"


class Module:
    """What stands as ``torch.npu``."""

    def is_initialized(self) -> bool:
        return True

    def is_available(self) -> bool:
        return True

    def current_device(self) -> int:
        return 0

    def device_count(self) -> int:
        return 1

    def _is_in_bad_fork(self) -> bool:
        return False

    def manual_seed_all(self, seed: int) -> None: ...

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.float16, torch.bfloat16]

    def get_device_name(self, device=None) -> str:
        return "simulated NPU"

    def synchronize(self, device=None) -> None:
        for npu in _CURRENT:
            npu.synchronize()

    def memory_allocated(self, device=None) -> int:
        return _CURRENT[-1].memory_allocated()


def set_up() -> None:
    """Rename the backend, once in a process. PyTorch's own way to synchronise is not there, as in older torch_npu."""
    _setup_privateuseone_for_python_backend("npu", backend_module=Module())
