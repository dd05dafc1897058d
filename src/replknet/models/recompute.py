"""Gradient checkpointing that leaves the running statistics alone while it recomputes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint


def checkpoint_block(block: nn.Module, x: Tensor) -> Tensor:
    """``block(x)``, whose activations are recomputed in the backward pass.

    Plain checkpointing runs every training-mode batch norm twice, so its running statistics move
    twice per step; here the second run uses the batch's statistics without recording them.
    """
    if torch.compiler.is_compiling():
        # The compiler recomputes values, not side effects, and traces no context manager.
        return checkpoint(block, x, use_reentrant=False)
    return checkpoint(
        block,
        x,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), _statistics_untouched(block)),
    )


@contextmanager
def _statistics_untouched(block: nn.Module) -> Iterator[None]:
    """Batch norms of ``block`` move their running statistics by nothing.

    Momentum 0 instead of ``track_running_stats=False``: the same tensors must be saved for the
    backward pass as in the first run.
    """
    norms = [m for m in block.modules() if isinstance(m, _BatchNorm)]
    kept = [(norm, norm.momentum, norm.num_batches_tracked) for norm in norms]
    for norm in norms:
        norm.momentum, norm.num_batches_tracked = 0.0, None
    try:
        yield
    finally:
        for norm, momentum, count in kept:
            norm.momentum, norm.num_batches_tracked = momentum, count
