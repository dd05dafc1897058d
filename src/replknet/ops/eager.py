"""Whether a call may go past PyTorch's dispatcher, which takes longer than a small map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.compiler import is_compiling

# Under names of their own: looking them up in PyTorch's modules reads what kernels have evicted.
_keys, _modes = torch._C._dispatch_keys, torch._C._dispatch_tls_local_include_set
_autocasts, _profiles = torch._C._is_any_autocast_enabled, torch.autograd._profiler_enabled

_ORDINARY_TYPES = (Tensor, torch.nn.Parameter)
_Key, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
_ON_CUDA = {
    _Key.CPU: _Key.CUDA,
    _Key.AutogradCPU: _Key.AutogradCUDA,
    _Key.AutocastCPU: _Key.AutocastCUDA,
    _Key.ADInplaceOrView: _Key.ADInplaceOrView,
}


def _ordinary_keys() -> set[int]:
    """Keys of plain tensors, made in and out of inference mode, on a CPU or a CUDA GPU."""
    plain = [torch.zeros((), device="cpu")]
    with torch.inference_mode():
        plain.append(torch.zeros((), device="cpu"))
    ordinary = set()
    for tensor in plain:
        keys, there = _keys(tensor), _KeySet(_Key.CUDA)
        for on_cpu, on_cuda in _ON_CUDA.items():
            if keys.has(on_cpu):
                there |= _KeySet(on_cuda)
        ordinary |= {keys.raw_repr(), there.raw_repr()}
    return ordinary


_DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)
_ORDINARY_KEYS = _ordinary_keys()
_ORDINARY_MODES = {
    _KeySet(_Key.BackendSelect).raw_repr(),  # in inference mode
    (_KeySet(_Key.BackendSelect) | _KeySet(_Key.ADInplaceOrView)).raw_repr(),
}


def transforms_active() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work."""
    if forward_ad._current_level >= 0:
        return True
    return not is_compiling() and torch._C._are_functorch_transforms_active()


def differentiated_by_transforms() -> bool:
    """Whether forward-mode differentiation, or a torch.func that differentiates, is at work."""
    if forward_ad._current_level >= 0:
        return True
    if is_compiling() or not torch._C._are_functorch_transforms_active():
        return False
    return any(level.key() in _DERIVATIVES for level in torch._C._functorch.get_interpreter_stack())


def traced() -> bool:
    """Whether a compiler, tracer, transform or mode is to see operators."""
    return (
        is_compiling()
        or _modes().raw_repr() not in _ORDINARY_MODES  # torch.jit.trace has one, too
        or forward_ad._current_level >= 0
    )


def nothing_listens() -> bool:
    """Whether no transform, mode, autocast, tracer, compiler or profiler is to see operators."""
    return not (traced() or _autocasts() or _profiles())


def is_ordinary(tensor: Tensor | None) -> bool:
    """Whether a tensor is no more than strided memory of a CPU or CUDA GPU (or is None)."""
    return tensor is None or (
        type(tensor) in _ORDINARY_TYPES and _keys(tensor).raw_repr() in _ORDINARY_KEYS
    )
