"""The runs whose every bit is pinned, and what a run comes to: `python tests/pinned_runs.py NETWORKS [LABELS]` prints
the digests of those whose label matches, all by default, as JSON. Under torchrun its ranks share each run.

The digests are compared with `pinned_codes.json`. `SURROUNDINGS` takes the processor's own instructions out of sums,
so that another machine gives the same bits.
"""

from __future__ import annotations

import hashlib
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

# Sums of vector instructions depend on how wide those are; read by torch and MKL when they are loaded.
SURROUNDINGS = {
    "ATEN_CPU_CAPABILITY": "default",
    "MKL_CBWR": "COMPATIBLE",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "OMP_NUM_THREADS": "1",
}
CALIBRATION = {"calib_samples": 32, "search_samples": 16, "search_batch_size": 8, "batch_size": 16, "seed": 3}
GRIDS = ("log_2", "log_sqrt2", "dynamic", "linear_minmax", "linear_mse")
BITS = (2, 3, 4, 8)


def settings() -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(label, built-in network, settings of `QuantConfig`) of every pinned run."""
    learned = {"rounding": "learned", "iters": 12, "lr": 0.03}

    def both(label: str, **values: Any) -> Iterator[tuple[str, str, dict[str, Any]]]:
        for network in ("digits_resnet", "digits_vit"):
            yield f"{network} {label}", network, values

    for n_bits in BITS:
        for grid in GRIDS:
            yield (
                f"digits_resnet nearest {grid} {n_bits}",
                "digits_resnet",
                dict(rounding="nearest", scale_method=grid, n_bits=n_bits),
            )
        yield from both(f"compensated dynamic {n_bits}", rounding="compensated", n_bits=n_bits)
        yield f"digits_resnet learned dynamic {n_bits}", "digits_resnet", dict(learned, n_bits=n_bits)
    for grid in GRIDS:
        if grid != "dynamic":
            yield from both(f"compensated {grid} 3", rounding="compensated", scale_method=grid, n_bits=3)
        yield f"digits_vit learned {grid} 3", "digits_vit", dict(learned, scale_method=grid, n_bits=3)
    for search in ("layer_wise", "block_wise"):
        yield from both(f"nearest {search} 4", rounding="nearest", search_method=search)
        yield (
            f"digits_resnet nearest {search} 3 scales",
            "digits_resnet",
            dict(rounding="nearest", search_method=search, n_bits=3, scale_search="grid"),
        )
    for search in ("grid", "half_step"):
        yield from both(f"compensated scale search {search} 3", rounding="compensated", scale_search=search, n_bits=3)
        yield (
            f"digits_resnet nearest scale search {search} 3",
            "digits_resnet",
            dict(rounding="nearest", scale_search=search, n_bits=3),
        )
    for option in ("asymmetric", "zero_code"):
        for rounding in ("nearest", "compensated"):
            yield from both(f"{rounding} {option} 3", rounding=rounding, n_bits=3, **{option: True})
    yield from both("compensated wide gap 3", rounding="compensated", n_bits=3, wide_gap=True, scale_search="half_step")
    yield "digits_vit learned wide gap 2", "digits_vit", dict(learned, n_bits=2, wide_gap=True)
    yield from both("both 3", rounding="both", n_bits=3, iters=60, lr=0.1, calib_samples=16)
    yield from both("per layer nearest 4", rounding="nearest", channel_wise=False)
    yield from both("per layer compensated 3", rounding="compensated", channel_wise=False, n_bits=3)
    yield from both("8 bits first and last", rounding="nearest", n_bits=3, first_last_bits=8)
    for terms in (2, 3, 4):
        yield from both(f"nearest {terms} terms", rounding="nearest", hardware_terms=terms)
    yield from both("compensated 2 terms", rounding="compensated", hardware_terms=2, n_bits=3)
    yield "digits_resnet learned 2 terms", "digits_resnet", dict(learned, hardware_terms=2)
    yield (
        "digits_vit learned perturbation",
        "digits_vit",
        dict(learned, recon_metric="hessian_perturb", recon_input="mixed", head_kl=True),
    )
    yield "digits_resnet learned mae float", "digits_resnet", dict(learned, recon_metric="mae", recon_input="float")


def digest(quantized: Any) -> str:
    """SHA-256 over the name, codes, levels and bias of every layer, in the order of the network's modules."""
    from logart.quantization.surgery import quantized_layers

    total = hashlib.sha256()
    for name, layer in quantized_layers(quantized).items():
        bias = layer.bias
        for part in (layer.codes, layer.codebook.levels, *([] if bias is None else [bias.detach()])):
            total.update(f"{name} {part.dtype} {list(part.shape)} ".encode())
            total.update(part.contiguous().cpu().numpy().tobytes())
    return total.hexdigest()


def digests(network_name: str, labels: str = "") -> dict[str, str]:
    """The digest of every run on one built-in network, by label; of those that a regular expression matches."""
    import torch

    import logart_cnn.models
    import logart_vit.models
    from logart import QuantConfig, quantize_model
    from logart.networks.calibration import calibration_images
    from logart.networks.data import open_images

    torch.set_num_threads(1)
    load = {"digits_resnet": logart_cnn.models.load_network, "digits_vit": logart_vit.models.load_network}
    network = load[network_name](network_name)
    images = calibration_images(open_images("digits", network.preprocessing, 10), 32, 3, quiet=True)[0]
    result = {}
    for label, name, values in settings():
        assert label not in result
        if name == network_name and re.search(labels, label):
            quantized, _ = quantize_model(
                network.model,
                QuantConfig(**CALIBRATION | values),
                images,
                row_groups=network.row_groups,
            )
            result[label] = digest(quantized)
    return result


if __name__ == "__main__":
    from logart.ranks import joined

    with joined("pinned_runs"):
        found: dict[str, str] = {}
        for network in sys.argv[1].split(","):
            found |= digests(network, *sys.argv[2:])
        sys.stdout.write(json.dumps(found, indent=1) + "\n")
