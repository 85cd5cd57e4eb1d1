"""quantize_model at its borders: the user's model, the images, and what raises."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from networks import fingerprint, hooks_of, small_resnet, smooth_images
from torch import Tensor, nn

from logart import QuantConfig, quantize_model
from logart.errors import NetworkError
from logart.quantization import pipeline
from logart.quantization.clone import clone_sharing
from logart.quantization.pipeline import gather_images
from logart.quantization.quantized_weight import QuantizedWeight
from logart.quantization.surgery import quantized_layers

BASE: dict[str, Any] = {
    "n_bits": 3,
    "iters": 25,
    "calib_samples": 16,
    "search_samples": 8,
    "batch_size": 8,
    "lr": 0.05,
    "rrweight": 0.5,
}


def test_the_users_model_is_not_touched() -> None:
    model, images = small_resnet()
    model.train()
    model.blocks[0].bn1.eval()  # type: ignore[index, union-attr]
    model.head.requires_grad_(False)  # type: ignore[union-attr]
    modules, kept_images = list(model.named_modules()), images.clone()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    modes = [module.training for _, module in modules]
    asked = [parameter.requires_grad for parameter in model.parameters()]
    pointers = [parameter.data_ptr() for parameter in model.parameters()]
    quantize_model(
        model,
        QuantConfig(**BASE, search_method="block_wise"),
        images,
        block_types=["ResidualBlock"],  # type: ignore[arg-type]
    )
    assert list(model.named_modules()) == modules
    assert [module.training for _, module in modules] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == asked
    assert [parameter.data_ptr() for parameter in model.parameters()] == pointers
    assert all(parameter.grad is None for parameter in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert torch.equal(images, kept_images)
    assert hooks_of(model) == 0


def test_float_and_quantized_network_share_what_is_equal() -> None:
    model, images = small_resnet()
    seen: dict[str, nn.Module] = {}
    quantized, _ = quantize_model(
        model, QuantConfig(**BASE), images, on_stage_end=lambda s, network: seen.update({s: network})
    )
    reference = seen["float"]
    for name, layer in quantized_layers(quantized).items():
        original = reference.get_submodule(name)
        assert layer.float_weight is not None
        assert layer.float_weight.data_ptr() == original.weight.data_ptr()  # type: ignore[operator, union-attr]
        assert layer.bias.data_ptr() == original.bias.data_ptr()  # type: ignore[operator, union-attr]
    assert quantized.head.bias.data_ptr() == model.head.bias.data_ptr()  # type: ignore[union-attr, operator]


# ---------------------------------------------------------------- images


def batches(images: Tensor, sizes: list[int], taken: list[int]) -> Iterator[Tensor]:
    for batch in images.split(sizes):
        taken.append(len(batch))
        yield batch


def test_any_iterable_of_batches_will_do() -> None:
    """The first images count, whatever the batches; no more batches are drawn than needed."""
    model, images = small_resnet(n_images=24)
    config, taken = QuantConfig(**BASE), list[int]()
    whole = fingerprint(quantize_model(model, config, images[:16])[0])
    assert fingerprint(quantize_model(model, config, images)[0]) == whole
    assert fingerprint(quantize_model(model, config, batches(images, [7, 7, 4, 6], taken))[0]) == whole
    assert taken == [7, 7, 4]
    assert fingerprint(quantize_model(model, config, list(images.split(5)))[0]) == whole
    assert torch.equal(gather_images(images.split(5), 7), images[:7])


class Normalising(nn.Sequential):
    """Changes its input in place, as some networks do."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.sub_(0.5))  # type: ignore[no-any-return]


@pytest.mark.parametrize("block_types", [[], ["Normalising"]])
@pytest.mark.parametrize("search_method", ["tensor_wise", "layer_wise", "block_wise"])
def test_a_network_that_changes_its_input_leaves_the_images_alone(search_method: Any, block_types: list[str]) -> None:
    model = Normalising(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.Conv2d(4, 2, 3))
    images = smooth_images(16, 3, 6).float()
    before = images.clone()
    quantize_model(model, QuantConfig(**BASE, search_method=search_method), images, block_types=block_types)
    assert torch.equal(images, before)


@pytest.mark.parametrize("as_batches", [False, True])
@pytest.mark.parametrize(
    ("settings", "needed"),
    [
        ({}, 16),
        ({"calib_samples": 4, "search_method": "layer_wise"}, 8),
        ({"iters": 0, "search_method": "block_wise"}, 8),
        ({"iters": 0}, 2),
    ],
)
def test_too_few_images_are_refused(settings: dict[str, Any], needed: int, as_batches: bool) -> None:
    model, images = small_resnet()
    config = QuantConfig(**{**BASE, **settings})
    give: Callable[[int], Any] = lambda n: images[:n].split(3) if as_batches else images[:n]  # noqa: E731
    with pytest.raises(ValueError, match=f"ask for {needed} calibration images, got {needed - 1}"):
        quantize_model(model, config, give(needed - 1))
    quantize_model(model, config, give(needed))
    with pytest.raises(ValueError, match="got 0"):
        quantize_model(model, config, [])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_images_that_are_not_finite_are_refused(bad: float) -> None:
    model, images = small_resnet()
    images[11, 0, 0, 0] = bad
    with pytest.raises(ValueError, match="calibration images hold NaN or infinite"):
        quantize_model(model, QuantConfig(**BASE), images)
    assert len(gather_images(images, 11)) == 11  # those that are not asked for do not matter


# ---------------------------------------------------------------- trouble


@pytest.mark.parametrize(
    ("model", "block_types", "message"),
    [
        (nn.Sequential(nn.ReLU()), [], "Sequential has no layer that can be quantized"),
        (nn.Sequential(nn.Conv2d(3, 2, 1)), ["Bottleneck"], "no module of type Bottleneck in Sequential"),
    ],
)
def test_nothing_to_do_is_an_error(model: nn.Module, block_types: list[str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize_model(model, QuantConfig(iters=0), torch.randn(2, 3, 4, 4), block_types=block_types)


class Fuse(nn.Module):
    """Blows at its n-th run, over all copies of it."""

    runs = 0
    blows_at = -1

    def forward(self, x: Tensor) -> Tensor:
        Fuse.runs += 1
        if Fuse.runs == Fuse.blows_at:
            raise RuntimeError("blown")
        return x


class Fused(nn.Sequential):
    """A block to reconstruct."""


@pytest.mark.parametrize("search_method", ["layer_wise", "block_wise"])
def test_a_stage_that_raises_leaves_no_trace(search_method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever run of the block it is that raises, before its layer or after."""
    torch.manual_seed(0)
    block = Fused(Fuse(), nn.Conv2d(4, 2, 3), Fuse())
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), block, nn.Flatten())
    images = smooth_images(4, 3, 6).float()
    config = QuantConfig(
        n_bits=3, iters=3, search_samples=4, calib_samples=4, batch_size=4, search_method=search_method
    )
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    clones: list[nn.Module] = []

    def clone(network: nn.Module) -> nn.Module:
        clones.append(clone_sharing(network))
        return clones[-1]

    monkeypatch.setattr(pipeline, "clone_sharing", clone)

    def attempt(blows_at: int) -> None:
        Fuse.runs, Fuse.blows_at = 0, blows_at
        clones.clear()
        quantize_model(model, config, images, block_types=["Fused"])

    attempt(-1)
    assert len(clones) == 2
    total = Fuse.runs
    assert total > 15
    for blows_at in range(1, total + 1):
        with pytest.raises((RuntimeError, NetworkError), match="blown"):
            attempt(blows_at)
        assert [hooks_of(network) for network in (model, *clones)] == [0] * (1 + len(clones)), blows_at
        layers = [m for network in clones for m in network.modules() if isinstance(m, QuantizedWeight)]
        assert all(layer.soft is None for layer in layers)
        assert torch.is_grad_enabled() and model.training
        assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_whole_network_may_be_one_block() -> None:
    model, images = small_resnet()
    _, report = quantize_model(
        model,
        QuantConfig(**BASE, search_method="block_wise"),
        images,
        block_types=["SmallResNet"],  # type: ignore[arg-type]
    )
    assert [(block.name, block.kept) for block in report.blocks] == [("", "learned")]
    assert {layer.block for layer in report.layers} == {""}
