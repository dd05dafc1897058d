import copy

import pytest
import torch
from torch import nn
from toy import ToyConfig, ToyModel

from replknet.engine.config import OptimizerConfig
from replknet.engine.optimizer import create_optimizer


def test_step_is_adamw_with_decay_of_matrices_only():
    torch.manual_seed(0)
    model = ToyModel(ToyConfig()).double()
    config = OptimizerConfig(lr=0.1, weight_decay=0.3, betas=(0.8, 0.9), eps=1e-3, layer_decay=0.5)
    optimizer = create_optimizer(model, config)
    for group in optimizer.param_groups:
        group["lr"] = config.lr * group["lr_scale"]
    before = copy.deepcopy(model)
    gradients = {}
    for name, parameter in model.named_parameters():
        gradients[name] = parameter.grad = torch.randn_like(parameter)
    optimizer.step()
    scale = {"stem": 0.25, "norm": 0.5, "head": 1.0}
    for name, parameter in model.named_parameters():
        old, gradient = before.get_parameter(name), gradients[name]
        decay = 0.3 if parameter.ndim > 1 else 0.0
        rate = 0.1 * scale[name.split(".")[0]]
        # first step of Adam: the bias-corrected moments are g and g squared
        wanted = old - rate * (decay * old + gradient / (gradient.abs() + 1e-3))
        torch.testing.assert_close(parameter, wanted)


def test_frozen_parameters_are_left_out():
    model = ToyModel(ToyConfig())
    model.stem.requires_grad_(False)
    optimizer = create_optimizer(model, OptimizerConfig())
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in [*model.norm.parameters(), *model.head.parameters()]}


def test_layer_decay_needs_layers():
    with pytest.raises(ValueError, match="layer_decay needs a model with group_matcher"):
        create_optimizer(nn.Linear(2, 2), OptimizerConfig(layer_decay=0.7))
