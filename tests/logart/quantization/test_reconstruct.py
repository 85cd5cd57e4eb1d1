"""LLR over one block: what it learns, what it must not touch, its schedules, and that it pays."""

import math
from typing import Any

import pytest
import torch
from networks import ResidualBlock, calls, hooks_of, settle, smooth_images
from torch import Tensor, nn

from logart.grids.losses import squared_error
from logart.grids.rounding import lower_neighbour, nearest
from logart.grids.search import choose_codebook
from logart.quantization import reconstruct
from logart.quantization.best_codes import block_error
from logart.quantization.cache import Captured
from logart.quantization.clone import clone_sharing
from logart.quantization.config import QuantConfig
from logart.quantization.folding import fold_batch_norms
from logart.quantization.layers import QuantizedWeight
from logart.quantization.reconstruct import BlockReport, learn_rounding, learning_rate, penalty_exponent
from logart.quantization.surgery import quantized_layers, replace_layers


def config(**settings: Any) -> QuantConfig:
    return QuantConfig(**{"n_bits": 3, "iters": 60, "batch_size": 16, "lr": 0.05, **settings})


def block(seed: int = 0, **settings: Any) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """A folded float32 block, its quantized counterpart rounded to nearest, that one's inputs and the float targets."""
    torch.manual_seed(seed)
    x = smooth_images(48, 6, 6, seed).relu()
    model = settle(ResidualBlock(6, 6), x, seed).float().requires_grad_(False)
    fold_batch_norms(model, x[:2].float())
    quantized, chosen = clone_sharing(model), config(**settings)
    replace_layers(quantized, {"conv1": chosen.n_bits, "conv2": chosen.n_bits}, channel_wise=True)
    for layer in quantized_layers(quantized).values():
        layer.set_codebook(choose_codebook(layer.rows, chosen.grid, layer.n_bits))
    inputs = x.float() + 0.02 * torch.randn(x.shape)
    return model, quantized, inputs, model(x.float())


def learn(quantized: nn.Module, inputs: Tensor, targets: Tensor, **arguments: Any) -> BlockReport:
    settings = {
        name: arguments.pop(name)
        for name in tuple(arguments)
        if name not in ("loss", "progress", "float_inputs", "judge")
    }
    layers = list(quantized_layers(quantized).values())
    arguments.setdefault("loss", squared_error)
    if "float_inputs" in arguments:
        arguments["float_inputs"] = calls(arguments["float_inputs"])
    return learn_rounding(
        "a block", quantized, layers, calls(inputs), Captured([targets]), config(**settings), **arguments
    )


def codes_of(model: nn.Module) -> Tensor:
    codes = [layer.codes for layer in quantized_layers(model).values()]
    assert all(c is not None for c in codes)
    return torch.cat([c.flatten() for c in codes if c is not None])


@pytest.mark.parametrize("scale_method", ["dynamic", "log_2", "log_sqrt2", "linear_mse"])
def test_learning_lowers_the_error_by_a_good_margin(scale_method: str) -> None:
    """On data it learned from and on data it did not."""
    model, quantized, inputs, targets = block(scale_method=scale_method)
    fresh = smooth_images(48, 6, 6, 99).relu().float()
    fresh_before = block_error(quantized, calls(fresh), Captured([model(fresh)]), squared_error, 16)
    report = learn(quantized, inputs, targets, iters=200, rrweight=1.0)
    assert report.kept == "learned"
    assert report.error_learned < 0.6 * report.error_before
    assert block_error(quantized, calls(fresh), Captured([model(fresh)]), squared_error, 16) < 0.8 * fresh_before


def test_the_report_holds_the_errors_over_all_images() -> None:
    _, quantized, inputs, targets = block()
    before = float((quantized(inputs) - targets).square().sum(1).mean())
    report = learn(quantized, inputs, targets, batch_size=20)  # 48 images: the last batch is smaller
    after = float((quantized(inputs) - targets).square().sum(1).mean())
    assert report.name == "a block"
    assert report.error_before == pytest.approx(before, rel=1e-5)
    assert report.error_learned == pytest.approx(after, rel=1e-5)
    assert report.error_learned <= report.error_before


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("settings", [{}, {"n_bits": 4}, {"rrweight": 0.0}, {"warmup": 1.0}, {"iters": 1}])
def test_every_weight_ends_on_a_neighbour_and_the_block_is_no_worse(seed: int, settings: dict[str, Any]) -> None:
    _, quantized, inputs, targets = block(seed, **settings)
    before = block_error(quantized, calls(inputs), Captured([targets]), squared_error, 16)
    learn(quantized, inputs, targets, **settings)
    assert block_error(quantized, calls(inputs), Captured([targets]), squared_error, 16) <= before
    for layer in quantized_layers(quantized).values():
        assert layer.codes is not None and layer.levels is not None and layer.soft is None
        above = layer.codes.flatten(1).int() - lower_neighbour(layer.rows, layer.codebook).int()
        assert set(above.unique().tolist()) <= {0, 1}
        assert torch.equal(layer.weight.flatten(1), layer.levels.gather(1, layer.codes.flatten(1).long()).float())


def test_some_roundings_move_both_ways() -> None:
    _, quantized, inputs, targets = block()
    plain = codes_of(quantized).int()
    learn(quantized, inputs, targets)
    n_changed_codes = codes_of(quantized).int() - plain
    assert int((n_changed_codes == 1).sum()) > 3 and int((n_changed_codes == -1).sum()) > 3


def test_only_alpha_learns() -> None:
    """No other parameter of the block gets a gradient or changes a bit, nor do inputs and targets."""
    model, quantized, inputs, targets = block()
    kept = {name: t.clone() for name, t in model.state_dict().items()}
    given = inputs.clone(), targets.clone()
    seen: list[dict[str, bool]] = []

    def look(step: int, loss: float) -> None:
        seen.append({name: p.grad is not None and bool(p.grad.any()) for name, p in quantized.named_parameters()})

    learn(quantized, inputs, targets, progress=look, iters=5)
    assert len(seen) == 5
    others = {f"conv{i}.{name}" for i in (1, 2) for name in ("quantized_weight.float_weight", "bias")}
    for gradients in seen:
        learning = {name for name, has in gradients.items() if has}
        assert learning == {f"conv{i}.quantized_weight.soft.alpha" for i in (1, 2)} and others < set(gradients)
    for network in (model, quantized):
        assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(t, kept[name]) for name, t in model.state_dict().items())
    assert torch.equal(inputs, given[0]) and torch.equal(targets, given[1])
    assert hooks_of(quantized) == 0


def test_equal_seeds_give_equal_codes_and_others_do_not() -> None:
    learned = []
    for seed in (0, 0, 1):
        _, quantized, inputs, targets = block()
        torch.manual_seed(len(learned))  # the global generator is not to matter
        report = learn(quantized, inputs, targets, seed=seed)
        learned.append((codes_of(quantized), report))
    assert torch.equal(learned[0][0], learned[1][0])
    assert learned[0][1] == learned[1][1]
    assert not torch.equal(learned[0][0], learned[2][0])


def test_where_learning_ends_worse_plain_rounding_stays() -> None:
    """The target is what plain rounding gives: nothing can be better."""
    _, quantized, inputs, _ = block()
    plain = codes_of(quantized)
    report = learn(quantized, inputs, quantized(inputs).clone(), rrweight=1e4)
    assert report.kept == "before"
    assert report.error_before < 1e-10 < report.error_learned
    assert torch.equal(codes_of(quantized), plain)
    for layer in quantized_layers(quantized).values():
        assert torch.equal(layer.codes.flatten(1), nearest(layer.rows, layer.codebook))  # type: ignore[union-attr]
        assert torch.equal(layer.weight.flatten(1), layer.levels.gather(1, layer.codes.flatten(1).long()).float())  # type: ignore[union-attr]


def test_images_held_out_decide() -> None:
    """On those learned from the error falls; others, whose targets the old codes meet exactly, have it grow."""
    _, quantized, inputs, targets = block()
    before, others = codes_of(quantized), smooth_images(8, 6, 6, 7).relu().float()
    judge = calls(others), Captured([quantized(others)])
    report = learn(quantized, inputs, targets, judge=judge)
    assert report.kept == "before" and report.error_before == 0 < report.error_learned
    assert torch.equal(codes_of(quantized), before)
    settings = {"lr": 0.5, "rrweight": 10.0, "iters": 20}
    worse, better = (block()[1] for _ in range(2))
    wrong = torch.flip(targets, [1])  # nothing to gain for the images judged by, which learning makes worse
    assert learn(worse, inputs, wrong, **settings).kept == "learned"
    assert learn(better, inputs, wrong, judge=(calls(inputs), Captured([targets])), **settings).kept == "before"


def held_out(model: nn.Module) -> tuple[Captured, Captured]:
    others = smooth_images(32, 6, 6, 7).relu().float()
    return calls(others), Captured([model(others)])


def error_on(quantized: nn.Module, judge: tuple[Captured, Captured]) -> float:
    return float(squared_error(judge[0][:].on(quantized), judge[1][:]))


def test_what_stands_is_the_best_that_was_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    """Learning towards other targets: on images held out the error first falls and then grows."""
    found = []
    for looks in (1, 12):
        monkeypatch.setattr(reconstruct, "LOOKS", looks)
        model, quantized, inputs, targets = block()
        judge = held_out(model)
        report = learn(quantized, inputs, targets + 0.2 * targets.roll(1, 1), judge=judge, rrweight=0.01, lr=0.2)
        stands = report.error_learned if report.kept == "learned" else report.error_before
        assert error_on(quantized, judge) == pytest.approx(stands, rel=1e-6)
        found.append(stands)
    assert report.kept == "learned" and found[1] < 0.99 * found[0]


def test_biases_are_learned_where_images_are_held_out() -> None:
    """Biases that are wrong get better with a judge; without one they stay as they are."""
    errors = []
    for judged in (True, False):
        model, quantized, inputs, targets = block()
        judge, kept = held_out(model), {name: value.clone() for name, value in model.state_dict().items()}
        wrong = {}
        for name, layer in quantized_layers(quantized).items():
            assert layer.bias is not None
            layer.set_bias(layer.bias + 0.2)
            wrong[name] = layer.bias
        given = {name: bias.clone() for name, bias in wrong.items()}
        learn(quantized, inputs, targets, iters=200, **({"judge": judge} if judged else {}))
        for name, layer in quantized_layers(quantized).items():
            assert layer.bias is not None and not layer.bias.requires_grad and layer.bias.grad is None
            assert torch.equal(layer.bias, given[name]) != judged and torch.equal(wrong[name], given[name])
        assert all(torch.equal(value, kept[name]) for name, value in model.state_dict().items())
        errors.append(error_on(quantized, judge))
    assert errors[0] < 0.85 * errors[1]


def test_an_activation_in_place_at_the_start_leaves_the_inputs_alone() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(5, 4).requires_grad_(False)
    quantized: nn.Module = nn.Sequential(nn.Hardswish(inplace=True), layer)
    replace_layers(quantized, {"1": 3}, channel_wise=True)
    inner = quantized_layers(quantized)["1"]
    inner.set_codebook(choose_codebook(inner.rows, config().grid, 3))
    inputs = torch.randn(32, 5)
    before = inputs.clone()
    learn(quantized, inputs, layer(torch.nn.functional.hardswish(inputs)), iters=3)
    assert torch.equal(inputs, before)


# ---------------------------------------------------------------- schedules


def test_the_penalty_starts_after_the_warmup_and_its_exponent_falls_linearly() -> None:
    settings = QuantConfig(iters=101, warmup=0.2, b_start=20, b_end=2)
    betas = [penalty_exponent(step, settings) for step in range(101)]
    assert betas[:21] == [None] * 21  # 20.2 steps are no penalty
    with_penalty = [b for b in betas if b is not None]
    assert len(with_penalty) == 80
    assert with_penalty[0] == pytest.approx(20, abs=0.3) and with_penalty[-1] == 2
    steps = [b - a for a, b in zip(with_penalty, with_penalty[1:], strict=False)]
    assert max(steps) == pytest.approx(min(steps), rel=1e-9) and max(steps) < 0
    even = QuantConfig(iters=11, warmup=0.0, b_start=12, b_end=2)
    assert [penalty_exponent(step, even) for step in range(11)] == pytest.approx(list(range(12, 1, -1)))


@pytest.mark.parametrize("settings", [{"rrweight": 0.0}, {"warmup": 1.0}])
def test_no_penalty_at_all(settings: dict[str, Any]) -> None:
    assert {penalty_exponent(step, QuantConfig(iters=50, **settings)) for step in range(50)} == {None}


@pytest.mark.parametrize("iters", [1, 2])
def test_schedules_of_few_steps(iters: int) -> None:
    settings = QuantConfig(iters=iters, warmup=0.0)
    assert penalty_exponent(0, settings) == 20
    assert learning_rate(0, settings) == settings.lr


def test_the_learning_rate_falls_along_a_cosine_to_three_tenths() -> None:
    settings = QuantConfig(iters=1000, lr=0.01)
    assert learning_rate(0, settings) == pytest.approx(0.01)
    assert learning_rate(500, settings) == pytest.approx(0.0065)
    assert learning_rate(250, settings) == pytest.approx(0.003 + 0.007 * (1 + math.sqrt(0.5)) / 2)
    assert learning_rate(1000, settings) == pytest.approx(0.003)


def test_learning_follows_its_schedules(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    betas: list[float | None] = []
    step, update_soft_weight = torch.optim.Adam.step, QuantizedWeight.update_soft_weight

    def watched_step(self: torch.optim.Adam, closure: Any = None) -> Any:
        rates.append(self.param_groups[0]["lr"])
        return step(self, closure)

    def watched_soften(self: QuantizedWeight, beta: float | None) -> Tensor:
        betas.append(beta)
        return update_soft_weight(self, beta)

    monkeypatch.setattr(torch.optim.Adam, "step", watched_step)
    monkeypatch.setattr(QuantizedWeight, "update_soft_weight", watched_soften)
    _, quantized, inputs, targets = block()
    learn(quantized, inputs, targets, iters=10)
    assert rates == [learning_rate(s, config(iters=10)) for s in range(10)]
    assert betas[::2] == betas[1::2] == [penalty_exponent(s, config(iters=10)) for s in range(10)]


def test_the_penalty_drives_weights_to_their_levels() -> None:
    """With next to no weight on it many stay between two levels; with enough almost none."""
    undecided = []
    for rrweight in (1e-4, 1.0):
        _, quantized, inputs, targets = block()
        alphas: list[Tensor] = []
        learn(
            quantized,
            inputs,
            targets,
            iters=400,
            rrweight=rrweight,
            progress=lambda s, loss, q=quantized, a=alphas: a.append(  # type: ignore[misc]
                torch.cat([layer.soft.alpha.detach().flatten() for layer in quantized_layers(q).values()])
            ),
        )
        h = (1.2 * torch.sigmoid(alphas[-1]) - 0.1).clamp(0, 1)
        undecided.append(float(((h > 0.05) & (h < 0.95)).float().mean()))
    assert undecided[0] > 0.3
    assert undecided[1] < 0.05


# ---------------------------------------------------------------- trouble


def test_a_loss_that_is_not_finite_names_block_and_step() -> None:
    _, quantized, inputs, targets = block()
    plain = codes_of(quantized)
    targets[:] = torch.inf
    with pytest.raises(ValueError, match="block a block: the loss at step 0 is inf"):
        learn(quantized, inputs, targets)
    assert codes_of(quantized).shape == plain.shape
    assert all(layer.soft is None for layer in quantized_layers(quantized).values())


def test_a_step_that_raises_leaves_hard_codes() -> None:
    _, quantized, inputs, targets = block()

    def broken(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        learn(quantized, inputs, targets, progress=broken)
    for layer in quantized_layers(quantized).values():
        assert layer.soft is None and layer.codes is not None
        assert torch.equal(layer.weight.flatten(1), layer.levels.gather(1, layer.codes.flatten(1).long()).float())  # type: ignore[union-attr]
    assert not any("alpha" in name for name, _ in quantized.named_parameters())


def test_progress_is_told_of_about_a_hundred_steps() -> None:
    _, quantized, inputs, targets = block()
    printed: list[int] = []
    report = learn(
        quantized, inputs[:8], targets[:8], iters=350, batch_size=2, progress=lambda s, loss: printed.append(s)
    )
    assert printed[0] == 1 and printed[-1] == 350 and printed == sorted(set(printed))
    assert 90 <= len(printed) <= 130
    assert len(report.losses) == len(printed)


@pytest.mark.parametrize(("drop_prob", "taken"), [(1.0, 0), (0.0, 1)])
def test_a_mixture_of_one_kind_is_that_kind_bit_for_bit(drop_prob: float, taken: int) -> None:
    """Probability 1 feeds the quantized prefix's output, 0 the float one's."""
    model, quantized, inputs, targets = block()
    other = inputs + torch.randn(inputs.shape)
    fed: list[Tensor] = []
    handle = quantized.register_forward_pre_hook(lambda m, args: fed.append(args[0].clone()))
    learn(quantized, inputs, targets, iters=4, drop_prob=drop_prob, float_inputs=other)
    handle.remove()
    steps = fed[3:7]  # 48 images, 16 at a time, are looked at before and after learning
    order = torch.Generator().manual_seed(0)
    for step in steps:
        chosen = torch.randint(48, (16,), generator=order)
        assert torch.equal(step, (inputs, other)[taken][chosen])
    assert torch.equal(torch.cat(fed[:3]), inputs) and torch.equal(torch.cat(fed[7:]), inputs)


def test_a_mixture_draws_every_element_on_its_own() -> None:
    model, quantized, inputs, targets = block()
    fed: list[Tensor] = []
    handle = quantized.register_forward_pre_hook(lambda m, args: fed.append(args[0].clone()))
    learn(quantized, torch.zeros_like(inputs), targets, iters=8, drop_prob=0.75, float_inputs=torch.ones_like(inputs))
    handle.remove()
    steps = torch.stack(fed[3:11])
    assert set(steps.unique().tolist()) == {0.0, 1.0}
    assert float(steps.mean()) == pytest.approx(0.25, abs=0.02)
    for dim in range(steps.ndim):  # along no dimension do elements go together
        assert float(steps.std(dim).mean()) == pytest.approx((0.75 * 0.25) ** 0.5, abs=0.06)
