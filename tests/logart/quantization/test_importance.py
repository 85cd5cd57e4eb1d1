"""The perturbation importance against a slow reference, its passes and its limits."""

from __future__ import annotations

import copy

import pytest
import torch
from networks import hooks_of, small_vit
from torch import Tensor, nn

from logart.quantization.importance import PerturbationImportance

CPU = torch.device("cpu")
BLOCKS = ("patch_embed", "blocks.0", "blocks.1")


def reference(model: nn.Module, name: str, images: Tensor, temperature: float, signs: Tensor) -> Tensor:
    """Image by image in float64, the softmax, the divergence and its gradient by the textbook."""
    model = copy.deepcopy(model).double()
    total = torch.zeros((), dtype=torch.float64)
    for image, v in zip(images.double(), signs.double(), strict=True):
        decision = torch.exp(model(image[None])[0] / temperature)
        decision = decision / decision.sum()
        gradients = []
        for sign in (1, -1):
            kept = []

            def move(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
                n_changed_codes = (output + sign * 1e-6 * v).detach().requires_grad_()  # noqa: B023
                kept.append(n_changed_codes)  # noqa: B023
                return n_changed_codes

            handle = model.get_submodule(name).register_forward_hook(move)
            given = torch.exp(model(image[None])[0] / temperature)
            handle.remove()
            divergence = (decision * torch.log(decision / (given / given.sum()))).sum()
            divergence.backward()
            assert kept[0].grad is not None
            gradients.append(kept[0].grad)
        total = total + (gradients[0] - gradients[1]).abs()
    return total


@pytest.mark.parametrize("temperature", [1.0, 20.0])
@pytest.mark.parametrize("name", BLOCKS)
def test_the_importance_is_that_of_the_slow_reference(name: str, temperature: float) -> None:
    model, images = small_vit()
    found = PerturbationImportance(model, images, temperature, 3, CPU, seed=7).of(name)
    shape = (len(images), *found.shape[1:])
    signs = torch.randint(0, 2, shape, generator=torch.Generator().manual_seed(7)) * 2 - 1
    expected = reference(model, name, images, temperature, signs)
    expected /= expected.mean()
    assert found.dtype is torch.float32 and found.shape == (1, *expected.shape[1:])
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-6)
    assert float(found.std()) > 0.1  # it tells elements apart


def test_all_elements_moved_alike_would_tell_nothing() -> None:
    """Why the signs are random: the layer norm behind takes the common shift away, and what is left is rounding."""
    model, images = small_vit()
    alike = torch.ones(len(images), 5, 12)
    signs = torch.randint(0, 2, alike.shape, generator=torch.Generator().manual_seed(0)) * 2 - 1
    dead, alive = (reference(model, "blocks.0", images, 20.0, v) for v in (alike, signs))
    assert float(dead.mean()) < 1e-6 * float(alive.mean())


def test_what_nothing_depends_on_weighs_nothing() -> None:
    """Of the last block only the class token reaches the head."""
    model, images = small_vit()
    found = PerturbationImportance(model, images, 1.0, 8, CPU).of("blocks.1")
    assert bool((found[0, 1:] == 0).all()) and bool((found[0, 0] > 0).any())


def test_where_nothing_matters_all_weigh_the_same() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)).requires_grad_(False)
    model[2].weight.zero_()  # type: ignore[operator, union-attr]
    found = PerturbationImportance(model, torch.randn(5, 3), 1.0, 2, CPU).of("0")
    assert torch.equal(found, torch.ones(1, 4))


def test_one_pass_a_block_and_one_in_all() -> None:
    model, images = small_vit()
    importance = PerturbationImportance(model, images, 20.0, 3, CPU)
    seen = []
    importance._model.register_forward_pre_hook(lambda m, args: seen.append(len(args[0])))
    for name in BLOCKS:
        seen.clear()
        importance.of(name)
        assert sum(seen) == len(images) and max(seen) == 3


def test_the_float_network_stays_as_it_was() -> None:
    model, images = small_vit()
    before = {name: t.clone() for name, t in model.state_dict().items()}
    importance = PerturbationImportance(model, images, 20.0, 3, CPU)
    importance.of("blocks.0")
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert next(model.parameters()).dtype is torch.float32
    assert hooks_of(model) == hooks_of(importance._model) == 0


def test_gradients_that_are_not_finite_name_the_block() -> None:
    model, images = small_vit()
    model.head.bias.fill_(float("nan"))  # type: ignore[union-attr, operator]
    with pytest.raises(ValueError, match="blocks.0"):
        PerturbationImportance(model, images, 20.0, 3, CPU).of("blocks.0")
