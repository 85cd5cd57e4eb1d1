"""Quantizes on the CPU and on another device and prints as JSON how both compare.

    python other_device.py DEVICE [NETWORK, CONFIGURATION ...]

DEVICE is `cuda`, or `away`, the pretended one. Without others, all networks and configurations are compared.
"""

from __future__ import annotations

import json
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pretended_device
import torch
from networks import SmallResNet, small_vit
from torch import Tensor, nn

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.quantization.cache import Cache, CacheLocation
from logart.quantization.surgery import quantized_layers

SMALL: dict[str, Any] = {
    "n_bits": 2, "calib_samples": 8, "search_samples": 8, "batch_size": 4, "search_batch_size": 4, "iters": 4,
}  # fmt: skip
CONFIGS: dict[str, dict[str, Any]] = {
    "nearest by blocks": {"rounding": "nearest", "search_method": "block_wise", "asymmetric": True},
    "compensated": {
        "rounding": "compensated", "scale_search": "half_step", "zero_code": True, "wide_gap": True,
        "hardware_terms": 2,
    },
    "learned": {"rounding": "learned", "search_method": "layer_wise", "scale_search": "half_step"},
    "mixed inputs, Hessian": {"rounding": "learned", "recon_input": "mixed", "recon_metric": "hessian_perturb"},
    "both": {"rounding": "both", "recon_input": "float", "head_kl": True},
    "linear": {"rounding": "learned", "scale_method": "linear_mse", "channel_wise": False},
}


def networks() -> dict[str, tuple[nn.Module, Tensor]]:
    """By name: a network with strided and 1×1 convolutions and norms, a transformer; and images for each."""
    torch.manual_seed(0)
    vit, images = small_vit()
    return {"cnn": (SmallResNet(2).eval(), torch.randn(8, 3, 4, 4)), "vit": (vit, images)}


def compare(model: nn.Module, images: Tensor, settings: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """One configuration on one network; see the keys."""
    config = QuantConfig(**{**SMALL, **settings})
    here, _ = quantize_model(model, config, images)
    there, report = quantize_model(model, config, images, device=device)
    kept, _ = quantize_model(model, config, images, device=device, cache=Cache(device, CacheLocation.CPU))
    logits = there(images.to(device))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "packed.safetensors"
        save_packed(there, path)
        reloaded = [
            load_packed(path, model=model, dequantize=how, device=device)(images.to(device))
            for how in ("once", "on-the-fly")
        ]
    codes = [[layer.codes.cpu() for layer in quantized_layers(net).values()] for net in (here, there, kept)]  # type: ignore[union-attr]
    # what a state says of codebooks is text, which stays on the CPU
    state = {name: tensor for name, tensor in there.state_dict().items() if not name.endswith("_extra_state")}
    return {
        "layers": len(report.layers),
        "elsewhere": [name for name, t in state.items() if t.device.type != device.type],
        "equal_codes": min(float((a == b).float().mean()) for a, b in zip(codes[0], codes[1], strict=True)),
        "equal_when_kept_on_the_cpu": all(map(torch.equal, codes[1], codes[2])),
        "logits_differ_from_the_cpu_by": float((logits.cpu() - here(images)).abs().max()),
        "reloaded_logits_are_equal": [bool(torch.equal(again.cpu(), logits.cpu())) for again in reloaded],
    }


def mixing_is_refused(device: torch.device) -> list[bool]:
    """Whether the device does what this looks for: computing, and objecting to tensors of the CPU."""
    there = torch.arange(6.0).reshape(2, 3).to(device)
    refused = []
    for wrong in (lambda: there + torch.ones(3), lambda: there.numpy(), lambda: torch.stack([there, torch.ones(2, 3)])):
        try:
            wrong()
            refused.append(False)
        except (RuntimeError, TypeError):
            refused.append(True)
    return [*refused, (there * 2).sum().item() == 30.0, there.device.type == device.type]


def main() -> None:
    name, *chosen = sys.argv[1:]
    pretended = name == pretended_device.NAME
    device = pretended_device.install() if pretended else torch.device(name)
    with pretended_device.Pretended() if pretended else nullcontext():
        found = {
            title: compare(*pair, settings, device)
            for network, pair in networks().items()
            for configuration, settings in CONFIGS.items()
            if (title := f"{network}, {configuration}") in chosen or not chosen
        }
        print(json.dumps({"refused": mixing_is_refused(device), "found": found}))


if __name__ == "__main__":
    main()
