"""Networks that torchvision and timm lack as they are: for CIFAR, for digits, and MNASNet of any width."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models import MNASNet


def _conv3x3(in_channels: int, out_channels: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, bias=False)


class CifarBlock(nn.Module):
    """Two 3×3 convolutions and a shortcut without parameters (He et al. 2016, option A).

    Where the resolution halves, the shortcut takes every second pixel; new channels are zeros on both sides.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        before = self.new_channels // 2
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.new_channels - before))
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + shortcut)


class CifarResNet(nn.Module):
    """The CIFAR ResNets of He et al. 2016: three stages of 16, 32 and 64 channels.

    Args:
        depth: Layers with weights: 20, 32, 44, 56, ...; 6 a block and 2 besides.
        num_classes: Outputs.
    """

    def __init__(self, depth: int, num_classes: int = 10) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1 = _conv3x3(3, 16)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = self._stage(16, 16, blocks)
        self.layer2 = self._stage(16, 32, blocks)
        self.layer3 = self._stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)

    @staticmethod
    def _stage(in_channels: int, out_channels: int, blocks: int) -> nn.Sequential:
        first = CifarBlock(in_channels, out_channels, stride=out_channels // in_channels)
        return nn.Sequential(first, *(CifarBlock(out_channels, out_channels, 1) for _ in range(blocks - 1)))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


class DigitsBlock(nn.Module):
    """Two 3×3 convolutions; where the channels change, the resolution halves, with a 1×1 shortcut."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__()
        stride = 1 if in_channels == out_channels else 2
        self.conv1 = _conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = _conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride == 2:
            projection = nn.Conv2d(in_channels, out_channels, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class DigitsResNet(nn.Module):
    """A residual network for grey 8×8 digits.

    Args:
        widths: The channels of each block's output; the stem has those of the first.
        num_classes: Outputs.
    """

    def __init__(self, widths: Sequence[int] = (8, 8, 8, 16, 16), num_classes: int = 10) -> None:
        super().__init__()
        self.conv1 = _conv3x3(1, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.blocks = nn.Sequential(*(DigitsBlock(a, b) for a, b in pairwise((widths[0], *widths))))
        self.linear = nn.Linear(widths[-1], num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.linear(x.mean((2, 3)))


def build_mnasnet(state: Mapping[str, Tensor], num_classes: int) -> nn.Module:
    """torchvision's MNASNet, as wide as a checkpoint: BRECQ's has twice the channels of mnasnet1_0.

    torchvision's first version scaled all but the stem; its checkpoints are recognised by the stem's shape.

    Args:
        state: The checkpoint by torchvision's keys; without its layers, twice as wide.
        num_classes: Outputs.
    """
    last = state.get("layers.14.weight")
    alpha = last.shape[1] / 320 if last is not None and last.ndim == 4 else 2.0
    model = MNASNet(alpha, num_classes)
    stem = state.get("layers.0.weight")
    if stem is not None and len(stem) == 32 and alpha != 1:
        narrow = MNASNet(1.0).layers
        for index in range(8):
            model.layers[index] = narrow[index]
        first = model.layers[8][0]
        model.layers[8][0] = type(first)(16, first.layers[6].out_channels, 3, 2, 3)
    return model
