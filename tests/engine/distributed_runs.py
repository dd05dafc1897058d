"""Toy runs in several processes, started by torchrun; each process writes what it saw as JSON."""

from __future__ import annotations

import json
import os
import signal
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from runs import toy_config
from torch import nn
from toy import ToyConfig, ToyTask

from replknet.engine.batchnorm import SynchronizedBatchNorm2d
from replknet.engine.config import BatchConfig, EmaConfig, OptimizerConfig
from replknet.engine.step import NonFiniteError
from replknet.engine.train import main

# nothing that differs with the way a batch is split
SECTIONS = {"data": ToyConfig(samples=64), "ema": EmaConfig(decay=0.8)}
BATCH_NORM = {**SECTIONS, "data": ToyConfig(samples=64, batch_norm=True)}


def batch_norm_error() -> dict[str, float]:
    """How far the synchronized batch norm of a share is from PyTorch's of the whole batch."""
    generator = torch.Generator().manual_seed(0)
    whole = torch.randn(4, 3, 5, 7, generator=generator, dtype=torch.float64) * 3 + 10
    gradient = torch.randn(whole.shape, generator=generator, dtype=torch.float64)
    shares = slice(2 * int(os.environ["RANK"]), 2 * int(os.environ["RANK"]) + 2)
    found = []
    for norm, input, upstream in (
        (nn.BatchNorm2d(3), whole, gradient),
        (SynchronizedBatchNorm2d(3), whole[shares].clone(), gradient[shares]),
    ):
        norm.double()
        input.requires_grad_()
        output = norm(input)
        output.backward(upstream)
        weight_grad = norm.weight.grad.clone()
        if isinstance(norm, SynchronizedBatchNorm2d):
            dist.all_reduce(weight_grad)
        tensors = {"output": output, "grad_input": input.grad, "grad_weight": weight_grad}
        found.append({**tensors, "mean": norm.running_mean, "variance": norm.running_var})
    one, share = found
    one = {**one, **{name: one[name][shares] for name in ("output", "grad_input")}}
    return {name: (share[name] - one[name]).abs().max().item() for name in one}


def stop_in(rank: int, number: int) -> None:
    """Send SIGTERM to process ``rank`` in its ``number``-th loss from now on."""
    original, calls = ToyTask.loss, []

    def loss(self, model, batch):
        calls.append(None)
        if int(os.environ["RANK"]) == rank and len(calls) == number:
            os.kill(os.getpid(), signal.SIGTERM)
        return original(self, model, batch)

    ToyTask.loss = loss


def errors_of(config) -> str:
    try:
        main(config)
    except (ValueError, NonFiniteError) as error:
        return str(error)
    return ""


def run_all(directory: Path) -> dict[str, object]:
    seen: dict[str, object] = {}
    result = main(toy_config(directory / "plain", **SECTIONS))  # joins and leaves by itself
    seen["samples"] = result.evaluation["samples"]
    seen["left"] = not dist.is_initialized()
    # From now on the group exists already, as under Ray. It meets in a file: torchrun's store
    # still holds the addresses of the first one.
    dist.init_process_group(
        "gloo",
        init_method=f"file://{directory / 'meeting'}",
        rank=int(os.environ["RANK"]),
        world_size=2,
    )
    main(toy_config(directory / "batch_norm", **BATCH_NORM))
    seen["batch_norm"] = batch_norm_error()
    main(toy_config(directory / "accumulated", batch=BatchConfig(8, 2), **SECTIONS))
    other = toy_config(directory / "plain", **{**SECTIONS, "optimizer": OptimizerConfig(lr=0.5)})
    seen["foreign"] = errors_of(other)
    seen["indivisible"] = errors_of(toy_config(directory / "odd", batch=BatchConfig(7)))
    bad = replace(SECTIONS["data"], nan_at=3)
    seen["nan"] = errors_of(toy_config(directory / "nan", **{**SECTIONS, "data": bad}))
    stop_in(rank=1, number=10)
    stopped = main(toy_config(directory / "stopped", **SECTIONS))
    seen["stopped"] = [stopped.finished, stopped.step]
    seen["resumed"] = main(toy_config(directory / "stopped", **SECTIONS)).finished
    dist.barrier()
    dist.destroy_process_group()  # whose threads must not meet the end of the interpreter
    return seen


if __name__ == "__main__":
    torch.set_num_threads(1)
    root = Path(sys.argv[1])
    outcome = run_all(root)
    (root / f"process{os.environ['RANK']}.json").write_text(json.dumps(outcome))
