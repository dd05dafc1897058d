"""Whether a call may go past PyTorch's dispatcher, which takes longer than a small map."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_ORDINARY_TYPES = (Tensor, torch.nn.Parameter)
_Key, _KeySet = torch._C.DispatchKey, torch._C.DispatchKeySet
_IN_INFERENCE_MODE = (
    _KeySet(_Key.CPU) | _KeySet(_Key.AutocastCPU),
    _KeySet(_Key.CUDA) | _KeySet(_Key.AutocastCUDA),
)
_DIFFERENTIABLE = (
    _IN_INFERENCE_MODE[0] | _KeySet(_Key.AutogradCPU) | _KeySet(_Key.ADInplaceOrView),
    _IN_INFERENCE_MODE[1] | _KeySet(_Key.AutogradCUDA) | _KeySet(_Key.ADInplaceOrView),
)
_ORDINARY_KEYS = {keys.raw_repr() for keys in (*_IN_INFERENCE_MODE, *_DIFFERENTIABLE)}
_ORDINARY_MODES = {
    _KeySet(_Key.BackendSelect).raw_repr(),  # in inference mode
    (_KeySet(_Key.BackendSelect) | _KeySet(_Key.ADInplaceOrView)).raw_repr(),
}


def nothing_listens() -> bool:
    """Whether no transform, mode, autocast, tracer, compiler or profiler is to see operators."""
    return (
        not torch.compiler.is_compiling()
        and torch._C._dispatch_tls_local_include_set().raw_repr() in _ORDINARY_MODES
        and not torch.is_autocast_enabled("cpu")
        and not torch.is_autocast_enabled("cuda")
        and not torch.autograd._profiler_enabled()
        and forward_ad._current_level < 0
    )


def is_ordinary(tensor: Tensor | None) -> bool:
    """Whether a tensor is no more than strided memory of a CPU or CUDA GPU (or is None)."""
    return tensor is None or (
        type(tensor) in _ORDINARY_TYPES
        and torch._C._dispatch_keys(tensor).raw_repr() in _ORDINARY_KEYS
    )
