"""How much the network's output minds each layer at each bit width, each layer quantized alone.

Each layer is quantized at every width as the run would, from the second moments of its inputs in the float network, on
one half of the images. On the other half, with d the change of its output, the KL divergence between the network's
decisions before and after is ½‖Lᵀ J d‖² to second order: J takes the layer's output to the logits, and LLᵀ is the
Hessian of the divergence by the logits, diag(p) - ppᵀ. ‖LᵀJd‖² is the mean over random sign vectors v of ⟨JᵀLv, d⟩²
(Hutchinson), so a few backward passes serve all layers and all widths at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.grids.grid import MAX_BITS, MIN_BITS, ScaleSearch
from logart.grids.measures import OutputMoments
from logart.grids.search import choose_codebook
from logart.quantization import surgery
from logart.quantization.budget import Budget, allocate_bits
from logart.quantization.clone import clone_sharing
from logart.quantization.compensate import estimate_layer, round_layer
from logart.quantization.config import QuantConfig
from logart.quantization.layers import get_weight
from logart.quantization.layout import WeightUse
from logart.quantization.operations import Use
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.watching import Watch

WIDTHS = range(MIN_BITS, MAX_BITS + 1)
SENSITIVITY_IMAGES = 128
PROBES = 8  # sign vectors an image
_BATCH = 8  # images whose graph is held at once
_MOST_SEARCHED = 5  # bits; beyond, scale search tries thousands of candidates, and gains nothing that is seen here

Quantized = dict[int, QuantizedWeight]  # one layer at each width


def budgeted_bits(
    reference: nn.Module,
    layers: Sequence[str],
    named: Mapping[str, int],
    images: Tensor,
    config: QuantConfig,
    row_groups: Mapping[str, int],
    uses: Mapping[str, WeightUse],
    device: torch.device,
) -> dict[str, int]:
    """The width of each layer within the budget of `config`; other arguments as `layer_effects`.

    Args:
        layers: all that are quantized.
        named: those of them whose width is given.

    Raises:
        SettingError: no widths keep to the budget.
    """
    free = [name for name in layers if name not in named]
    weights = {name: get_weight(reference, name).numel() for name in layers}
    budget = Budget(weights, config.bits_budget, config.size_budget)
    budget.check({name: WIDTHS for name in free} | {name: [bits] for name, bits in named.items()})
    effects = layer_effects(reference, free, images, config, row_groups, uses, device)
    effects |= {name: {bits: 0.0} for name, bits in named.items()}
    bits = allocate_bits(effects, budget)
    return {name: bits[name] for name in layers}


def layer_effects(
    reference: nn.Module,
    layers: Sequence[str],
    images: Tensor,
    config: QuantConfig,
    row_groups: Mapping[str, int],
    uses: Mapping[str, WeightUse],
    device: torch.device,
) -> dict[str, dict[int, float]]:
    """The effect of each layer at each of `WIDTHS`: KL divergence in nats, a mean over images, to second order.

    Args:
        reference: the float network; it is not changed.
        layers: their names.
        images: [n, C, H, W], of which the first `SENSITIVITY_IMAGES` count.
        row_groups: as for `quantize_model`.
        uses: how weights are used; of one that is used several times the first counts for its codes.
        device: where the network is.
    """
    images = images[:SENSITIVITY_IMAGES]
    middle = (len(images) // config.views + 1) // 2 * config.views  # mirror images stay beside their own
    seen, unseen = images[:middle], images[middle:]
    quantized: dict[str, Quantized] = {name: {} for name in layers}
    for width in WIDTHS:
        network = clone_sharing(reference)
        surgery.replace_layers(network, dict.fromkeys(layers, width), config.channel_wise, row_groups, uses)
        for name, layer in surgery.quantized_layers(network).items():
            quantized[name][width] = layer
    _quantize(reference, quantized, seen.to(device), config)
    return _effects(reference, quantized, unseen, device, config.seed)


@torch.no_grad()
def _quantize(reference: nn.Module, quantized: Mapping[str, Quantized], images: Tensor, config: QuantConfig) -> None:
    """Give every layer its codes at every width, in one forward of the float network."""

    def quantize(name: str, use: Use) -> None:
        if name in done:
            return
        done.add(name)
        widths = quantized[name]
        usual = widths[config.n_bits]
        estimate = None
        if config.method.calibrates:
            estimate = estimate_layer(name, usual, partial(_moments, use), len(use.x), config)
        for width, layer in widths.items():
            options = config.grid_options
            if width > _MOST_SEARCHED:
                grid_scales = options.scale_search is ScaleSearch.GRID
                scales = ScaleSearch.NONE if grid_scales else options.scale_search
                options = replace(options, scale_search=scales, wide_gap=False)
            if estimate is None:
                layer.set_codebook(choose_codebook(layer.rows, config.grid, width, options=options))
            else:
                round_layer(layer, estimate, config.grid, options)

    done: set[str] = set()
    with Watch(_weights(reference, quantized), quantize):
        reference(images.clone())


def _weights(reference: nn.Module, names: Iterable[str]) -> dict[str, Tensor]:
    return {name: get_weight(reference, name) for name in names}


def _moments(use: Use, images: range | None = None, shift: Tensor | None = None) -> OutputMoments:
    """Of what a weight is multiplied with, with no error made before it; other arguments as `dbs.layer_moments`."""
    moments = OutputMoments.zeros(use.groups, use.channels, use.elements, use.x.device)
    moments.shift = shift
    for part in (use.x if images is None else use.x[images.start : images.stop]).split(_BATCH):
        patches = use.rows(part)
        if moments.shift is None:
            moments.shift = patches.mean(1, dtype=torch.float64).to(patches)
        moments.add(patches, patches.new_zeros(use.groups, patches.shape[1], use.channels // use.groups))
    return moments


def _effects(
    reference: nn.Module, quantized: Mapping[str, Quantized], images: Tensor, device: torch.device, seed: int
) -> dict[str, dict[int, float]]:
    signs = torch.Generator().manual_seed(seed)
    effects = {name: dict.fromkeys(widths, 0.0) for name, widths in quantized.items()}
    passed: list[tuple[str, Use]] = []

    def keep(name: str, use: Use) -> Tensor:
        use.x = use.x.detach().clone()  # clones: an operation in place may follow
        passed.append((name, use))
        return use.y.clone()

    weights = _weights(reference, quantized)
    for batch in images.split(_BATCH):
        passed.clear()
        with Watch(weights, keep), torch.enable_grad():
            logits = reference(batch.to(device, copy=True).requires_grad_().clone())
        if not logits.isfinite().all():
            raise NetworkError("the logits of a calibration image are not finite")
        root = logits.detach().double().softmax(-1).sqrt()
        outputs = [use.y for _, use in passed]
        pulls = []
        for _ in range(PROBES):
            v = torch.randint(0, 2, logits.shape, generator=signs).mul_(2).sub_(1).to(root)
            along = root * v - root.square() * (root * v).sum(-1, keepdim=True)
            pulls.append(torch.autograd.grad(logits, outputs, along.to(logits), retain_graph=True))
        with torch.no_grad():
            along_probes: dict[tuple[str, int], Tensor] = {}
            for (name, use), *vjps in zip(passed, *pulls, strict=True):
                for width, layer in quantized[name].items():
                    change = _change(use, layer)
                    dots = [(use.positions_last(vjp) * change).flatten(1).sum(1) for vjp in vjps]
                    before = along_probes.get((name, width), torch.zeros(()))
                    along_probes[name, width] = torch.stack(dots) + before.to(change)
            for (name, width), dots_of_all in along_probes.items():
                effects[name][width] += float(dots_of_all.double().square().sum()) / (2 * PROBES * len(images))
    return effects


def _change(use: Use, layer: QuantizedWeight) -> Tensor:
    """What the output of a weight's operation changes by once it is quantized, [B, C, positions]."""
    change = use.apply(use.x, (layer.current_rows - layer.rows).to(use.x.dtype))
    if layer.bias is None:
        return change
    return change + (layer.bias if use.bias is None else layer.bias - use.bias)[:, None]
