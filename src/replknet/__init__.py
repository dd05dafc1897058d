"""RepLKNet: large-kernel convolutional networks, and a fast depthwise convolution for any model."""

from importlib.metadata import version

__version__ = version("replknet")
