"""Capture: how a module is called, what it gives, and that nothing stays behind."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from networks import hooks_of
from torch import Tensor, nn

from logart.errors import NetworkError
from logart.quantization.cache import Captured
from logart.quantization.capture import Call, intercepted, replay_to_last, run_to


def chain() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 5), nn.ReLU(inplace=True), nn.Linear(5, 3), nn.ReLU(inplace=True), nn.Linear(3, 2)
    ).requires_grad_(False)


def last_calls(model: nn.Module, modules: list[nn.Module], inputs: list[Tensor], **held: Any) -> list[Call]:
    calls: list[Call] = []
    replay = lambda batch, index: held[f"of{index}"][batch].clone()  # noqa: E731
    replay_to_last(model, modules, inputs, replay, lambda batch, call: calls.append(call))
    return calls


def test_a_replayed_module_gives_what_it_is_told_and_runs_no_more() -> None:
    model, batches = chain(), [torch.randn(3, 4), torch.randn(2, 4)]
    runs: list[nn.Module] = []
    for module in model:
        module.register_forward_hook(lambda module, args, output: runs.append(module))
    told = [torch.randn(3, 5), torch.randn(2, 5)]
    found = last_calls(model, [model[0], model[2]], batches, of0=told)
    for call, x in zip(found, told, strict=True):
        assert len(call.args) == 1 and call.kwargs == {} and torch.equal(call.args[0], x.relu())
    assert runs == [model[1], model[1]]  # neither the module replayed, nor the last, nor what is behind it


def test_a_module_is_all_else_that_it_was_and_comes_back() -> None:
    model, kinds = chain(), [type(module) for module in chain()]
    with intercepted([model[0]], lambda index, call: call.args[0] + 1):
        assert isinstance(model[0], nn.Linear) and model[0].out_features == 5 and type(model[0]).__name__ == "Linear"
        assert torch.equal(model[0](torch.zeros(2)), torch.ones(2))
        assert "0.weight" in model.state_dict()
    with pytest.raises(RuntimeError, match="broken"), intercepted(list(model), _broken):
        model(torch.zeros(2, 4))
    assert [type(module) for module in model] == kinds


def _broken(index: int, call: Call) -> Any:
    raise RuntimeError("broken")


def test_an_operation_in_place_leaves_the_images_alone() -> None:
    model, x = nn.Sequential(nn.Hardswish(inplace=True), nn.Linear(4, 2)), torch.randn(3, 4)
    before = x.clone()
    (call,) = last_calls(model, [model[1]], [x])
    assert torch.equal(x, before)
    assert torch.equal(call.args[0], nn.functional.hardswish(before))


class Wrapped(nn.Module):
    """Calls its inner module in some way."""

    def __init__(self, call: Callable[[nn.Module, Tensor], Tensor]) -> None:
        super().__init__()
        self.call, self.inner = call, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.inner, x)


def test_any_call_is_seen_whole() -> None:
    model, x = Wrapped(lambda m, x: m([x, 1], scale={"a": x + 1})), torch.randn(3, 4)
    (call,) = last_calls(model, [model.inner], [x])
    assert torch.equal(call.args[0][0], x) and call.args[0][1] == 1 and torch.equal(call.kwargs["scale"]["a"], x + 1)
    part = Captured([call]).of_images(call, slice(1, 2)).copy()
    part.args[0][0].zero_()
    assert part.kwargs["scale"]["a"].shape == (1, 4) and torch.equal(call.args[0][0], x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: x, "never reached Linear"),
        (lambda m, x: m(input=x), "Linear was called with 0 arguments and keywords .'input'.*one tensor"),
        (lambda m, x: m(x, x), "Linear was called with 2 arguments"),
        (lambda m, x: m([x]), "must take one tensor"),
    ],
)
def test_a_layer_that_cannot_be_looked_into_is_refused_and_keeps_no_hook(
    call: Callable[[nn.Module, Tensor], Tensor], message: str
) -> None:
    model = Wrapped(call)
    with pytest.raises(NetworkError, match=message):
        run_to(model, model.inner, Call((torch.randn(3, 4),), {}))
    assert hooks_of(model) == 0


def test_a_forward_that_never_gets_there_is_refused() -> None:
    model = Wrapped(lambda m, x: x)
    with pytest.raises(NetworkError, match="the forward pass never reached Linear"):
        last_calls(model, [model.inner], [torch.randn(3, 4)])
    assert type(model.inner) is nn.Linear


def test_a_layer_inside_a_block_before_an_activation_in_place() -> None:
    model, x = chain(), torch.randn(3, 4)
    fed, given = run_to(model, model[2], Call((x,), {}))
    assert torch.equal(fed, model[0](x).relu()) and torch.equal(given, model[2](fed)) and bool((given < 0).any())
    fed, given = run_to(model[0], model[0], Call((x,), {}))  # which is the block
    assert torch.equal(fed, x) and torch.equal(given, model[0](x))
    assert hooks_of(model) == 0


def test_a_forward_that_raises_leaves_no_hook() -> None:
    model = Wrapped(lambda m, x: m(x[:, :2]))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        run_to(model, model.inner, Call((torch.randn(3, 4),), {}))
    assert hooks_of(model) == 0
