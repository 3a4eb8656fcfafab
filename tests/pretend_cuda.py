"""A CUDA device without one: tensors that say `cuda:0`, hold CPU data, and refuse what CUDA refuses.

    with PretendCuda() as cuda:
        model = model.to("cuda:0")
        model.read(tokens.to("cuda:0"), ...)
    cuda.waits, cuda.where, cuda.launches, cuda.to_host

It counts what the host waits for, launches, and bytes that come to the host. A copy from the host to the
device waits unless it is `non_blocking`. No backward: that wants a device. A tensor's CPU values: x.on_host.
"""
import contextlib
import ctypes
import traceback
from collections import Counter
from pathlib import Path

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
ROOT = Path(__file__).resolve().parent.parent
DATA_DEPENDENT = set(  # what they make, or its shape, comes back to the host
    "_local_scalar_dense nonzero masked_select _unique2 unique_dim bincount is_nonzero equal".split())
FREE = set(  # no kernel
    "view _unsafe_view expand unsqueeze squeeze transpose t permute slice select detach alias as_strided "
    "split chunk unbind empty empty_like new_empty lift_fresh _reshape_alias empty_strided diagonal unfold "
    "is_same_size split_with_sizes new_empty_strided sym_size sym_numel".split())
INDEXING = ("index", "_unsafe_index", "index_put", "index_put_", "_index_put_impl_")


class Pretend(torch.Tensor):
    @staticmethod
    def __new__(cls, real, mode):
        x = torch.Tensor._make_wrapper_subclass(
            cls, real.size(), strides=real.stride(), storage_offset=real.storage_offset(), dtype=real.dtype,
            device=CUDA, requires_grad=False)
        x.on_host, x.pretending = real, mode
        return x

    __torch_function__ = torch._C._disabled_torch_function_impl

    def __repr__(self):
        return f"Pretend({self.on_host})"

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        mode = next(x for x in tree_flatten((args, kwargs))[0] if isinstance(x, Pretend)).pretending
        return mode.run(function, args, kwargs or {})


class PretendCuda(TorchDispatchMode):
    """waits: {kind: count}; where: {line of the project: count}; launches; to_host: bytes."""

    def __init__(self):
        super().__init__()
        self.reset()

    def reset(self):
        self.waits, self.where, self.launches, self.to_host = Counter(), Counter(), 0, 0

    def __enter__(self):
        with contextlib.ExitStack() as stack:
            # A CPU build of torch gets a guard for CUDA devices that does nothing: Meta's
            library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
            registry = (ctypes.c_void_p * 21).in_dll(library, "_ZN3c104impl26device_guard_impl_registryE")
            before = registry[1]
            stack.callback(registry.__setitem__, 1, before)
            registry[1] = before or registry[14]
            torch._C._ensureCUDADeviceGuardSet()
            overwrite = torch.__future__.get_overwrite_module_params_on_conversion()
            stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, overwrite)
            torch.__future__.set_overwrite_module_params_on_conversion(True)  # else modules keep CPU shells
            stack.callback(setattr, torch.cuda, "_lazy_init", torch.cuda._lazy_init)
            torch.cuda._lazy_init = lambda: None  # factories ask for it
            self.interpret(stack)
            stack.enter_context(Functions(self))
            self.stack = stack.pop_all()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        return self.stack.__exit__(*error)

    def interpret(self, stack):
        """Triton's interpreter, where there is one, finds the numbers on the host."""
        with contextlib.suppress(ImportError):
            from triton.runtime.interpreter import GridExecutor
            call = GridExecutor.__call__

            def launch(executor, *args, **kwargs):
                pretended = [isinstance(x, Pretend) for x in args]
                self.launches += any(pretended)
                args = [x.on_host if own else x for x, own in zip(args, pretended)]
                return call(executor, *args, **kwargs)
            stack.callback(setattr, GridExecutor, "__call__", call)
            GridExecutor.__call__ = launch

    def wait(self, kind):
        self.waits[kind] += 1
        own = [frame for frame in traceback.extract_stack() if Path(frame.filename).parent == ROOT]
        where = f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}" if own else "?"
        self.where[f"{where}   [{kind}]"] += 1

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return self.run(function, args, kwargs or {})

    def run(self, function, args, kwargs):
        flat, spec = tree_flatten((args, kwargs))
        pretended = [x for x in flat if isinstance(x, Pretend)]
        host = [x for x in flat if isinstance(x, torch.Tensor) and not isinstance(x, Pretend)]
        name, asked = function._schema.name.split("::")[1], kwargs.get("device")
        asked = None if asked is None else torch.device(asked).type
        known = {id(x.on_host): x for x in pretended}
        real = [x.on_host if isinstance(x, Pretend) else x for x in flat]
        real_args, real_kwargs = tree_unflatten(real, spec)
        real_kwargs = {key: value for key, value in real_kwargs.items() if key != "pin_memory"}
        if asked == "cuda":
            real_kwargs["device"] = torch.device("cpu")
        if name == "_to_copy":
            return self.copied(function(*real_args, **real_kwargs), pretended, asked, kwargs)
        if name == "copy_" and pretended and host:
            self.moved(args[1], isinstance(args[0], Pretend), len(args) > 2 and args[2])
            function(*real_args, **real_kwargs)
            return args[0]
        if pretended:
            self.check(function, name, args, host, pretended)
        made = function(*real_args, **real_kwargs)
        if not pretended and asked != "cuda":
            return made
        self.launches += name not in FREE
        if name == "_local_scalar_dense":
            return made

        def wrap(x):
            if not isinstance(x, torch.Tensor):
                return x
            return known[id(x)] if id(x) in known else Pretend(x, self)
        return tree_map(wrap, made)

    def copied(self, made, pretended, asked, kwargs):
        """The result of a `to`: made on the CPU."""
        target = asked or ("cuda" if pretended else "cpu")
        if bool(pretended) == (target == "cuda"):
            self.launches += bool(pretended)
        else:
            self.moved(made, target == "cuda", kwargs.get("non_blocking"))
        return Pretend(made, self) if target == "cuda" else made

    def moved(self, x, to_device, non_blocking):
        if not to_device:
            self.wait("device to host")
            self.to_host += x.nbytes
        elif not non_blocking:
            self.wait("host to device")

    def check(self, function, name, args, host, pretended):
        """Refuse mixed devices, and note what waits."""
        wrong = [tuple(x.shape) for x in host if x.ndim]
        if wrong and name in INDEXING and isinstance(args[0], Pretend):
            self.wait("a CPU index of a CUDA tensor")
        elif wrong:
            raise RuntimeError(f"{function}: tensors of shapes {wrong} are on the CPU, "
                               f"{[tuple(x.shape) for x in pretended]} on CUDA")
        if name in DATA_DEPENDENT:
            self.wait(name)
        if name in INDEXING and any(isinstance(i, torch.Tensor) and i.dtype == torch.bool for i in args[1]):
            self.wait("a mask as an index")
        if name == "repeat_interleave" and args[0].ndim:
            self.wait(name)


class Functions(TorchFunctionMode):
    """What does not come to the dispatcher in the form that it has on a CUDA device."""

    def __init__(self, cuda):
        super().__init__()
        self.cuda = cuda

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in (torch.tensor, torch.as_tensor) and kwargs.get("device") is not None:
            device = kwargs.pop("device")  # a CPU tensor, then a copy
            return function(*args, **kwargs).to(device)
        if function is torch.Tensor.pin_memory:
            return args[0]
        if function is torch.Tensor.new_tensor:
            return torch.tensor(args[1], dtype=kwargs.get("dtype", args[0].dtype)).to(args[0].device)
        if function is torch.Tensor.tolist and isinstance(args[0], Pretend):
            self.cuda.wait("tolist")
            self.cuda.to_host += args[0].on_host.nbytes
            return args[0].on_host.tolist()
        if function in (torch.Tensor.__getitem__, torch.Tensor.__setitem__) and isinstance(args[0], Pretend):
            index = args[1] if isinstance(args[1], tuple) else (args[1],)  # a list becomes a tensor
            index = tuple(torch.tensor(i).to(CUDA) if isinstance(i, list) else i for i in index)
            return function(args[0], index, *args[2:])
        if function is torch.repeat_interleave and "output_size" in kwargs:
            real = [x.on_host if isinstance(x, Pretend) else x for x in args]
            made = function(*real, **kwargs)  # of a known size: nobody waits
            return Pretend(made, self.cuda) if isinstance(args[0], Pretend) else made
        return function(*args, **kwargs)
