"""Where captured tensors live, the room they need, and what happens where it runs out."""

from __future__ import annotations

import os
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
from networks import hooks_of, small_resnet
from torch import nn
from torch.utils._pytree import tree_leaves

import logart.quantization.cache
import logart.quantization.rounding_methods
from logart import QuantConfig, quantize_model
from logart.errors import NetworkError, NonFiniteError
from logart.quantization.activations import Activations, BothActivations
from logart.quantization.blocks import Block, blocks_of_types
from logart.quantization.cache import Cache, CacheLocation, Captured, MemoryEstimate, OffloadedTensor
from logart.quantization.clone import clone_sharing
from logart.quantization.dataflow import trace_sources
from logart.quantization.memory import estimate_memory
from logart.quantization.surgery import quantized_layers

CPU = torch.device("cpu")
ELSEWHERE = [CacheLocation.HALF, CacheLocation.DISK]


@pytest.mark.parametrize("place", ELSEWHERE)
def test_what_was_stored_is_read(place: CacheLocation, tmp_path: Path) -> None:
    values = torch.randn(7, 3, 2)
    tree = Cache(CPU, place, tmp_path).store({"a": [values, 5]})
    expected = values.half().float() if place is CacheLocation.HALF else values
    assert isinstance(tree["a"][0], OffloadedTensor) and tree["a"][1] == 5
    captured, chosen = Captured([tree["a"][0]]), torch.tensor([5, 0, 5])
    for index in (slice(2, 6), chosen):
        read = captured[index]
        assert read.dtype == torch.float32 and torch.equal(read, expected[index])
        read.zero_()  # is a copy
        assert torch.equal(captured[index], expected[index])
    assert torch.equal(Cache(CPU).load(tree)["a"][0], expected)
    assert list(tmp_path.iterdir()) == []  # nothing is left to clean up


@pytest.mark.parametrize("place", [CacheLocation.DEVICE, *ELSEWHERE])
def test_a_part_is_what_these_images_have(place: CacheLocation, tmp_path: Path) -> None:
    cache, values = Cache(CPU, place, tmp_path), torch.randn(9, 2).half().float()
    captured = Captured([{"a": (cache.store(batch), 5)} for batch in values.split(4)])
    for first, last in ((0, 9), (0, 4), (3, 9), (8, 9), (5, 7)):
        part = captured.part(range(first, last))
        assert len(part) == last - first and part.shape == (last - first, 2)
        for index in (slice(None), torch.tensor([last - first - 1, 0])):
            read = part[index]
            assert torch.equal(read["a"][0], values[first:last][index]) and read["a"][1] == 5


@pytest.mark.parametrize("place", [CacheLocation.DEVICE, *ELSEWHERE])
def test_the_order_of_dimensions_in_memory_is_kept(place: CacheLocation, tmp_path: Path) -> None:
    """A convolution may sum in another order where it is not."""
    cache = Cache(CPU, place, tmp_path)
    for values in (torch.randn(4, 3, 5, 5).to(memory_format=torch.channels_last), torch.randn(4, 6, 2).mT):
        assert cache.load(cache.store(values)).stride() == values.stride()


def test_on_the_device_nothing_is_copied_but_parts() -> None:
    values = torch.zeros(2, 3)
    for place in (CacheLocation.DEVICE, CacheLocation.CPU):
        assert Cache(CPU, place).store(values).data_ptr() == values.data_ptr()
        assert Cache(CPU, place).store(values[:1]).untyped_storage().nbytes() == 12  # which would keep the whole


def test_integers_are_not_halved() -> None:
    stored = Cache(CPU, CacheLocation.HALF).store(torch.tensor([[70001]]))
    assert stored.load().tolist() == [[70001]]


def test_a_full_disk_is_one_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any) -> None:
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(NetworkError, match=r"of 0\.0 MiB do not fit into .* \(No space left on device\)"):
        Cache(CPU, CacheLocation.DISK, tmp_path).store(torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("free", "place"),
    [({"device": 151, "cpu": 0, "disk": 0}, "device"), ({"device": 149, "cpu": 126, "disk": 999}, "cpu"),
     ({"device": 149, "cpu": 124, "disk": 126}, "disk")],
)  # fmt: skip
def test_auto_takes_the_first_with_room_to_spare(
    free: dict[str, int], place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    room = {CacheLocation(name): count * 2**20 for name, count in free.items()}
    monkeypatch.setattr(Cache, "_free", lambda self: room)
    cache = Cache(torch.device("cuda"), None)
    printed = cache.choose(
        {"small": MemoryEstimate(5 * 2**20, 30 * 2**20), "large": MemoryEstimate(100 * 2**20, 20 * 2**20)}
    )
    assert cache.place == CacheLocation(place)
    assert printed == (
        f"captured inputs and targets are kept on {place} ({free[place]:.1f} MiB free): "
        "at most 100.0 MiB, and 20.0 MiB to work with, in block large"
    )


def test_no_room_anywhere_is_refused_but_what_was_asked_for_is_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cache, "_free", lambda self: dict.fromkeys(CacheLocation, 2**20))
    needs = {"a": MemoryEstimate(5 * 2**20, 0)}
    with pytest.raises(NetworkError, match=r"of a take 5\.0 MiB; free: device 1\.0 MiB, cpu 1\.0 MiB, disk 1\.0 MiB"):
        Cache(CPU, None).choose(needs)
    cache = Cache(CPU, CacheLocation.CPU)
    assert cache.choose(needs).endswith("at most 5.0 MiB, and 0.0 MiB to work with, in block a, too little")
    assert cache.place is CacheLocation.CPU
    printed = Cache(CPU, CacheLocation.HALF).choose({"a": MemoryEstimate(2**21 - 2, 0)})  # which halves it
    assert printed.endswith("in block a")
    assert Cache(CPU, CacheLocation.HALF).choose({"a": MemoryEstimate(2**21, 8)}).endswith("too little")


def two_convolutions() -> tuple[nn.Module, Block]:
    """Conv, ReLU, conv; of an image of 3×5×5 the tensors are 3, 8, 8 and 2 times 25 numbers."""
    module = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 2, 1))
    model = nn.Sequential(OrderedDict(block=module, last=nn.Sequential(nn.Flatten(), nn.Linear(50, 90))))
    return model.requires_grad_(False), Block("block", ("block.0", "block.2"))


NUMBERS = 25 * 4  # bytes of one channel


@pytest.mark.parametrize(
    ("settings", "captured", "working"),
    [
        ({"iters": 2}, 6 * (3 + 3 + 2) * NUMBERS, 2 * 4 * (3 + 8 + 8 + 2) * NUMBERS + 26 * (216 + 16) * 4),
        ({"rounding": "compensated"}, 6 * (3 + 3 + 2) * NUMBERS, 7 * 27**2 * 8 + 2 * 4 * (3 + 8 + 8 + 2) * NUMBERS),
        ({"rounding": "nearest", "search_method": "layer_wise"}, 5 * 8 * NUMBERS, 5 * 6 * 8 * NUMBERS),
        ({"rounding": "nearest", "search_method": "block_wise"}, 5 * 8 * NUMBERS, 5 * (2 * 32 + 6) * 8 * NUMBERS),
        ({"rounding": "nearest", "search_method": "layer_wise", "search_batch_size": 50}, 5 * 8 * NUMBERS,
         50 * 4 * 8 * NUMBERS),
        ({"rounding": "nearest"}, 0, 0),
    ],
)  # fmt: skip
def test_the_memory_of_a_block_is_a_formula(settings: dict[str, Any], captured: int, working: int) -> None:
    """As the docstrings of `memory` and of the stages state it, here with the numbers of a small block."""
    sizes = {"calib_samples": 6, "search_samples": 5, "batch_size": 4, "search_batch_size": 4}
    model, block = two_convolutions()
    needs = estimate_memory(model, [block], [frozenset()], torch.rand(2, 3, 5, 5), QuantConfig(**sizes | settings))  # type: ignore[arg-type]
    assert needs == {"block": MemoryEstimate(captured, working)}
    assert hooks_of(model) == 0


def held_bytes(activations: BothActivations) -> int:
    trees = [(of._inputs, of._outputs) for of in (activations._float, activations._quantized)]
    tensors = [leaf for leaf in tree_leaves(trees) if isinstance(leaf, torch.Tensor)]
    return sum({t.data_ptr(): t.nbytes for t in tensors}.values())


@pytest.mark.parametrize("blocks", [["ResidualBlock"], []])
@pytest.mark.parametrize("settings", [{}, {"recon_input": "mixed"}, {"rounding": "compensated"}])
def test_no_more_is_held_than_the_formula_says(
    settings: dict[str, Any], blocks: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """At any moment, of networks with and without outputs that are read again further on."""
    model, images = small_resnet(n_images=12)
    model.eval().requires_grad_(False)
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    found = blocks_of_types(model, names, blocks)
    config = QuantConfig(calib_samples=12, batch_size=1, **settings)
    sources = trace_sources(model, [model.get_submodule(block.name) for block in found], images[:2])
    needs = estimate_memory(model, found, sources, images[:2], config)
    activations = BothActivations(model, clone_sharing(model), found, sources, images, 1, Cache(CPU))
    most, store = [0], Cache.store

    def watched(self: Cache, tree: Any) -> Any:
        most.append(held_bytes(activations))
        return store(self, tree)

    monkeypatch.setattr(Cache, "store", watched)
    (stage,) = [stage for stage in config.method.stages if stage.event == "rounded"]
    for index, block in enumerate(found):
        activations.capture(index, stage.needs(config))
        assert max(most) <= max(needs[before.name].captured for before in found[: index + 1]), block
    assert max(most) > 0.5 * max(need.captured for need in needs.values())


CONFIGS = {
    "LW": {"search_method": "layer_wise", "search_samples": 6, "rounding": "nearest"},
    "BW": {"search_method": "block_wise", "search_samples": 6, "rounding": "nearest"},
    "compensated": {"rounding": "compensated", "calib_samples": 6},
    "LLR, mixed": {"calib_samples": 6, "iters": 5, "batch_size": 3, "lr": 0.1, "recon_input": "mixed"},
    "both, perturbed": {"rounding": "both", "calib_samples": 6, "iters": 5, "recon_metric": "hessian_perturb"},
}


def codes_of(config: dict[str, Any], cache: Cache, **arguments: Any) -> list[list[int]]:
    model, images = small_resnet(n_images=6)
    quantized, report = quantize_model(
        model, QuantConfig(n_bits=3, **config), images, block_types=("ResidualBlock",), cache=cache, **arguments
    )
    codes = [layer.codes.flatten().tolist() for layer in quantized_layers(quantized).values()]  # type: ignore[union-attr]
    return codes + [[float(loss) for loss in module.losses] for module in report.blocks]  # type: ignore[misc]


@pytest.mark.parametrize("name", CONFIGS)
def test_the_disk_gives_the_codes_of_the_device(name: str, tmp_path: Path) -> None:
    expected = codes_of(CONFIGS[name], Cache(CPU))
    assert codes_of(CONFIGS[name], Cache(CPU, CacheLocation.DISK, tmp_path)) == expected


@pytest.mark.parametrize("name", CONFIGS)
def test_a_gpu_that_runs_out_falls_back_a_step(
    name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    """In the middle of a block, when its layers hold something new already: it begins the block again."""
    expected = codes_of(CONFIGS[name], Cache(CPU))
    where = {"LW": "search_block", "BW": "search_block", "compensated": "compensate_block"}.get(name, "learn_rounding")
    original, cache, seen = (
        getattr(logart.quantization.rounding_methods, where),
        Cache(CPU, CacheLocation.DEVICE, tmp_path),
        [],
    )

    def running_out(*args: Any, **kwargs: Any) -> Any:
        result = original(*args, **kwargs)
        seen.append(cache.place)
        if len(seen) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return result

    monkeypatch.setattr(logart.quantization.rounding_methods, where, running_out)
    assert codes_of(CONFIGS[name], cache) == expected
    assert seen[:4] == [CacheLocation.DEVICE, CacheLocation.DEVICE, CacheLocation.CPU, CacheLocation.CPU]
    assert "out of memory on cpu: captured tensors go from device to cpu" in capsys.readouterr().err


@pytest.mark.parametrize("place", [CacheLocation.CPU, CacheLocation.HALF, CacheLocation.DISK])
def test_out_of_memory_that_holds_no_captured_tensors_is_one_error(
    place: CacheLocation, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def running_out(*args: Any) -> None:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory.\nTried")

    monkeypatch.setattr(logart.quantization.rounding_methods, "compensate_block", running_out)
    with pytest.raises(NetworkError, match="out of memory on cpu"):
        codes_of(CONFIGS["compensated"], Cache(CPU, place, tmp_path))


def test_what_torch_holds_in_reserve_on_a_gpu_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (3 * 2**20, 8 * 2**20))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 4 * 2**20)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**20)
    printed = Cache(torch.device("cuda"), CacheLocation.DEVICE).choose({"a": MemoryEstimate(0, 0)})
    assert "kept on device (6.0 MiB free)" in printed


class Divides(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x / x.flatten(1).abs().sum(1)[:, None, None, None]


def test_an_image_that_gives_nan_is_named_with_its_block() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), Divides(), nn.Conv2d(2, 2, 1), nn.Flatten()).eval()
    images = torch.rand(9, 1, 2, 2) + 0.1
    images[5] = 0
    for settings in ({"rounding": "compensated"}, {"iters": 2}, {"rounding": "nearest", "search_method": "layer_wise"}):
        config = QuantConfig(calib_samples=9, search_samples=9, batch_size=4, **settings)  # type: ignore[arg-type]
        with pytest.raises(NonFiniteError, match="block 2: the activations of calibration image 5 are not finite") as e:
            quantize_model(model, config, images)
        assert e.value.image == 5


def test_what_half_precision_cannot_hold_is_named() -> None:
    model, x = nn.Sequential(nn.Identity(), nn.Identity()), torch.ones(3, 2)
    x[1, 0] = 1e5
    blocks, sources = [Block("0", ()), Block("1", ())], [frozenset[int](), frozenset([0])]
    activations = Activations(model, blocks, sources, x, 2, Cache(CPU, CacheLocation.HALF))
    with pytest.raises(NonFiniteError, match="block 0: .* image 1 are too large for half precision; expected another"):
        activations.inputs(0)


def test_a_forward_that_raises_leaves_nothing_behind() -> None:
    class Breaks(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ValueError("no further")

    model = nn.Sequential(nn.Sequential(nn.Conv2d(3, 2, 1), Breaks()))
    with pytest.raises(ValueError, match="no further"):
        config = QuantConfig(rounding="compensated")
        estimate_memory(model, [Block("0", ("0.0",))], [frozenset()], torch.rand(2, 3, 5, 5), config)
    assert torch.utils._python_dispatch._get_current_dispatch_mode() is None
