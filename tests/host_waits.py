"""Counts where a program on a GPU would make the host wait, on a machine without one.

A stand-in for `torch.cuda.set_sync_debug_mode`: some CPU tensors are declared to be on the GPU. All
results computed from them, and all tensors made with `device=`, are on the GPU too.
"""
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

READS = {"cpu", "numpy", "tolist", "item", "__bool__", "__float__", "__int__", "__index__"}
COPIES = {"tensor", "as_tensor", "new_tensor"}
DATA_DEPENDENT = {"nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive",
                  "_local_scalar_dense"}


class HostWaits:
    """`with HostWaits(on_gpu) as waits:` then `waits.found` lists what the host waited for."""

    def __init__(self, on_gpu):
        self.found = []
        self.storages = {}      # kept alive, so that no address is used twice
        self.inside = False     # a function that computes with tensors on the GPU
        self.mark(on_gpu)
        self.modes = [Functions(self), Operators(self)]

    def __enter__(self):
        for mode in self.modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self.modes):
            mode.__exit__(*error)

    def mark(self, tree):
        """Declare all tensors in lists and dictionaries to be on the GPU."""
        for x in tree_leaves(tree):
            if isinstance(x, torch.Tensor):
                self.storages[x.untyped_storage()._cdata] = x.untyped_storage()
        return tree

    def on_gpu(self, x):
        return isinstance(x, torch.Tensor) and x.untyped_storage()._cdata in self.storages


class Functions(TorchFunctionMode):
    """Copies between host and GPU, which are no operations on one CPU, and tensors made there."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(function, "__name__", "")
        from_gpu = bool(args) and self.waits.on_gpu(args[0])
        if from_gpu and name in READS:
            self.waits.found.append(name)
            host = torch.from_numpy(torch.Tensor.numpy(args[0].detach()).copy())
            return function(host, *args[1:], **kwargs)
        outer = self.waits.inside
        self.waits.inside = any(self.waits.on_gpu(x) for x in tree_leaves((args, kwargs)))
        result = function(*args, **kwargs)
        self.waits.inside = outer
        devices = [x for x in (*args, *kwargs.values()) if isinstance(x, torch.device)]
        if not devices or from_gpu:
            return result
        if name in COPIES or name == "to" and not kwargs.get("non_blocking"):
            self.waits.found.append(f"{name} copies a host tensor to the device")
        return self.waits.mark(result.clone() if name == "to" else result)


class Operators(TorchDispatchMode):
    """Operators whose result the host must know, and host tensors among the GPU's."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = operator.overloadpacket.__name__
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        on_gpu = [x for x in tensors if self.waits.on_gpu(x)]
        on_host = [x for x in tensors if x.dim() and not self.waits.on_gpu(x)]
        masks = [x for x in tensors[1:] if x.dtype == torch.bool]
        if on_gpu and name in DATA_DEPENDENT:
            self.waits.found.append(name)
        elif on_gpu and on_host:
            self.waits.found.append(f"{name} with a host tensor of shape {tuple(on_host[0].shape)}")
        elif on_gpu and masks and name in ("index", "index_put", "index_put_"):
            self.waits.found.append(f"{name} with a mask")
        result = operator(*args, **kwargs)
        if on_gpu or self.waits.inside and not tensors:
            self.waits.mark(result)
        return result
