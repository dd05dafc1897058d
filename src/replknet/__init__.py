"""RepLKNet: large-kernel convolutional networks, and a fast depthwise convolution for any model."""

from importlib.metadata import version

from replknet.deploy import fuse, optimization_report, optimize, reparameterize
from replknet.models import create_model, list_models, load_checkpoint
from replknet.nn import accelerate, acceleration_report

__version__ = version("replknet")

__all__ = [
    "accelerate",
    "acceleration_report",
    "create_model",
    "fuse",
    "list_models",
    "load_checkpoint",
    "optimization_report",
    "optimize",
    "reparameterize",
]
