"""How much the network's output minds each layer at each bit width, each layer quantized alone.

Each layer is quantized at every width as the run would, from the second moments of its inputs in the float network, on
one half of the images. On the other half, with d the change of its output, the KL divergence between the network's
decisions before and after is ½‖Lᵀ J d‖² to second order: J takes the layer's output to the logits, and LLᵀ is the
Hessian of the divergence by the logits, diag(p) - ppᵀ. ‖LᵀJd‖² is the mean over random sign vectors v of ⟨JᵀLv, d⟩²
(Hutchinson), so a few backward passes serve all layers and all widths at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
from logart.quantization.dbs import unfold
from logart.quantization.quantized_weight import QuantizedWeight

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
    weights = {name: reference.get_parameter(f"{name}.weight").numel() for name in layers}
    budget = Budget(weights, config.bits_budget, config.size_budget)
    budget.check({name: WIDTHS for name in free} | {name: [bits] for name, bits in named.items()})
    effects = layer_effects(reference, free, images, config, row_groups, device)
    effects |= {name: {bits: 0.0} for name, bits in named.items()}
    bits = allocate_bits(effects, budget)
    return {name: bits[name] for name in layers}


def layer_effects(
    reference: nn.Module,
    layers: Sequence[str],
    images: Tensor,
    config: QuantConfig,
    row_groups: Mapping[str, int],
    device: torch.device,
) -> dict[str, dict[int, float]]:
    """The effect of each layer at each of `WIDTHS`: KL divergence in nats, a mean over images, to second order.

    Args:
        reference: the float network; it is not changed.
        layers: their names.
        images: [n, C, H, W], of which the first `SENSITIVITY_IMAGES` count.
        row_groups: as for `quantize_model`.
        device: where the network is.
    """
    images = images[:SENSITIVITY_IMAGES]
    middle = (len(images) // config.views + 1) // 2 * config.views  # mirror images stay beside their own
    seen, unseen = images[:middle], images[middle:]
    quantized: dict[str, Quantized] = {name: {} for name in layers}
    for width in WIDTHS:
        network = clone_sharing(reference)
        surgery.replace_layers(network, dict.fromkeys(layers, width), config.channel_wise, row_groups)
        for name, layer in surgery.quantized_layers(network).items():
            quantized[name][width] = layer
    _quantize(reference, quantized, seen.to(device), config)
    return _effects(reference, quantized, unseen, device, config.seed)


@torch.no_grad()
def _quantize(reference: nn.Module, quantized: Mapping[str, Quantized], images: Tensor, config: QuantConfig) -> None:
    """Give every layer its codes at every width, in one forward of the float network."""

    def quantize(name: str, x: Tensor, output: Tensor) -> None:
        widths = quantized[name]
        usual = widths[config.n_bits]
        estimate = None
        if config.method.calibrates:
            estimate = estimate_layer(name, usual, partial(_moments, usual, x), len(x), config)
        for width, layer in widths.items():
            options = config.grid_options
            if width > _MOST_SEARCHED and options.scale_search is ScaleSearch.GRID:
                options = replace(options, scale_search=ScaleSearch.NONE)
            if estimate is None:
                layer.set_codebook(choose_codebook(layer.rows, config.grid, width, options=options))
            else:
                round_layer(layer, estimate, config.grid, options)

    with _watched(reference, quantized, quantize):
        reference(images.clone())


def _moments(
    layer: QuantizedWeight, x: Tensor, images: range | None = None, shift: Tensor | None = None
) -> OutputMoments:
    """Of a layer's inputs, with no error made before it; other arguments as `dbs.layer_moments`."""
    groups = getattr(layer.module, "groups", 1)
    moments = OutputMoments.zeros(groups, layer.shape[0], layer.shape[1:].numel(), x.device)
    moments.shift = shift
    for part in (x if images is None else x[images.start : images.stop]).split(_BATCH):
        patches = unfold(layer.module, part)
        if moments.shift is None:
            moments.shift = patches.mean(1, dtype=torch.float64).to(patches)
        moments.add(patches, patches.new_zeros(groups, patches.shape[1], layer.shape[0] // groups))
    return moments


def _effects(
    reference: nn.Module, quantized: Mapping[str, Quantized], images: Tensor, device: torch.device, seed: int
) -> dict[str, dict[int, float]]:
    signs = torch.Generator().manual_seed(seed)
    effects = {name: dict.fromkeys(widths, 0.0) for name, widths in quantized.items()}
    passed: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, x: Tensor, output: Tensor) -> Tensor:
        passed[name] = x.detach().clone(), output  # clones: an operation in place may follow
        return output.clone()

    for batch in images.split(_BATCH):
        with _watched(reference, quantized, keep), torch.enable_grad():
            logits = reference(batch.to(device, copy=True).requires_grad_().clone())
        if not logits.isfinite().all():
            raise NetworkError("the logits of a calibration image are not finite")
        root = logits.detach().double().softmax(-1).sqrt()
        outputs = [output for _, output in passed.values()]
        pulls = []
        for _ in range(PROBES):
            v = torch.randint(0, 2, logits.shape, generator=signs).mul_(2).sub_(1).to(root)
            along = root * v - root.square() * (root * v).sum(-1, keepdim=True)
            pulls.append(torch.autograd.grad(logits, outputs, along.to(logits), retain_graph=True))
        with torch.no_grad():
            for (name, (x, output)), *vjps in zip(passed.items(), *pulls, strict=True):
                for width, layer in quantized[name].items():
                    change = (layer.module(x) - output).flatten(1)
                    along_probes = torch.stack([(vjp.flatten(1) * change).sum(1) for vjp in vjps])
                    effects[name][width] += float(along_probes.double().square().sum()) / (2 * PROBES * len(images))
    return effects


@contextmanager
def _watched(
    model: nn.Module, names: Mapping[str, object], look: Callable[[str, Tensor, Tensor], Tensor | None]
) -> Iterator[None]:
    """While the context lasts, `look` is called with each layer's name, input and output; what it gives replaces the
    output.
    """
    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: look(name, args[0], output))
        for name in names
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
