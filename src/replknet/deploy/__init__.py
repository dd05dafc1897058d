"""Trained networks made ready for use: each step is a function from a model to a new model."""

from replknet.deploy.equivalence import Equivalence, compare
from replknet.deploy.fuse import fuse, unfused
from replknet.deploy.optimize import OptimizationReport, optimization_report, optimize
from replknet.deploy.plain import plain
from replknet.deploy.reparameterize import reparameterize

__all__ = [
    "Equivalence",
    "OptimizationReport",
    "compare",
    "fuse",
    "optimization_report",
    "optimize",
    "plain",
    "reparameterize",
    "unfused",
]
