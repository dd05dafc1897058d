"""Networks written to files for other engines, and classifiers run from such files."""

from replknet.export.classifier import load_exported
from replknet.export.formats import FORMATS
from replknet.export.pipeline import ExportConfig, ExportReport, export, export_checkpoint
from replknet.export.verification import VerificationError

__all__ = [
    "FORMATS",
    "ExportConfig",
    "ExportReport",
    "VerificationError",
    "export",
    "export_checkpoint",
    "load_exported",
]
