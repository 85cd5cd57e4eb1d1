"""The built-in network: its shipped weights, what they show, and the script that trained them."""

from __future__ import annotations

from dataclasses import replace
from importlib import resources

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from logart import QuantConfig, quantize_model
from logart.config import ScaleMethod
from logart.data import open_images, validation_batches
from logart.evaluate import accuracy
from logart_cnn.models import DIGITS, Network, load_network
from scripts.train_demo import RECIPES, main, shifted, train, training_digits

RECIPE = replace(RECIPES["digits_resnet"], epochs=1)
FLOAT_ACCURACY = 98.8  # of the shipped weights, as the README states it
ONE_IMAGE = 0.2  # percent; a float kernel of another machine may turn a digit on the border between two classes
WEIGHTS = resources.files("logart_cnn").joinpath("weights/digits_resnet.safetensors")


@pytest.fixture(scope="module")
def shipped() -> Network:
    return load_network("digits_resnet")


@pytest.fixture(scope="module")
def digits() -> tuple[Tensor, Tensor]:
    return training_digits(DIGITS)


def top1(model: torch.nn.Module) -> float:
    batches = validation_batches(open_images("digits", DIGITS, 10), batch_size=500, workers=0)
    return accuracy(model, batches, torch.device("cpu")).top1


def state_of(recipe_seed: int, digits: tuple[Tensor, Tensor]) -> dict[str, Tensor]:
    return train(RECIPE, digits[0][:256], digits[1][:256], recipe_seed, quiet=True).state_dict()


def test_the_shipped_weights_reach_the_stated_accuracy(shipped: Network) -> None:
    assert top1(shipped.model) == pytest.approx(FLOAT_ACCURACY, abs=1.5 * ONE_IMAGE)


def test_the_shipped_weights_are_small_and_float32() -> None:
    assert len(WEIGHTS.read_bytes()) <= 400_000
    assert {value.dtype for value in load_file(str(WEIGHTS)).values()} == {torch.float32}


def test_the_shipped_network_tells_the_grids_apart(shipped: Network, digits: tuple[Tensor, Tensor]) -> None:
    def rounded(method: ScaleMethod) -> float:
        config = QuantConfig(scale_method=method, iters=0)
        return top1(quantize_model(shipped.model, config, digits[0], block_types=shipped.block_types)[0])

    dynamic = rounded(ScaleMethod.DYNAMIC)
    assert rounded(ScaleMethod.LOG_2) < FLOAT_ACCURACY - 3
    assert rounded(ScaleMethod.LOG_SQRT2) < FLOAT_ACCURACY - 3
    assert FLOAT_ACCURACY - 3 < dynamic < FLOAT_ACCURACY - 2 * ONE_IMAGE  # most is recovered, some is left for LLR


def test_training_twice_gives_the_same_bits(digits: tuple[Tensor, Tensor]) -> None:
    first = state_of(0, digits)
    torch.rand(7)  # what ran before must not matter
    second, other = state_of(0, digits), state_of(1, digits)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["linear.weight"], other["linear.weight"])


def test_training_leaves_the_training_images_alone_and_learns(digits: tuple[Tensor, Tensor]) -> None:
    images = digits[0].clone()
    model = train(replace(RECIPE, epochs=4), images, digits[1], 0, quiet=True)
    assert top1(model) > 80  # chance is 10
    assert torch.equal(images, digits[0])


def test_the_penalty_makes_the_weights_sparser(digits: tuple[Tensor, Tensor]) -> None:
    def spread(l1: float) -> Tensor:
        model = train(replace(RECIPE, l1=l1, epochs=2), *digits, 0, quiet=True)
        weight = model.state_dict()["blocks.4.conv2.weight"]
        return weight.abs().mean() / weight.square().mean().sqrt()

    assert spread(10 * RECIPE.l1) < spread(0.0)


def test_it_trains_on_the_training_split_alone(digits: tuple[Tensor, Tensor]) -> None:
    source = open_images("digits", DIGITS, 10)
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


def test_the_command_writes_a_checkpoint_that_loads(tmp_path, digits: tuple[Tensor, Tensor]) -> None:
    before, threads = WEIGHTS.read_bytes(), torch.get_num_threads()
    try:
        assert main(["--epochs", "1", "--seed", "3", "--out", str(tmp_path / "new" / "a.safetensors")]) == 0
        expected = train(RECIPE, *digits, 3, quiet=True)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(False)
    network = load_network("digits_resnet", tmp_path / "new" / "a.safetensors")
    assert torch.equal(network.model(digits[0][:8]), expected(digits[0][:8]))
    assert WEIGHTS.read_bytes() == before
