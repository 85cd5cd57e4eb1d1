"""LogART: post-training quantization of networks onto logarithmic weight grids."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from logart.packed.checkpoint import load_packed, save_packed
    from logart.quantization.config import QuantConfig
    from logart.quantization.inputs import Inputs
    from logart.quantization.layer_report import Report
    from logart.quantization.pipeline import quantize_model
    from logart.quantization.surgery import to_float

__all__ = ["Inputs", "QuantConfig", "Report", "__version__", "load_packed", "quantize_model", "save_packed", "to_float"]

_HOMES = {
    "Inputs": "quantization.inputs",
    "QuantConfig": "quantization.config",
    "Report": "quantization.layer_report",
    "load_packed": "packed.checkpoint",
    "quantize_model": "quantization.pipeline",
    "save_packed": "packed.checkpoint",
    "to_float": "quantization.surgery",
}


def __getattr__(name: str) -> Any:
    """Load a public name when it is first asked for: torch takes seconds, and appending a row needs none."""
    if name == "__version__":
        return _version()
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)


def _version() -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("logart")
    except PackageNotFoundError:  # run from a source tree that was never installed
        return "0+unknown"


def __dir__() -> list[str]:
    return __all__
