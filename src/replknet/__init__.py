"""RepLKNet: large-kernel convolutional networks, and a fast depthwise convolution for any model."""

from importlib.metadata import version

from replknet.models import create_model, list_models, load_checkpoint

__version__ = version("replknet")

__all__ = ["create_model", "list_models", "load_checkpoint"]
