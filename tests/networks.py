"""Tiny networks and images for the tests; everything is made from a seed and takes no time."""

from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from logart.quantization.cache import Captured
from logart.quantization.capture import Call
from logart.quantization.clone import clone_sharing
from logart.quantization.layers import quantize_parameter
from logart.quantization.layout import WeightUse
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.surgery import quantized_layers


class Graph(nn.Module):
    """Named modules and a forward given as a function of them."""

    def __init__(self, forward: Callable[..., Tensor], **modules: nn.Module) -> None:
        super().__init__()
        self.run = forward
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


class ResidualBlock(nn.Module):
    """Two 3×3 convolutions with norms and a shortcut, its ReLUs in place as torchvision's are."""

    def __init__(self, inputs: int, channels: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.relu = nn.ReLU(inplace=True)
        plain = stride == 1 and inputs == channels
        self.down = nn.Identity() if plain else nn.Conv2d(inputs, channels, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))
        y += self.down(x)
        return self.relu(y)  # type: ignore[no-any-return]


class SmallResNet(nn.Module):
    """A stem, two residual blocks and a head: 7 layers to quantize, 5 norms to fold."""

    def __init__(self, channels: int = 6, classes: int = 4) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, channels, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)
        self.blocks = nn.Sequential(ResidualBlock(channels, channels), ResidualBlock(channels, 2 * channels, 2))
        self.head = nn.Linear(2 * channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn(self.stem(x))))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


def small_vit(seed: int = 0, n_images: int = 8) -> tuple[nn.Module, Tensor]:
    """timm's own transformer, two blocks on four patches and a class token, and images [n, 3, 8, 8] for it."""
    torch.manual_seed(seed)
    model = VisionTransformer(img_size=8, patch_size=4, embed_dim=12, depth=2, num_heads=2, mlp_ratio=2, num_classes=5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.4)  # timm's start leaves norms and biases at 1 and 0, and weights tiny
    return model.eval().requires_grad_(False), smooth_images(n_images, 3, 8, seed).float()


def smooth_images(n: int, channels: int, size: int, seed: int = 0) -> Tensor:
    """[n, channels, size, size] float64 blurred noise, about unit variance: neighbouring pixels go together."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(n, channels, size + 8, size + 8, generator=generator, dtype=torch.float64)
    box = torch.ones(channels, 1, 5, 5, dtype=torch.float64) / 5
    return F.conv2d(F.conv2d(noise, box, groups=channels), box, groups=channels) / 3


def settle(model: nn.Module, images: Tensor, seed: int = 0) -> nn.Module:
    """The model in float64 and eval mode, its norms with the images' statistics and an affine map far from identity."""
    generator = torch.Generator().manual_seed(seed)
    norms = [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.momentum = 1.0
        if norm.affine:
            nn.init.uniform_(norm.weight, 0.5, 1.5, generator=generator)
            nn.init.normal_(norm.bias, 0.0, 0.3, generator=generator)
    with torch.no_grad():
        model.double().train()(images.double())
    return model.eval()


def small_resnet(seed: int = 0, n_images: int = 16) -> tuple[nn.Module, Tensor]:
    """A settled float32 SmallResNet in eval mode, and images [n, 3, 8, 8] for it."""
    torch.manual_seed(seed)
    images = smooth_images(n_images, 3, 8, seed)
    return settle(SmallResNet(), images, seed).float(), images.float()


def quantized_twin(layer: nn.Module, n_bits: int, n_codebooks: int | None = None) -> QuantizedWeight:
    """The weight of a copy of a layer, shared with it and still float; a codebook per channel by default."""
    twin = clone_sharing(layer)
    channels = WeightUse.by_module(twin, "weight").layout.shape[0]
    return quantize_parameter(twin, "weight", n_bits, n_codebooks or channels)


def calls(x: Tensor) -> Captured:
    """A block's calls with one tensor [n, ...]."""
    return Captured([Call((x,), {})])


def hooks_of(model: nn.Module) -> int:
    """How many forward and backward hooks hang in the model."""
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return sum(len(getattr(module, kind)) for module in model.modules() for kind in kinds)


def fingerprint(model: nn.Module) -> list[tuple[list[int], list[float]]]:
    """Codes and levels of every layer."""
    found = []
    for layer in quantized_layers(model).values():
        assert layer.codes is not None and layer.levels is not None
        found.append((layer.codes.flatten().tolist(), layer.levels.flatten().tolist()))
    return found
