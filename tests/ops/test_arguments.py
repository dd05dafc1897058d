"""Bad input: an error that names the argument and its value."""

import pytest
import torch

from replknet.ops import depthwise_conv2d

INPUT, WEIGHT, BIAS = torch.zeros(2, 4, 9, 9), torch.zeros(4, 1, 3, 3), torch.zeros(4)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((INPUT[0], WEIGHT), {}, ValueError, r"input .*\(4, 9, 9\)"),
        ((INPUT, WEIGHT[0]), {}, ValueError, r"weight .*\(1, 3, 3\)"),
        ((INPUT, WEIGHT.expand(4, 2, 3, 3)), {}, ValueError, r"weight .*\(4, 2, 3, 3\)"),
        ((INPUT, WEIGHT[..., :0]), {}, ValueError, r"weight .*\(4, 1, 3, 0\)"),
        ((INPUT[:, :3], WEIGHT), {}, ValueError, "input has 3 channels and weight 4"),
        ((INPUT, WEIGHT, BIAS[:3]), {}, ValueError, r"bias .*\(4,\), got \(3,\)"),
        ((INPUT, WEIGHT, BIAS[None]), {}, ValueError, r"bias .*\(1, 4\)"),
        ((INPUT, WEIGHT.double()), {}, ValueError, "weight is torch.float64"),
        ((INPUT, WEIGHT, BIAS.half()), {}, ValueError, "bias is torch.float16"),
        ((INPUT.int(), WEIGHT.int()), {}, NotImplementedError, "torch.int32"),
        ((INPUT.cfloat(), WEIGHT.cfloat()), {}, NotImplementedError, "torch.complex64"),
        ((INPUT, WEIGHT.to("meta")), {}, ValueError, "weight is on meta"),
        ((INPUT, WEIGHT, BIAS.to("meta")), {}, ValueError, "bias is on meta"),
        ((INPUT, WEIGHT), {"padding": -1}, ValueError, "padding .*-1"),
        ((INPUT, WEIGHT), {"padding": (1, 1, -2, 1)}, ValueError, "padding .*-2"),
        ((INPUT, WEIGHT), {"padding": (1, 1, 1)}, ValueError, r"padding .*\(1, 1, 1\)"),
        ((INPUT, WEIGHT), {"padding": "full"}, ValueError, "padding .*'full'"),
        ((INPUT, WEIGHT), {"stride": 2}, ValueError, r"padding='same' needs stride 1"),
        ((INPUT, WEIGHT), {"stride": 0, "padding": 1}, ValueError, "stride .*0"),
        ((INPUT, WEIGHT), {"stride": (1, 2, 3), "padding": 1}, ValueError, "stride .*3"),
        ((INPUT, WEIGHT), {"dilation": 0}, ValueError, "dilation .*0"),
        ((INPUT, WEIGHT), {"padding": 0, "dilation": 5}, ValueError, "11x11 .* 9x9"),
        ((INPUT[..., :2], WEIGHT), {"padding": 0}, ValueError, "3x3 .* 9x2"),
        ((INPUT, WEIGHT), {"algorithm": "cudnn"}, ValueError, "algorithm .*'cudnn'"),
    ],
)
def test_bad_input_is_named(arguments, options, error, message):
    with pytest.raises(error, match=message):
        depthwise_conv2d(*arguments, **options)


def test_bad_input_is_named_on_meta_tensors_too():
    with pytest.raises(ValueError, match="input has 3 channels and weight 4"):
        depthwise_conv2d(INPUT[:, :3].to("meta"), WEIGHT.to("meta"))
