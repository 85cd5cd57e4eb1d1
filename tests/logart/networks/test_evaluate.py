"""Accuracy: counted by hand on logits that are given as images."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

from logart.networks.evaluate import Accuracy, accuracy

CPU = torch.device("cpu")


def network() -> nn.Module:
    """A network whose logits are its inputs."""
    return nn.Identity().eval()


def test_top1_and_top5_are_percent_over_all_batches() -> None:
    logits = torch.tensor([[9.0, 8, 7, 6, 5, 4, 3]]).repeat(8, 1)
    labels = torch.tensor([0, 0, 0, 1, 4, 5, 6, 6])  # 3 first choices; 5 among the first five; 3 beyond
    uneven = [(logits[:5], labels[:5]), (logits[5:], labels[5:])]
    assert accuracy(network(), uneven, CPU)[:3] == (37.5, 62.5, 8)


def test_agrees_with_a_slow_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(103, 11, generator=generator)
    labels = torch.randint(11, (103,), generator=generator)
    ranks = [sum(other > row[y] for other in row) for row, y in zip(logits, labels, strict=True)]
    batches = zip(logits.split(10), labels.split(10), strict=True)
    top1, top5 = (100 * sum(rank < k for rank in ranks) / 103 for k in (1, 5))
    assert accuracy(network(), batches, CPU)[:3] == (top1, top5, 103)


def test_answers_tell_where_two_networks_differ() -> None:
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(7, (50,), generator=generator)
    logits = torch.randn(2, 50, 7, generator=generator) + 2 * torch.nn.functional.one_hot(labels, 7)
    float_one, other = (accuracy(network(), zip(x.split(8), labels.split(8), strict=True), CPU) for x in logits)
    first, second = logits.argmax(2).tolist()
    right = [[c == y for c, y in zip(choices, labels.tolist(), strict=True)] for choices in (first, second)]
    lost = sum(a and not b for a, b in zip(*right, strict=True))
    won = sum(b and not a for a, b in zip(*right, strict=True))
    same = 2 * sum(a == b for a, b in zip(first, second, strict=True))
    assert min(lost, won) > 0 and other.against(float_one) == (lost, won, same)
    assert other.top1 - float_one.top1 == pytest.approx(2 * (won - lost))
    assert other.against(Accuracy(50.0, 100.0, 50)) is None is Accuracy(50.0, 100.0, 50).against(other)


def test_fewer_than_five_classes_all_count_for_top5() -> None:
    batch = (torch.tensor([[3.0, 2, 1], [3, 2, 1]]), torch.tensor([0, 2]))
    assert accuracy(network(), [batch], CPU)[:3] == (50.0, 100.0, 2)


def test_ties_do_not_flatter() -> None:
    """A network with one answer for everything must not be right on every image."""
    classes = 20
    batch = (torch.zeros(classes, classes), torch.arange(classes))
    assert accuracy(network(), [batch], CPU)[:3] == (100 / classes, 500 / classes, classes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_logits_that_are_not_finite_name_their_batch(value: float) -> None:
    good = (torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64))
    bad = (torch.tensor([[0.0, 0, 0], [0, value, 0]]), good[1])
    with pytest.raises(ValueError, match="batch 2: .*finite"):
        accuracy(network(), [good, good, bad], CPU)


@pytest.mark.parametrize("training", [[], ["1"]])
def test_training_mode_is_refused_before_any_forward(training: list[str]) -> None:
    model = nn.Sequential(nn.Identity(), nn.Dropout())
    if training:  # a part left in training mode is no better than the whole
        model.eval()[1].train()

    def untouched() -> Iterator[tuple[Tensor, Tensor]]:
        raise AssertionError("read a batch")
        yield

    with pytest.raises(ValueError, match=f"{(training or ['Sequential'])[0]} is in training mode"):
        accuracy(model, untouched(), CPU)


@pytest.mark.parametrize(("shape", "labels"), [((2, 3), 1), ((2, 3), 3), ((2, 3, 4), 2), ((2,), 2)])
def test_shapes_that_do_not_fit_are_named_and_never_broadcast(shape: tuple[int, ...], labels: int) -> None:
    with pytest.raises(ValueError, match=r"batch 0: expected logits \[B, classes\]"):
        accuracy(network(), [(torch.zeros(shape), torch.zeros(labels, dtype=torch.int64))], CPU)


def test_no_images_is_an_error_not_zero_percent() -> None:
    with pytest.raises(ValueError, match="at least one image"):
        accuracy(network(), [], CPU)


def test_streams_and_reports_each_batch_without_gradients() -> None:
    events: list[str] = []

    class Watched(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            assert torch.is_inference_mode_enabled()
            events.append("forward")
            return x

    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        for size in (4, 4, 1):
            events.append("read")
            yield torch.zeros(size, 2), torch.zeros(size, dtype=torch.int64)

    def progress(images: int) -> None:
        events.append(f"done {images}")

    accuracy(Watched().eval(), batches(), CPU, progress)
    assert events == ["read", "forward", "done 4"] * 2 + ["read", "forward", "done 1"]


def test_leaves_the_model_in_evaluation_mode_and_gradients_on() -> None:
    model = network()
    accuracy(model, [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.int64))], CPU)
    assert not model.training and torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
