"""Train a built-in network on the built-in digits: `python scripts/train_demo.py --help`.

Deterministic: the seed is the only source of randomness and one thread does the arithmetic, so the same versions on
the same kind of machine give the same weights, bit for bit.

The L1 penalty makes the weights heavy-tailed, few large and most near zero, as in many large networks; those of a
network this small would otherwise not be. That is the case a logarithmic grid has to choose its base for: √2-spaced
levels alone end too far above the small weights, 2-spaced levels alone are too coarse for the large ones.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD, Adam, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR, LRScheduler, OneCycleLR

from logart.networks.data import open_images
from logart.networks.digits import DIGITS
from logart.networks.network import DIGITS_PREPROCESSING
from logart.runtime import seed_everything
from logart_cnn.networks import DigitsResNet
from logart_vit.models import DIGITS_VIT_KWARGS, ENTRIES

ROOT = Path(__file__).resolve().parents[1]
MAX_SHIFT = 1  # pixels


@dataclass(frozen=True)
class Recipe:
    """How one network is trained.

    Attributes:
        build: the untrained network.
        optimizer: from the parameters.
        schedule: from the optimizer and the number of steps.
        weights: where the trained weights are shipped.
        epochs, batch_size: of the training split.
        l1: factor of Σ|w| over the weights of convolutions and linear layers, added to the cross-entropy.
    """

    build: Callable[[], nn.Module]
    optimizer: Callable[[Iterable[nn.Parameter]], Optimizer]
    schedule: Callable[[Optimizer, int], LRScheduler]
    weights: Path
    epochs: int = 100
    batch_size: int = 64
    l1: float = 0.0


RECIPES = {
    "digits_resnet": Recipe(
        build=DigitsResNet,
        optimizer=partial(SGD, lr=0.1, momentum=0.9, nesterov=True),
        schedule=CosineAnnealingLR,
        weights=ROOT / "logart_cnn/weights/digits_resnet.safetensors",
        l1=3e-4,
    ),
    "digits_vit": Recipe(
        build=partial(timm.create_model, ENTRIES["digits_vit"].timm, **DIGITS_VIT_KWARGS),
        optimizer=Adam,  # without weight decay, for the penalty already shrinks the weights
        schedule=lambda optimizer, steps: OneCycleLR(optimizer, 4e-3, steps, pct_start=0.1),
        weights=ROOT / "logart_vit" / ENTRIES["digits_vit"].weights,
        epochs=200,
        l1=2e-4,
    ),
}


def training_digits() -> tuple[Tensor, Tensor]:
    """The training split of the digits: images float32 [n, 1, 8, 8] and labels int64 [n]."""
    train = open_images(DIGITS, DIGITS_PREPROCESSING, num_classes=10).train
    images, labels = zip(*(train[index] for index in range(len(train))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def shifted(images: Tensor, background: float) -> Tensor:
    """Every image [B, C, H, W] moved by up to MAX_SHIFT pixels along both axes, each by its own random step."""
    height, width = images.shape[2:]
    windows = F.pad(images, (MAX_SHIFT,) * 4, value=background).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(2 * MAX_SHIFT + 1, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]


def train(recipe: Recipe, images: Tensor, labels: Tensor, seed: int, quiet: bool = False) -> nn.Module:
    """Build and train a network; all randomness comes from the seed.

    Args:
        images: [n, C, H, W], preprocessed; the smallest value is the background.
        labels: [n].

    Returns:
        The network in eval mode.
    """
    seed_everything(seed)
    model = recipe.build().train()
    optimizer = recipe.optimizer(model.parameters())
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Conv2d | nn.Linear)]
    batches = len(images) // recipe.batch_size  # of full size: batch norm dislikes small ones
    schedule = recipe.schedule(optimizer, recipe.epochs * batches)
    background = float(images.min())
    for epoch in range(recipe.epochs):
        total = 0.0
        for chosen in torch.randperm(len(images)).split(recipe.batch_size)[:batches]:
            loss = F.cross_entropy(model(shifted(images[chosen], background)), labels[chosen])
            total += float(loss.detach())
            optimizer.zero_grad()
            (loss + recipe.l1 * sum(weight.abs().sum() for weight in weights)).backward()
            optimizer.step()
            schedule.step()
        if not quiet:
            print(f"epoch {epoch + 1}/{recipe.epochs}: cross-entropy {total / batches:.4f}", flush=True)
    return model.eval()


def save(model: nn.Module, path: Path) -> None:
    """Write the parameters and running statistics; batch norm's step counters serve only training."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: value for name, value in model.state_dict().items() if value.is_floating_point()}, path)


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    parser = argparse.ArgumentParser(description="Train a built-in network on the training split of the digits.")
    parser.add_argument("--network", choices=sorted(RECIPES), default="digits_resnet")
    parser.add_argument("--out", type=Path, help="the .safetensors file to write (default: the shipped weights)")
    parser.add_argument("--epochs", type=int, help="passes over the training split (default: the network's recipe)")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    recipe = RECIPES[args.network]
    if args.epochs is not None:
        recipe = replace(recipe, epochs=args.epochs)
    torch.set_num_threads(1)  # the sums of more threads come in another order
    torch.use_deterministic_algorithms(True)
    model = train(recipe, *training_digits(), args.seed)
    save(model, args.out or recipe.weights)
    print(f"wrote {args.out or recipe.weights}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
