"""The results columns that a run fills, but for its accuracies."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from logart.grids.grid import Spacing
from logart.quantization.config import QuantConfig, ReconInput, ReconMetric
from logart.quantization.layer_report import Report
from logart.runs.results_schema import Cell
from logart.runtime import peak_memory_mb


def config_columns(config: QuantConfig) -> dict[str, Cell]:
    """The results columns that the settings decide; settings that did not act stay empty."""
    log = config.scale_method.spacing is Spacing.LOG
    row: dict[str, Cell] = {
        "bits": config.n_bits,
        "first_last_bits": config.first_last_bits or "same",
        "channel_wise": str(config.channel_wise),
        "scale_method": config.scale_method.value,
        "scale_search": config.scale_search.value if log else "none",
        "asymmetric": str(config.asymmetric and log),
        "zero_code": str(config.zero_code and log),
        "hardware_approx": str(bool(config.hardware_terms)),
        "hardware_approx_terms": config.hardware_terms or None,
        "rounding": config.acting_rounding.value,
        "iters_w": config.iters * config.learns,
        "seed": config.seed,
    }
    if config.searches and not config.compensates:
        row["search_method"] = config.search_method.value
    if config.searches_data:
        row |= {"search_samples": config.search_samples, "search_batch_size": config.search_batch_size}
    if config.learns or config.compensates:
        row |= {"calib_samples": config.calib_samples, "batch_size": config.batch_size}
    if config.learns:
        row |= {
            "lr": config.lr,
            "rrweight": config.rrweight,
            "b_start": config.b_start,
            "b_end": config.b_end,
            "warmup": config.warmup,
            "recon_input": config.recon_input.value,
            "recon_metric": config.recon_metric.value + "+kl" * config.head_kl,
        }
    if config.learns and config.recon_input is ReconInput.MIXED:
        row["drop_prob"] = config.drop_prob
    if config.learns and config.recon_metric is ReconMetric.HESSIAN_PERTURB:
        row["temperature"] = config.temperature
    return row


def settings_columns(columns: Mapping[str, Cell], config: QuantConfig, test_with_terms: int) -> dict[str, Cell]:
    """All results columns that are known before the run, and decide it: those of `results_schema.SETTINGS`."""
    row = dict(columns) | config_columns(config)
    if test_with_terms:
        row["hardware_approx_terms"] = test_with_terms
    return row


def cost_columns(report: Report, total_seconds: float, device: torch.device) -> dict[str, Cell]:
    return {
        "search_seconds": round(report.search_seconds, 3),
        "reconstruction_seconds": round(report.reconstruction_seconds, 3),
        "total_seconds": round(total_seconds, 3),
        "peak_memory_mb": round(peak_memory_mb(device)),
        "device": device_name(device),
    }


def device_name(device: torch.device) -> str:
    """The device as the results file names it: `cpu`, or the GPU's product name."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
