"""Key layouts of published checkpoints: from their names onto those of the networks built here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

State = dict[str, Tensor]


def renamed(state: State, rules: Sequence[tuple[str, str]]) -> State:
    """Every key after the first rule (pattern, replacement) that matches its start."""
    result = {}
    for key, tensor in state.items():
        for pattern, replacement in rules:
            new, hits = re.subn("^" + pattern, replacement, key)
            if hits:
                break
        else:
            new = key
        result[new] = tensor
    return result


ONE_LINEAR = (r"classifier\.(weight|bias)$", r"classifier.1.\1")  # a classifier without its dropout


def rename_mobilenetv2(state: State) -> State:
    """From the layout with one flat list of layers a block onto torchvision's, which nests them."""
    if "features.2.conv.0.weight" not in state:
        return renamed(state, [ONE_LINEAR])
    block = r"(features\.\d+\.conv)\."
    return renamed(
        state,
        [
            (r"features\.1\.conv\.3\.", "features.1.conv.1."),  # the first block has no expansion
            (r"features\.1\.conv\.4\.", "features.1.conv.2."),
            (block + r"([01])\.", r"\1.0.\2."),
            (block + r"3\.", r"\1.1.0."),
            (block + r"4\.", r"\1.1.1."),
            (block + r"6\.", r"\1.2."),
            (block + r"7\.", r"\1.3."),
            (r"conv\.([01])\.", r"features.18.\1."),
            ONE_LINEAR,
        ],
    )


def rename_regnet(state: State) -> State:
    """From pycls's names onto timm's; timm's own match no rule."""
    block = r"(s\d\.b\d+)\."
    layers = {"a": "conv1", "b": "conv2", "c": "conv3"}
    rules = [(block + "proj", r"\1.downsample.conv"), (block + "bn", r"\1.downsample.bn")]
    for old, new in layers.items():
        rules += [(block + rf"f\.{old}_bn", rf"\1.{new}.bn"), (block + rf"f\.{old}", rf"\1.{new}.conv")]
    return renamed(state, rules)


def rename_mnasnet(state: State) -> State:
    """A classifier without its dropout onto torchvision's."""
    return renamed(state, [ONE_LINEAR])
