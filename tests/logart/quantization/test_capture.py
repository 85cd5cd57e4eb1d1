"""Capture: what a module is given and gives, no hook left, one copy in memory."""

from collections.abc import Callable

import pytest
import torch
from networks import hooks_of, small_resnet
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.quantization import capture
from logart.quantization.cache import Cache

CACHE = Cache(torch.device("cpu"))


class Counting(nn.Module):
    """Passes its input on and counts how often."""

    def __init__(self) -> None:
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return x


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.ReLU(inplace=True), Counting())


@pytest.mark.parametrize("batch_size", [1, 3, 7, 100])
def test_inputs_and_outputs_are_those_of_one_forward(batch_size: int) -> None:
    """In order, also where the last batch is smaller, and before a following activation in place."""
    model, x = chain().requires_grad_(False), torch.randn(7, 4)
    hidden = model[0](x).relu()
    found = capture.inputs(model, "2", x, batch_size, CACHE)
    torch.testing.assert_close(found, hidden, rtol=1e-6, atol=1e-6)
    given = capture.outputs(model, "2", x, batch_size, CACHE)
    torch.testing.assert_close(given, model[2](hidden), rtol=1e-6, atol=1e-6)
    assert bool((given < 0).any())
    assert hooks_of(model) == 0


def test_blocks_and_the_whole_network() -> None:
    model, images = small_resnet(n_images=5)
    model.requires_grad_(False)
    whole = capture.outputs(model, "", images, 2, CACHE)
    torch.testing.assert_close(whole, model(images), rtol=1e-5, atol=1e-6)
    assert torch.equal(capture.inputs(model, "", images, 2, CACHE), images)
    block = capture.inputs(model, "blocks.1", images, 5, CACHE)
    assert torch.equal(capture.outputs(model, "blocks.1", images, 5, CACHE), model.blocks[1](block.clone()))  # type: ignore[index, operator]


def test_captured_tensors_need_no_gradient() -> None:
    model, x = chain(), torch.randn(3, 4)
    assert not capture.outputs(model, "2", x, 2, CACHE).requires_grad


def test_the_forward_stops_at_the_module() -> None:
    model, x = chain(), torch.randn(3, 4)
    capture.inputs(model, "2", x, 3, CACHE)
    capture.outputs(model, "2", x, 3, CACHE)
    assert model[4].runs == 0
    capture.outputs(model, "4", x, 2, CACHE)
    assert model[4].runs == 2


def test_an_operation_in_place_leaves_the_images_alone() -> None:
    model, x = nn.Sequential(nn.Hardswish(inplace=True), nn.Linear(4, 2)), torch.randn(3, 4)
    before = x.clone()
    first = capture.inputs(model, "1", x, 2, CACHE)
    assert torch.equal(x, before)
    assert torch.equal(capture.inputs(model, "1", x, 2, CACHE), first)


class Halving(nn.Module):
    """Begins with an operation in place that does not come to the same when done twice."""

    def forward(self, x: Tensor) -> Tensor:
        return x.mul_(0.5).add_(1)


def test_the_input_is_the_one_before_an_operation_in_place() -> None:
    model, x = nn.Sequential(nn.Linear(4, 3), Halving()).requires_grad_(False), torch.randn(5, 4)
    given, left = capture.inputs_and_outputs(model, "1", x, 2, CACHE)
    assert torch.equal(given[:], capture.inputs(model, "1", x, 2, CACHE)[:])
    torch.testing.assert_close(left[:], given[:] * 0.5 + 1)


class Table(nn.Module):
    """Its inner module runs on something that is no batch, or on windows of one."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows, self.inner = windows, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.repeat(self.windows, 1) if self.windows else torch.ones(1, 4)).sum() + x


@pytest.mark.parametrize(("windows", "rows"), [(0, 1), (4, 12)])
@pytest.mark.parametrize("look", [capture.inputs, capture.outputs, capture.inputs_and_outputs])
def test_rows_that_are_not_the_images_are_refused(look: Callable[..., object], windows: int, rows: int) -> None:
    with pytest.raises(NetworkError, match=f"block inner has {rows} rows for 3 images; expected a row for each"):
        look(Table(windows), "inner", torch.randn(6, 4), 3, CACHE)


class Odd(nn.Module):
    """Calls its inner module in a way that cannot be captured."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.inner = call, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: x, "never reached Linear"),
        (lambda m, x: m(input=x), "Linear was called with 0 arguments and keywords .'input'.*one tensor"),
        (lambda m, x: m(x, x), "Linear was called with 2 arguments"),
        (lambda m, x: m([x]), "must take one tensor"),
    ],
)
@pytest.mark.parametrize("look", [capture.inputs, capture.outputs])
def test_what_cannot_be_captured_is_refused_and_leaves_no_hook(
    look: Callable[..., Tensor], call: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    model = Odd(call)
    with pytest.raises(ValueError, match=message):
        look(model, "inner", torch.randn(3, 4), 2, CACHE)
    assert hooks_of(model) == 0


def test_a_forward_that_raises_leaves_no_hook() -> None:
    model = Odd(lambda m, x: m(x[:, :2]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        capture.outputs(model, "inner", torch.randn(3, 4), 2, CACHE)
    assert hooks_of(model) == 0


def test_no_images() -> None:
    with pytest.raises(ValueError, match="no images"):
        capture.inputs(chain(), "2", torch.empty(0, 4), 2, CACHE)


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes of tensors that `run` held at once beyond what was there before."""
    with torch.profiler.profile(profile_memory=True) as profile:
        kept = run()
    snapshot = peak = 0
    assert profile.profiler is not None and kept is not None
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            snapshot += event.nbytes()
            peak = max(peak, snapshot)
    return peak


def test_capturing_n_inputs_costs_one_copy() -> None:
    """Not two, as gathering batches in a list and joining them would."""
    model = nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 2)).requires_grad_(False)
    images = torch.randn(2048, 16)
    size = 2048 * 64 * 4
    peak = peak_bytes(lambda: capture.inputs(model, "2", images, 32, CACHE))
    assert size <= peak < 1.2 * size
    joined = peak_bytes(lambda: torch.cat([model[:2](batch) for batch in images.split(32)]))
    assert joined >= 2 * size  # the measure sees such a copy
