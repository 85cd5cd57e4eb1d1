"""LogART: post-training quantization of networks onto logarithmic weight grids."""

from importlib.metadata import PackageNotFoundError, version

from logart.checkpoint import load_packed, save_packed
from logart.config import QuantConfig
from logart.grid import ScaleMethod
from logart.outcome import Report
from logart.pipeline import quantize_model

try:
    __version__ = version("logart")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["QuantConfig", "Report", "ScaleMethod", "__version__", "load_packed", "quantize_model", "save_packed"]
