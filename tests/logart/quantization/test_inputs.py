"""Networks of several inputs or keyword inputs: quantized as the network that is given the same in one tensor."""

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from networks import fingerprint, small_resnet
from torch import Tensor, nn

from logart import Inputs, QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import NetworkError

MODEL, IMAGES = small_resnet(n_images=8)
OTHERS = torch.randn(IMAGES.shape, generator=torch.Generator().manual_seed(5))
SETTINGS: dict[str, dict[str, Any]] = {
    "compensated": {"rounding": "compensated"},
    "learned": {"rounding": "learned", "iters": 3, "recon_input": "mixed"},
    "perturbed": {"rounding": "learned", "iters": 3, "recon_metric": "hessian_perturb"},
    "nearest": {"rounding": "nearest", "search_method": "layer_wise"},
    "a budget": {"rounding": "compensated", "bits_budget": 4.5},
}


class Takes(nn.Module):
    """A network behind a function of its inputs that gives one image."""

    def __init__(self, join: Callable[..., Tensor]) -> None:
        super().__init__()
        self.network, self.join = copy.deepcopy(MODEL), join

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return self.network(self.join(*args, **kwargs))  # type: ignore[no-any-return]


def pair(x: Tensor, y: Tensor) -> Tensor:
    return x + y


def keyword(x: Tensor, *, other: Tensor, factor: float = 0.0) -> Tensor:
    return x + factor * other


def tree(inputs: dict[str, Any]) -> Tensor:
    return inputs["x"] + inputs["rest"][0]  # type: ignore[no-any-return]


def chosen(x: Tensor, which: Tensor) -> Tensor:
    return x * (1 + which)[:, None, None, None]


WHICH = torch.tensor([0, 1] * 4)
NETWORKS: dict[str, tuple[Callable[..., Tensor], Inputs, Tensor]] = {
    "two tensors": (pair, Inputs(IMAGES, OTHERS), IMAGES + OTHERS),
    "a keyword and a number": (keyword, Inputs(IMAGES, other=OTHERS, factor=2.0), IMAGES + 2.0 * OTHERS),
    "a tree": (tree, Inputs({"x": IMAGES, "rest": [OTHERS]}), IMAGES + OTHERS),
    "integers beside": (chosen, Inputs(IMAGES, which=WHICH), IMAGES * (1 + WHICH)[:, None, None, None]),
}


def quantized(model: nn.Module, data: Any, settings: str, **arguments: Any) -> nn.Module:
    config = QuantConfig(
        **{"n_bits": 3, "calib_samples": 8, "search_samples": 8, "batch_size": 4, **SETTINGS[settings]}
    )
    return quantize_model(model, config, data, **arguments)[0]


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("name", NETWORKS)
def test_codes_are_those_of_the_network_that_takes_one_tensor(name: str, settings: str) -> None:
    join, inputs, joined = NETWORKS[name]
    network = quantized(Takes(join), inputs, settings)
    expected = quantized(Takes(lambda x: x), joined, settings)
    assert fingerprint(network) == fingerprint(expected)
    assert type(network) is Takes
    assert torch.equal(network(*inputs.args, **inputs.kwargs), expected(joined))


def batches(kind: str) -> Iterator[Any]:
    for x, y in zip(IMAGES.split(4), OTHERS.split(4), strict=True):
        yield {
            "inputs": Inputs(x, y),
            "dicts": {"x": x, "y": y, "label": torch.zeros(4)},
            "arrays in dicts": {"x": np.asarray(x), "y": np.asarray(y)},
            "prepared": (torch.zeros(4), (x, y)),
        }[kind]


@pytest.mark.parametrize(
    ("kind", "arguments"),
    [
        ("inputs", {}),
        ("dicts", {"input_key": ["x", "y"]}),
        ("arrays in dicts", {"input_key": ("x", "y")}),
        ("prepared", {"prepare": lambda batch: Inputs(*batch[1])}),
    ],
)
def test_batches_as_loaders_give_them(kind: str, arguments: dict[str, Any]) -> None:
    network = quantized(Takes(pair), batches(kind), "compensated", **arguments)
    assert fingerprint(network) == fingerprint(quantized(Takes(pair), Inputs(IMAGES, OTHERS), "compensated"))


@pytest.mark.parametrize(
    ("data", "arguments", "message"),
    [
        (lambda: Inputs(IMAGES, OTHERS[:3]), {}, r"\[8, 3, 8, 8\] and \[3, 3, 8, 8\]; expected .* as many rows"),
        (lambda: Inputs(factor=2.0), {}, "no tensor; expected"),
        (lambda: batches("dicts"), {"input_key": ["x", "z"]}, r"have no \['z'\]"),
        (lambda: iter([Inputs(IMAGES[:4], OTHERS[:4]), Inputs(IMAGES[:4])]), {}, "differ in form"),
        (lambda: Inputs(WHICH, WHICH), {}, "int64; expected floating point"),
        (lambda: Inputs(IMAGES, OTHERS / 0), {}, "NaN or infinite"),
        (lambda: Inputs(IMAGES[:4], OTHERS[:4]), {}, "ask for 8 calibration images, got 4"),
    ],
)
def test_mistakes_are_named(data: Callable[[], Any], arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(NetworkError, match=message):
        quantized(Takes(pair), data(), "compensated", **arguments)


def test_what_comes_of_it_is_a_network_like_any_other(tmp_path: Any) -> None:
    model = Takes(pair)
    network = quantized(model, Inputs(IMAGES, OTHERS), "compensated")
    save_packed(network, tmp_path / "net.safetensors")
    loaded = load_packed(tmp_path / "net.safetensors", Takes(pair))
    assert torch.equal(loaded(IMAGES, OTHERS), network(IMAGES, OTHERS))
    assert type(model) is Takes and type(pickle.loads(pickle.dumps(network))) is Takes
    with pytest.raises(NetworkError, match="mirror: the network takes several inputs"):
        quantize_model(model, QuantConfig(mirror=True, rounding="compensated", calib_samples=8), Inputs(IMAGES, OTHERS))
