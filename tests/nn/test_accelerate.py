"""accelerate() on models of others."""

import pytest
import timm
import torch
from timm.layers import Conv2dSame
from torch import nn
from torch.nn.utils import parametrizations

import replknet
from replknet.nn import DepthwiseConv2d, accelerate, acceleration_report


def mixed_model():
    torch.manual_seed(0)
    shared = nn.Conv2d(8, 8, 5, padding=2, groups=8)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.Conv2d(8, 8, 7, padding=3, groups=8, padding_mode="reflect"),
        nn.Sequential(shared, nn.ReLU(), shared),
        Conv2dSame(8, 8, 3, stride=2, groups=8),
        parametrizations.weight_norm(nn.Conv2d(8, 8, 3, groups=8)),
        DepthwiseConv2d(8, 8, 3),
        nn.Conv2d(8, 16, 3, groups=8),
        nn.Conv2d(16, 16, 1, groups=4),
    )


def test_replaces_the_eligible_and_says_why_not_the_others():
    model = mixed_model()
    report = acceleration_report(model)
    assert report.replaced == ("1", "2.0")
    reasons = {layer.name: layer.reason for layer in report.layers}
    assert set(reasons) == {"1", "2.0", "3", "4", "5", "6"}
    assert "subclass" in reasons["3"]
    assert "subclass" in reasons["4"]
    assert "already" in reasons["5"]
    assert "2 filters a channel" in reasons["6"]
    text = str(report)
    assert "2 of 6 depthwise convolutions" in text
    assert "3: Conv2dSame(8, 8" in text


def test_the_copy_computes_the_same_and_the_original_is_left_alone():
    model = mixed_model().eval()
    fast = replknet.accelerate(model)
    assert type(model[1]) is nn.Conv2d
    assert type(fast[1]) is type(fast[2][0]) is DepthwiseConv2d
    assert fast[2][0] is fast[2][2]
    assert type(fast[0]) is nn.Conv2d
    input = torch.randn(2, 3, 24, 24)
    torch.testing.assert_close(fast(input), model(input), rtol=1e-5, atol=1e-5)
    assert list(fast.state_dict()) == list(model.state_dict())
    with torch.no_grad():
        fast[1].weight.zero_()
    assert model[1].weight.abs().sum() > 0


def test_hooks_of_a_replaced_layer_still_run():
    conv = nn.Conv2d(4, 4, 3, groups=4)
    conv.register_forward_hook(lambda module, args, output: output + 100)
    assert accelerate(conv)(torch.zeros(1, 4, 5, 5)).min() > 50


def test_a_second_time_changes_nothing():
    once = accelerate(mixed_model())
    assert acceleration_report(once).replaced == ()
    assert [type(m) for m in accelerate(once).modules()] == [type(m) for m in once.modules()]


@pytest.mark.parametrize("name", ["convnext_atto", "mobilenetv3_small_050", "efficientvit_b0"])
def test_timm_models_give_the_same_outputs_and_gradients(name):
    torch.manual_seed(0)
    model = timm.create_model(name, num_classes=5).eval()
    fast = accelerate(model)
    assert acceleration_report(model).replaced
    input = torch.randn(2, 3, 64, 64).to(memory_format=torch.channels_last)
    got, expected = fast(input), model(input)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    got.sum().backward()
    expected.sum().backward()
    for (label, a), b in zip(fast.named_parameters(), model.parameters(), strict=True):
        scale = b.grad.abs().max() + 1e-6
        assert (a.grad - b.grad).abs().max() < 1e-3 * scale, label
