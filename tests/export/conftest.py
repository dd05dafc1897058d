import pytest
import torch

from replknet.models import create_model

# Large kernels that cover the whole map, as in the published networks.
SMALL = {"layers": (1, 1, 1), "channels": (8, 12, 16), "kernels": (9, 7, 5), "small_kernel": 3}


@pytest.fixture(scope="session")
def model():
    """A small network whose outputs depend on the image as those of a trained one do."""
    torch.manual_seed(0)
    model = create_model("replknet_nano", num_classes=3, in_chans=1, **SMALL)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            sign = torch.where(torch.rand_like(module.weight) < 0.3, -1.0, 1.0)
            module.weight.data = sign * torch.empty_like(module.weight).uniform_(0.5, 1.5)
            module.bias.data.uniform_(-0.3, 0.3)
            module.momentum = None  # average over what follows
    model.train()(torch.randn(16, 1, 28, 28))
    return model.eval()


@pytest.fixture(scope="session")
def images():
    return torch.randn(3, 1, 28, 28, generator=torch.Generator().manual_seed(1))
