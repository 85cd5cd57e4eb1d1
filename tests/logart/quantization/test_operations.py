"""Linear operations seen as they are called: the rows times the weight's matrix are what the operation gives."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logart.quantization.layout import Layout
from logart.quantization.operations import Use
from logart.quantization.watching import Watch

Case = tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]  # shapes of x and weight, operation
BIAS = torch.arange(6.0, dtype=torch.float64)
CASES: dict[str, Case] = {
    "linear": ((5, 3, 4), (6, 4), lambda x, w: F.linear(x, w, BIAS)),
    "linear of a vector": ((4,), (6, 4), F.linear),
    "linear of a transposed one": ((5, 4), (4, 6), lambda x, w: F.linear(x, w.t())),
    "x @ w": ((5, 3, 4), (4, 6), lambda x, w: x @ w),
    "w @ x": ((5, 4, 3), (6, 4), lambda x, w: w @ x),
    "w @ x, a product in each group": ((5, 2, 4, 3), (2, 6, 4), lambda x, w: w @ x),
    "bmm": ((2, 5, 4), (2, 4, 6), torch.bmm),
    "mm": ((5, 4), (4, 6), torch.mm),
    "addmm": ((5, 4), (4, 6), lambda x, w: torch.addmm(BIAS, x, w)),
    "einsum": ((5, 3, 4), (4, 2, 3), lambda x, w: torch.einsum("bnd,dhk->bhnk", x, w)),
    "einsum, the weight first": ((5, 3, 4), (6, 4), lambda x, w: torch.einsum("cd,bnd->bcn", w, x)),
    "einsum, in groups": ((5, 3, 2, 4), (2, 4, 6), lambda x, w: torch.einsum("bngi,gio->bngo", x, w)),
    "einsum, over two dimensions": ((5, 3, 2, 4), (2, 4, 6), lambda x, w: torch.einsum("bnhk,hkd->bnd", x, w)),
    "conv1d": ((5, 4, 9), (6, 4, 3), lambda x, w: F.conv1d(x, w, BIAS, 2, 1)),
    "conv2d of one image": ((4, 7, 6), (6, 2, 3, 2), lambda x, w: F.conv2d(x, w, padding="same", groups=2)),
    "conv3d": ((3, 4, 3, 4, 5), (6, 4, 2, 1, 2), lambda x, w: F.conv3d(x, w, dilation=(1, 1, 2))),
    "conv_transpose1d": ((5, 4, 9), (4, 3, 3), lambda x, w: F.conv_transpose1d(x, w, BIAS, 2, 1, 1, 2)),
    "conv_transpose2d": ((5, 4, 3, 4), (4, 6, 2, 3), lambda x, w: F.conv_transpose2d(x, w, None, (3, 1), 1, (2, 0))),
}


def seen(weights: dict[str, Tensor], run: Callable[[], Tensor]) -> tuple[list[tuple[str, Use]], Tensor]:
    uses: list[tuple[str, Use]] = []
    with Watch(weights, lambda name, use: uses.append((name, use))):
        return uses, run()


@pytest.mark.parametrize("name", CASES)
def test_rows_times_the_weight_are_the_output(name: str) -> None:
    torch.manual_seed(len(name))
    of_x, of_weight, operation = CASES[name]
    x, weight = torch.randn(of_x, dtype=torch.float64), torch.randn(of_weight, dtype=torch.float64)
    uses, y = seen({"w": weight}, lambda: operation(x, weight))
    assert [who for who, _ in uses] == ["w"]
    use = uses[0][1]
    layout = Layout.of(use.weight, use.channel_dims, weight)
    assert layout is not None and torch.equal(layout.as_parameter(layout.channels_first(weight), weight.shape), weight)
    matrix = layout.channels_first(weight).flatten(1)
    assert matrix.shape == (use.channels, use.elements)
    without = use.positions_last(y - operation(torch.zeros_like(x), weight))
    rows = use.rows(use.x)
    product = (rows @ matrix.unflatten(0, (use.groups, -1)).mT).mT.flatten(0, 1)  # [C, B·positions]
    torch.testing.assert_close(product, without.transpose(0, 1).flatten(1), rtol=1e-10, atol=1e-12)
    delta = torch.randn_like(matrix)
    changed = operation(x, weight + layout.as_parameter(delta, weight.shape))
    torch.testing.assert_close(use.apply(use.x, delta), use.positions_last(changed - y), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x, w: x + w,
        lambda x, w: F.linear(x, 2 * w),
        lambda x, w: torch.addmm(BIAS[:4], x, w, alpha=2),
        lambda x, w: torch.einsum("bi,ij->j", x, w),
        lambda x, w: F.embedding(x.long().abs() % 4, w),
    ],
)
def test_what_is_no_linear_operation_with_the_weight_is_not_taken_for_one(
    operation: Callable[[Tensor, Tensor], Tensor],
) -> None:
    weight = torch.randn(4, 4, dtype=torch.float64)
    assert seen({"w": weight}, lambda: operation(torch.randn(4, 4, dtype=torch.float64), weight))[0] == []


def test_a_part_of_a_weight_is_no_whole_one_and_another_order_in_memory_is_the_same() -> None:
    weight = torch.randn(6, 4, 3, 3)
    assert Layout.of(weight[2:], 1, weight) is None
    turned = weight.to(memory_format=torch.channels_last)
    assert Layout.of(turned, 1, turned) == Layout.of(weight, 1, weight)


ATTENTIONS: dict[str, tuple[dict[str, int | bool], bool]] = {
    "self": ({}, True),
    "cross": ({}, False),
    "of other widths": ({"kdim": 6, "vdim": 4}, False),
    "without bias, one more key": ({"bias": False, "add_zero_attn": True, "add_bias_kv": True}, True),
}


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_its_projections(name: str) -> None:
    settings, alone = ATTENTIONS[name]
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=True, **settings).double()  # type: ignore[arg-type]
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    query = torch.randn(3, 5, 8, dtype=torch.float64)
    key, value = (
        (query, query)
        if alone
        else (torch.randn(3, 7, width, dtype=torch.float64) for width in (module.kdim, module.vdim))
    )
    plain = module(query, key, value)[0]
    weights = {n: p for n, p in module.named_parameters() if p.ndim == 2}
    uses, y = seen(weights, lambda: module(query, key, value)[0])
    torch.testing.assert_close(y, plain, rtol=1e-10, atol=1e-10)
    expected = {"self": ["in_proj_weight"], "cross": ["in_proj_weight"] * 3}
    separate = [f"{kind}_proj_weight" for kind in "qkv"]
    first = expected.get(name, separate if "kdim" in settings else ["in_proj_weight"])
    assert [who for who, _ in uses] == [*first, "out_proj.weight"]
    for _, use in uses:
        assert use.x.shape[0] == 3  # images come first
        torch.testing.assert_close(F.linear(use.x, use.weight, use.bias), use.y, rtol=1e-10, atol=1e-10)
