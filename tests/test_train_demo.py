"""The built-in networks: their shipped weights, what they show, and the script that trained them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib import resources
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import logart_cnn.models
import logart_vit.models
from logart import QuantConfig, quantize_model
from logart.networks.data import open_images
from logart.networks.evaluate import accuracy
from logart.networks.loader import validation_batches
from logart.networks.network import DIGITS_PREPROCESSING, Network
from scripts.train_demo import RECIPES, Recipe, main, shifted, train, training_digits

ONE_IMAGE = 0.2  # percent; a float kernel of another machine may turn a digit on the border between two classes


@dataclass(frozen=True)
class BuiltIn:
    """A built-in network: its accuracy as the README states it, what a single base loses, and two of its layers."""

    name: str
    load: Callable[..., Network]
    package: str
    float_accuracy: float
    loss: float
    head: str
    late_layer: str

    @property
    def weights(self) -> Path:
        return Path(str(resources.files(self.package))) / "weights" / f"{self.name}.safetensors"

    @property
    def recipe(self) -> Recipe:
        return replace(RECIPES[self.name], epochs=1)


BUILT_IN = [
    BuiltIn("digits_resnet", logart_cnn.models.load_network, "logart_cnn", 98.8, 3, "linear", "blocks.4.conv2"),
    BuiltIn("digits_vit", logart_vit.models.load_network, "logart_vit", 98.0, 2, "head", "blocks.3.mlp.fc2"),
]


@pytest.fixture(params=BUILT_IN, ids=lambda built_in: built_in.name)
def built_in(request: pytest.FixtureRequest) -> BuiltIn:
    return request.param


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return training_digits()


def top1(model: nn.Module) -> float:
    batches = validation_batches(open_images("digits", DIGITS_PREPROCESSING, 10), batch_size=500, workers=0)
    return accuracy(model, batches, torch.device("cpu")).top1


def test_every_recipe_ships_its_network() -> None:
    assert {name: str(recipe.weights) for name, recipe in RECIPES.items()} == {
        built_in.name: str(built_in.weights) for built_in in BUILT_IN
    }


def test_the_shipped_weights_reach_the_stated_accuracy(built_in: BuiltIn) -> None:
    assert top1(built_in.load(built_in.name).model) == pytest.approx(built_in.float_accuracy, abs=1.5 * ONE_IMAGE)


def test_the_shipped_weights_are_small_and_float32(built_in: BuiltIn) -> None:
    assert len(built_in.weights.read_bytes()) <= 400_000
    assert {value.dtype for value in load_file(str(built_in.weights)).values()} == {torch.float32}


def test_the_shipped_network_tells_the_grids_apart(built_in: BuiltIn, digits: tuple[Tensor, Tensor]) -> None:
    network = built_in.load(built_in.name)

    def rounded(method: str) -> float:
        config = QuantConfig(scale_method=method, iters=0)
        return top1(quantize_model(network.model, config, digits[0])[0])

    dynamic, border = rounded("dynamic"), built_in.float_accuracy - built_in.loss
    assert rounded("log_2") < border
    assert rounded("log_sqrt2") < border
    assert border < dynamic < built_in.float_accuracy - ONE_IMAGE  # most is recovered, some is left for LLR


def test_training_twice_gives_the_same_bits(built_in: BuiltIn, digits: tuple[Tensor, Tensor]) -> None:
    def state_of(seed: int) -> dict[str, Tensor]:
        return train(built_in.recipe, digits[0][:256], digits[1][:256], seed, quiet=True).state_dict()

    first = state_of(0)
    torch.rand(7)  # what ran before must not matter
    second, other = state_of(0), state_of(1)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first[f"{built_in.head}.weight"], other[f"{built_in.head}.weight"])


def test_training_leaves_the_training_images_alone_and_learns(built_in: BuiltIn, digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0].clone()
    model = train(replace(built_in.recipe, epochs=4), images, digits[1], 0, quiet=True)
    assert top1(model) > 30  # chance is 10
    assert torch.equal(images, digits[0])


def test_the_penalty_makes_the_weights_sparser(built_in: BuiltIn, digits: tuple[Tensor, Tensor]) -> None:
    def spread(l1: float) -> Tensor:
        model = train(replace(built_in.recipe, l1=l1, epochs=2), *digits, 0, quiet=True)
        weight = model.state_dict()[f"{built_in.late_layer}.weight"]
        return weight.abs().mean() / weight.square().mean().sqrt()

    assert spread(10 * built_in.recipe.l1) < spread(0.0)


def test_the_penalty_spares_embeddings_and_norms(digits: tuple[Tensor, Tensor]) -> None:
    def sizes(l1: float) -> dict[str, float]:
        model = train(replace(RECIPES["digits_vit"], l1=l1, epochs=2), *digits, 0, quiet=True)
        return {name: value.abs().mean().item() for name, value in model.state_dict().items()}

    free, pulled = sizes(0.0), sizes(1000.0)  # a penalty that outweighs everything else
    for name in ("blocks.0.attn.qkv.weight", "head.weight"):
        assert pulled[name] < 0.2 * free[name]
    for name in ("pos_embed", "norm.weight"):
        assert pulled[name] > 0.8 * free[name]


def test_it_trains_on_the_training_split_alone(digits: tuple[Tensor, Tensor]) -> None:
    source = open_images("digits", DIGITS_PREPROCESSING, 10)
    images, labels = digits
    assert len(images) == len(labels) == len(source.train) == 1297
    for index in (0, 700, 1296):
        image, label = source.train[index]
        assert torch.equal(images[index], image) and labels[index] == label


def test_shifts_move_by_a_pixel_at_most_and_never_wrap() -> None:
    dots = torch.zeros(900, 1, 4, 6)
    dots[:, :, 1, 2] = 1
    corners = torch.full((900, 1, 4, 6), -2.0)
    corners[:, :, 0, 0] = 1
    torch.manual_seed(0)
    places = shifted(dots, 0.0).nonzero()[:, 2:]
    assert {tuple(place) for place in places.tolist()} == {(y, x) for y in (0, 1, 2) for x in (1, 2, 3)}
    moved = shifted(corners, -2.0)
    assert moved.shape == corners.shape
    assert (moved == 1).sum((1, 2, 3)).max() == 1 and (moved[:, :, 2:] == -2).all()
    assert set(moved.unique().tolist()) == {-2.0, 1.0}


def test_the_command_writes_a_checkpoint_that_loads(
    built_in: BuiltIn, tmp_path: Path, digits: tuple[Tensor, Tensor]
) -> None:
    before, threads = built_in.weights.read_bytes(), torch.get_num_threads()
    out = tmp_path / "new" / "a.safetensors"
    try:
        assert main(["--network", built_in.name, "--epochs", "1", "--seed", "3", "--out", str(out)]) == 0
        expected = train(built_in.recipe, *digits, 3, quiet=True)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    network = built_in.load(built_in.name, out)
    assert torch.equal(network.model(digits[0][:8]), expected(digits[0][:8]))
    assert built_in.weights.read_bytes() == before
