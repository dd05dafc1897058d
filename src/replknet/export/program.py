"""A network as a program of standard operators, for any batch and image size."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram


def trace(network: nn.Module, images: Tensor) -> ExportedProgram:
    """Program of ``network`` for inputs like ``images``, of any batch, height and width.

    Its outputs are the tensors in what the network returns, in their order.

    Raises:
        NotImplementedError: The network's forward depends on these sizes in a way that cannot
            be put in a program.
    """
    # A batch of more than one and unequal sides, so that no size looks like another or constant.
    example = images[:1].new_zeros(2, images.shape[1], images.shape[2], images.shape[3] + 32)
    sizes = {0: Dim.DYNAMIC, 2: Dim.DYNAMIC, 3: Dim.DYNAMIC}
    name = type(network).__name__
    try:
        with torch.no_grad():
            program = torch.export.export(network, (example,), dynamic_shapes=(sizes,))
    except Exception as error:  # whatever the network and the tracer raise
        raise NotImplementedError(
            f"{name} cannot be exported for any batch and image size: {error}"
        ) from error
    return program
