"""Activations handed forward: the same as in a forward of the network, each block run once, nothing held for longer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import hooks_of, small_resnet, small_vit
from torch import Tensor, nn
from torch.nn import functional as F

from logart import QuantConfig, quantize_model
from logart.errors import NetworkError
from logart.quantization.activations import Activations, BothActivations, Capture
from logart.quantization.blocks import Block
from logart.quantization.cache import Cache, CacheLocation, Captured
from logart.quantization.clone import clone_sharing
from logart.quantization.dataflow import trace_sources

CPU = Cache(torch.device("cpu"))


class Net(nn.Module):
    """Convolutions c0, c1, … of three channels, put together by a function."""

    def __init__(self, count: int, forward: Callable[["Net", Tensor], Tensor]) -> None:
        super().__init__()
        torch.manual_seed(count)
        for i in range(count):
            setattr(self, f"c{i}", nn.Conv2d(3, 3, 3, padding=1))
        self.function = forward
        self.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def dense(m: Any, x: Tensor) -> Tensor:
    """Every layer reads the outputs of all before it."""
    outputs = [x]
    for i in range(4):
        outputs.append(m.get_submodule(f"c{i}")(torch.stack(outputs).sum(0)))
    return torch.cat(outputs, 1)


def unet(m: Any, x: Tensor) -> Tensor:
    top = m.c0(x).relu()
    low = m.c1(F.max_pool2d(top, 2)).relu_()
    lowest = m.c2(F.max_pool2d(low, 2))
    low = m.c3(F.interpolate(lowest, scale_factor=2) + low)
    return m.c4(F.interpolate(low, scale_factor=2) * top)


def written_into(m: Any, x: Tensor) -> Tensor:
    """Outputs that are written into other memory, through views."""
    room = torch.zeros(len(x), 2, 3, *x.shape[2:])
    room[:, 0] = m.c0(x)
    room[:, 1].copy_(m.c1(x))
    room.select(1, 1).mul_(2.0)
    return m.c3(m.c2(room.sum(1)) + room[:, 0])


def gated(m: Any, x: Tensor) -> Tensor:
    """Squeeze and excitation, with attributes of a block asked for."""
    y = m.c0(x)
    gate = m.c1(y.mean((2, 3), keepdim=True).expand(-1, m.c1.in_channels, 3, 3)).sigmoid()
    return m.c2(y * gate[:, :, :1, :1]) if isinstance(m.c2, nn.Conv2d) else y


def in_place(m: Any, x: Tensor) -> Tensor:
    """A residual that is added in place to an output that is read again."""
    y = m.c0(x.sub_(0.5))
    z = m.c1(y.relu())
    y += z
    return m.c2(F.relu_(y))


NETWORKS: dict[str, tuple[int, Any, list[set[int]]]] = {
    "chain": (3, lambda m, x: m.c2(m.c1(m.c0(x).relu()).relu_()), [set(), {0}, {1}]),
    "residual": (3, lambda m, x: m.c2(m.c1(m.c0(x).relu()) + m.c0.bias[:, None, None] + x), [set(), {0}, {1}]),
    "skip": (4, lambda m, x: (y := m.c0(x), m.c3(m.c2(m.c1(y)) + y))[1], [set(), {0}, {1}, {0, 2}]),
    "dense": (4, dense, [set(), {0}, {0, 1}, {0, 1, 2}]),
    "U-Net": (5, unet, [set(), {0}, {1}, {1, 2}, {0, 3}]),
    "written into": (4, written_into, [set(), set(), {0, 1}, {0, 1, 2}]),
    "gated": (3, gated, [set(), {0}, {0, 1}]),
    "in place": (3, in_place, [set(), {0}, {0, 1}]),
    "branches": (3, lambda m, x: m.c2(m.c0(x).amax(1, keepdim=True) - m.c1(x)), [set(), set(), {0, 1}]),
}


def blocks_of(model: nn.Module, names: list[str] | None = None) -> list[Block]:
    names = names or [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    return [Block(name, (name,)) for name in names]


def seen_in_a_forward(model: nn.Module, names: list[str], batches: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Of each module its inputs and outputs, by hooks in whole forwards."""
    seen: dict[str, list[tuple[Tensor, Tensor]]] = {name: [] for name in names}
    handles, entered = [], {}
    for name in names:
        module = model.get_submodule(name)
        handles += [
            module.register_forward_pre_hook(lambda m, args: entered.update({m: args[0].clone()})),
            module.register_forward_hook(lambda m, args, y, n=name: seen[n].append((entered[m], y.clone()))),
        ]
    for batch in batches:
        model(batch.clone())
    for handle in handles:
        handle.remove()
    return [tuple(map(torch.cat, zip(*of, strict=True))) for of in seen.values()]  # type: ignore[misc]


def made(model: nn.Module, blocks: list[Block], images: Tensor, **settings: Any) -> tuple[Activations, list[Any]]:
    sources = trace_sources(model, [model.get_submodule(block.name) for block in blocks], images[:2])
    arguments = {"batch_size": 3, "cache": CPU} | settings
    return Activations(model, blocks, sources, images, **arguments), sources


@pytest.mark.parametrize("place", [CacheLocation.DEVICE, CacheLocation.DISK])
@pytest.mark.parametrize("name", NETWORKS)
def test_inputs_and_outputs_are_those_of_a_forward_bit_for_bit(name: str, place: CacheLocation, tmp_path: Path) -> None:
    count, forward, expected_sources = NETWORKS[name]
    model, images = Net(count, forward), torch.randn(8, 3, 8, 8)
    before, blocks = images.clone(), blocks_of(model)
    expected = seen_in_a_forward(model, [block.name for block in blocks], list(images.split(3)))
    cache = Cache(torch.device("cpu"), place, tmp_path)
    activations, sources = made(model, blocks, images, cache=cache)
    assert sources == expected_sources
    for index, (inputs, outputs) in enumerate(expected):
        if index == 1:
            continue  # what nobody asks for is passed on the way
        assert torch.equal(activations.inputs(index)[:].args[0], inputs)
        assert torch.equal(activations.outputs(index, keep_inputs=bool(index % 2))[:], outputs)
    assert torch.equal(images, before) and hooks_of(model) == 0
    assert {type(model.get_submodule(block.name)) for block in blocks} == {nn.Conv2d}


@pytest.mark.parametrize("name", ["resnet", "vit", "vit by layers"])
def test_so_in_the_networks_of_both_tracks(name: str) -> None:
    model, images = small_resnet(n_images=7) if name == "resnet" else small_vit(n_images=7)
    model.requires_grad_(False)
    names = {
        "resnet": ["stem", "blocks.0", "blocks.1", "head"],
        "vit": ["patch_embed.proj", "blocks.0", "blocks.1", "head"],
        "vit by layers": None,
    }[name]
    blocks = blocks_of(model, names)
    expected = seen_in_a_forward(model, [block.name for block in blocks], list(images.split(3)))
    activations, sources = made(model, blocks, images)
    assert None not in sources
    for index, (inputs, outputs) in enumerate(expected):
        assert torch.equal(activations.inputs(index)[:].args[0], inputs)
        assert torch.equal(activations.outputs(index, keep_inputs=False)[:], outputs)


def held_numbers(activations: Activations) -> int:
    trees = [*activations._inputs, *activations._outputs]
    return sum(leaf.numel() for leaf in torch.utils._pytree.tree_leaves(trees) if isinstance(leaf, Tensor))


@pytest.mark.parametrize(("name", "most"), [("chain", [1, 1, 1]), ("skip", [1, 2, 2, 1]), ("dense", [1, 2, 3, 1])])
def test_outputs_are_held_for_as_long_as_they_are_needed(name: str, most: list[int]) -> None:
    """In tensors of a block: its inputs, and the outputs of earlier blocks that later ones read."""
    count, forward, _ = NETWORKS[name]
    model, images = Net(count, forward), torch.randn(6, 3, 4, 4)
    activations, _ = made(model, blocks_of(model), images)
    found = []
    for index in range(count):
        activations.inputs(index)
        found.append(held_numbers(activations) // images.numel())
    assert found == most


@pytest.mark.parametrize(("met", "times"), [(False, 7), (True, 28)])
def test_what_lies_between_blocks_is_computed_once_unless_it_meets_other_values(met: bool, times: int) -> None:
    """Eight layers in a row: what is between two of them runs for every later one, but computes for the next alone."""
    computed: list[Tensor] = []

    def between(m: Any, y: Tensor) -> Tensor:
        computed.extend([] if y.is_meta else [y])
        return (y + m.c0.bias[:, None, None] if met else y).relu()

    def chain(m: Any, x: Tensor) -> Tensor:
        for i in range(7):
            x = between(m, m.get_submodule(f"c{i}")(x))
        return m.c7(x)  # type: ignore[no-any-return]

    model, images = Net(8, chain), torch.randn(3, 3, 8, 8)
    blocks = blocks_of(model)
    expected = seen_in_a_forward(model, [block.name for block in blocks], [images])
    activations, _ = made(model, blocks, images)
    computed.clear()
    for index, (inputs, _) in enumerate(expected):
        assert torch.equal(activations.inputs(index)[:].args[0], inputs)
    # Where values meet, the first try ends there: before c2, for the outputs of c0, nothing has been computed.
    assert len(computed) == times


def test_outputs_that_are_let_go_of_share_no_memory() -> None:
    """What a block gave is added in place to another layout of what an earlier one gave, as Twins does."""

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.c0(x)
        y = m.c1(x.transpose(2, 3))
        y += x.transpose(2, 3)
        return m.c3(m.c2(y + m.c3.bias[:, None, None]))  # type: ignore[no-any-return]

    model, images = Net(4, forward), torch.randn(3, 3, 4, 4)
    blocks = blocks_of(model)
    expected = seen_in_a_forward(model, [block.name for block in blocks], [images])
    activations, _ = made(model, blocks, images)
    for index, (inputs, _) in enumerate(expected):
        assert torch.equal(activations.inputs(index)[:].args[0], inputs)


class Counting(nn.Sequential):
    """A block that counts its forwards, over all copies of it, and the images in them."""

    images: dict[int, int] = {}

    def __init__(self, index: int, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.index = index

    def forward(self, x: Tensor) -> Tensor:
        Counting.images[self.index] = Counting.images.get(self.index, 0) + len(x)
        return x + super().forward(x)  # type: ignore[no-any-return]


def deep(track: str, depth: int) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    if track == "cnn":
        blocks = [Counting(i, nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 3, 1)) for i in range(depth)]
        return nn.Sequential(nn.Conv2d(3, 3, 1), *blocks, nn.Flatten(), nn.Linear(12, 5)), torch.randn(6, 3, 2, 2)
    blocks = [Counting(i, nn.LayerNorm(6), nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 6)) for i in range(depth)]
    return nn.Sequential(nn.Flatten(2), nn.Linear(4, 6), *blocks, nn.Flatten(), nn.Linear(18, 5)), torch.randn(
        6, 3, 2, 2
    )


WAYS: dict[str, dict[str, Any]] = {
    "compensated": {"rounding": "compensated"},
    "LLR": {"iters": 2},
    "LW, then LLR": {"iters": 2, "search_method": "layer_wise"},
    "BW": {"rounding": "nearest", "search_method": "block_wise"},
    "both, mixed": {"rounding": "both", "iters": 2, "recon_input": "mixed"},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("track", ["cnn", "vit"])
def test_a_block_runs_over_the_images_equally_often_whatever_the_depth(track: str, way: str) -> None:
    runs = {}
    for depth in (4, 8, 16):
        model, images = deep(track, depth)
        Counting.images = {}
        config = QuantConfig(
            n_bits=3, calib_samples=6, search_samples=6, batch_size=3, search_batch_size=3, **WAYS[way]
        )
        _, report = quantize_model(model, config, images, block_types=["Counting"])
        assert report.rerun == []
        most = max(Counting.images.values())
        assert set(Counting.images) == set(range(depth))
        runs[depth] = most
    assert runs[4] == runs[8] == runs[16] <= 25 * len(images)


class Remembers(nn.Module):
    """Gives the network more than its output."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.kept = nn.Linear(4, 4), torch.zeros(())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.layer(x)
        self.kept = 2 * y
        return y


class Remembering(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.third, self.last = Remembers(), Remembers(), Remembers(), nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.first(x))
        return self.last(self.third(x + self.first.kept))  # type: ignore[no-any-return]


def test_a_block_that_does_more_than_give_its_output_is_run_again_and_the_report_says_so() -> None:
    model, images = Remembering().requires_grad_(False), torch.randn(8, 4)
    config = QuantConfig(n_bits=3, rounding="compensated", calib_samples=8, batch_size=4)
    quantized, report = quantize_model(model, config, images, block_types=["Remembers"])
    assert report.rerun == ["third", "last"]
    blocks = blocks_of(model, ["first", "second", "third", "last"])
    activations, sources = made(model, blocks, images)
    assert sources == [set(), {0}, None, None]
    expected = seen_in_a_forward(model, [block.name for block in blocks], list(images.split(3)))
    for index, (inputs, outputs) in enumerate(expected):
        assert torch.equal(activations.inputs(index)[:].args[0], inputs)
        assert torch.equal(activations.outputs(index, keep_inputs=False)[:], outputs)


class Mutating(nn.Module):
    """Begins with an operation in place on what the network reads again."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x.mul_(0.5))  # type: ignore[no-any-return]


def test_an_input_that_a_block_changes_for_others_is_seen() -> None:
    torch.manual_seed(0)
    model = Net(0, lambda m, x: (y := m.one(x), m.three(m.two(y) + y))[1])  # type: ignore[attr-defined, operator]
    model.one, model.two, model.three = nn.Linear(4, 4), Mutating(), nn.Linear(4, 4)
    model.requires_grad_(False)
    images, blocks = torch.randn(6, 4), blocks_of(model, ["one", "two", "three"])
    expected = seen_in_a_forward(model, [block.name for block in blocks], list(images.split(3)))
    activations, sources = made(model, blocks, images)
    assert sources == [set(), {0}, None]
    for index, (inputs, outputs) in enumerate(expected):
        assert torch.equal(activations.inputs(index)[:].args[0], inputs)
        assert torch.equal(activations.outputs(index, keep_inputs=True)[:], outputs)
        assert torch.equal(activations.inputs(index)[:].args[0], inputs)


def test_blocks_may_give_several_tensors_to_one_another_s_surroundings() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Any]:
            return {"a": self.layer(x), "b": [x, 3]}

    torch.manual_seed(0)
    model = Net(0, lambda m, x: (y := m.one(x), m.two(y["a"] * y["b"][1] + y["b"][0]))[1])  # type: ignore[attr-defined, operator]
    model.one, model.two = Two(), nn.Linear(4, 2)
    model.requires_grad_(False)
    images = torch.randn(6, 4)
    activations, _ = made(model, blocks_of(model, ["one", "two"]), images)
    assert torch.equal(
        activations.inputs(1)[:].args[0], torch.cat([3 * model.one.layer(x) + x for x in images.split(3)])
    )  # type: ignore[operator, union-attr]
    activations, _ = made(model, blocks_of(model, ["one", "two"]), images)
    with pytest.raises(NetworkError, match="Two gave a dict; what is reconstructed must give one tensor"):
        activations.outputs(0, keep_inputs=False)


class Table(nn.Module):
    """Its inner module runs on something that is no batch, or on windows of one."""

    def __init__(self, windows: int) -> None:
        super().__init__()
        self.windows, self.inner = windows, nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x.repeat(self.windows, 1) if self.windows else torch.ones(1, 4)).sum() + x


@pytest.mark.parametrize(("windows", "rows"), [(0, 1), (4, 12)])
def test_rows_that_are_not_the_images_are_refused(windows: int, rows: int) -> None:
    model = Table(windows).requires_grad_(False)
    activations, _ = made(model, blocks_of(model), torch.randn(6, 4))
    with pytest.raises(NetworkError, match=f"block inner has {rows} rows for 3 images; expected a row for each"):
        activations.inputs(0)


@pytest.mark.parametrize("needs", [{Capture.TARGETS}, {Capture.INPUTS, Capture.FLOAT_INPUTS}, set(Capture)])
def test_what_is_captured_of_both_networks(needs: set[Capture]) -> None:
    model, images = Net(*NETWORKS["skip"][:2]), torch.randn(6, 3, 4, 4)
    other = clone_sharing(model)
    for parameter in other.parameters():
        parameter.data = parameter * 1.1
    blocks, batches = blocks_of(model), list(images.split(3))
    names = [block.name for block in blocks]
    expected = [seen_in_a_forward(network, names, batches) for network in (model, other)]
    sources = trace_sources(model, [model.get_submodule(name) for name in names], images[:2])
    both = BothActivations(model, other, blocks, sources, images, 3, CPU)
    for index in range(len(blocks)):
        captured = both.capture(index, needs)
        assert set(captured) == needs
        for what, of, part in ((Capture.FLOAT_INPUTS, 0, 0), (Capture.TARGETS, 0, 1), (Capture.INPUTS, 1, 0)):
            if what in needs:
                found = captured[what][:]
                assert torch.equal(found.args[0] if part == 0 else found, expected[of][index][part])


def test_captured_batches_are_read_like_one_tensor() -> None:
    batches = list(torch.randn(8, 3, 2).split(3))
    whole, captured = torch.cat(batches), Captured(batches)
    assert len(captured) == 8 and captured.shape == whole.shape and captured.device == whole.device
    for index in (slice(0, 3), slice(2, 7), slice(None), slice(7, 99)):
        assert torch.equal(captured[index], whole[index])
    chosen = torch.tensor([7, 0, 0, 4])
    assert torch.equal(captured[chosen], whole[chosen])
    turned = Captured([batch.transpose(1, 2) for batch in batches])
    assert turned[:3].is_contiguous() and torch.equal(turned[:3], whole[:3].transpose(1, 2))
