"""timm's networks: weights in old layouts, image sizes, and errors that name the right flag."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor, nn

from logart.errors import UserError
from logart.networks.data import Preprocessing
from logart.networks.network import check_counts, override, unknown_network
from logart.networks.timm_network import plan_timm
from logart.networks.weights import file_sha256, state_sha256

VIT: dict[str, Any] = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5}
SWIN: dict[str, Any] = {
    "window_size": 4,
    "embed_dim": 8,
    "depths": (2, 2),
    "num_heads": (1, 2),
    "num_classes": 5,
}
VIT_NAME, SWIN_NAME = "vit_tiny_patch16_224", "swin_tiny_patch4_window7_224"
P = Preprocessing((3, 32, 32), 0.9, "bicubic", (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
UNCHANGED = (None, None, None, None, None)


def state_of(name: str, **kwargs: Any) -> dict[str, Tensor]:
    """Random weights, of which no two tensors are the same."""
    state = timm.create_model(name, **kwargs).state_dict()
    generator = torch.Generator().manual_seed(3)
    return {
        key: torch.randn(value.shape, generator=generator) if value.is_floating_point() else value
        for key, value in state.items()
    }


def old_swin(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """As Swin's authors published it: merging at a stage's end, the head without a part, buffers stored."""
    old = {}
    for key, value in state.items():
        key = re.sub(r"^layers\.(\d+)\.downsample", lambda m: f"layers.{int(m[1]) - 1}.downsample", key)
        old[key.replace("head.fc.", "head.")] = value
    old["layers.0.blocks.1.attn_mask"] = torch.zeros(4, 16, 16)
    old["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.long)
    return old


def load(folder: Path, state: dict[str, Tensor] | None, name: str, kwargs: dict[str, Any], **more: Any) -> Any:
    path = folder / "weights.pth"
    if state is not None:
        torch.save(state, path)
    checkpoint = None if state is None else path
    weights = None if checkpoint is None else nullcontext(checkpoint)
    return plan_timm("mine", name, weights, flag="--net", model_kwargs=kwargs, **more).load()


def fails(message: str, *args: Any, **kwargs: Any) -> None:
    with pytest.raises(UserError) as caught:
        load(*args, **kwargs)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


def assert_holds(model: nn.Module, state: dict[str, Tensor]) -> None:
    seen = model.state_dict()
    assert seen.keys() == state.keys()
    assert [key for key in state if not torch.equal(seen[key], state[key])] == []


def test_a_file_in_timms_own_layout(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=32, **VIT)
    loaded = load(tmp_path, state, VIT_NAME, {"img_size": 32, **VIT})
    assert_holds(loaded.model, state)
    assert (loaded.arch, loaded.source, loaded.num_classes) == ("mine", "weights.pth", 5)
    assert loaded.sha256 == file_sha256(tmp_path / "weights.pth")
    assert loaded.row_groups == {}


# Old layouts


@pytest.mark.parametrize("wrapper", [None, "model"])
def test_an_old_swin_file_is_converted(tmp_path: Path, wrapper: str | None) -> None:
    state = state_of(SWIN_NAME, img_size=32, **SWIN)
    old: Any = old_swin(state)
    assert "layers.0.downsample.reduction.weight" in old and "head.weight" in old
    loaded = load(tmp_path, {wrapper: old} if wrapper else old, SWIN_NAME, {"img_size": 32, **SWIN})
    assert_holds(loaded.model, state)


def test_an_old_vit_file_loses_the_layer_that_timm_dropped(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=32, **VIT)
    old = {**state, "pre_logits.fc.weight": torch.zeros(24, 24), "pre_logits.fc.bias": torch.zeros(24)}
    assert_holds(load(tmp_path, old, VIT_NAME, {"img_size": 32, **VIT}).model, state)


def test_a_file_of_another_network_says_so(tmp_path: Path) -> None:
    alien = {"layers.7.blocks.0.attn.relative_position_bias_table": torch.zeros(9, 1)}  # the conversion cannot place it
    fails(
        "--checkpoint: the keys of weights.pth do not fit the network: missing patch_embed.proj.weight",
        *(tmp_path, alien, SWIN_NAME, {"img_size": 32, **SWIN}),
    )
    vit = state_of(VIT_NAME, img_size=32, **VIT)
    fails("the keys of weights.pth do not fit", tmp_path, vit, SWIN_NAME, {"img_size": 32, **SWIN})
    fails("the keys of weights.pth do not fit", tmp_path, vit, "resnet10t", {})


def test_a_wrong_class_count_shows_through_the_conversion(tmp_path: Path) -> None:
    old = old_swin(state_of(SWIN_NAME, img_size=32, **SWIN))
    fails(
        "--checkpoint: weights.pth has 5 classes (head.fc.weight), but the network was built for 6; "
        "expected --num_classes 5",
        *(tmp_path, old, SWIN_NAME, {"img_size": 32, **SWIN, "num_classes": 6}),
    )


# Image sizes


def test_positions_are_resampled_for_an_image_size_that_was_asked_for(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=32, **VIT)
    loaded = load(tmp_path, state, VIT_NAME, VIT, input_size=48)
    expected = resample_abs_pos_embed(state["pos_embed"], new_size=[6, 6], old_size=[4, 4])
    assert_holds(loaded.model, {**state, "pos_embed": expected})
    assert loaded.preprocessing.input_size == (3, 48, 48)
    assert loaded.model(torch.rand(2, 3, 48, 48)).shape == (2, 5)
    kwargs = load(tmp_path, state, VIT_NAME, {"img_size": 48, **VIT})
    assert_holds(kwargs.model, {**state, "pos_embed": expected})


def test_positions_are_not_resampled_unasked(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=48, **VIT)
    small = {"img_size": 32, **VIT}
    fails(
        "pos_embed has shape [1, 37, 24], expected [1, 17, 24]",
        *(tmp_path, state, VIT_NAME, VIT),
        defaults={"img_size": 32},
    )
    assert load(tmp_path, state, VIT_NAME, small).model.pos_embed.shape == (1, 17, 24)
    old = old_swin(state_of(SWIN_NAME, img_size=224, **{**SWIN, "window_size": 2}))
    fails("relative_position_bias_table has shape [9, 1], expected [49, 1]", tmp_path, old, SWIN_NAME, SWIN)


def test_patches_are_never_resampled(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=64, **{**VIT, "patch_size": 16})
    fails(
        "patch_embed.proj.weight has shape [24, 3, 16, 16], expected [24, 3, 8, 8]",
        *(tmp_path, state, VIT_NAME, VIT),
        input_size=32,
    )


def test_the_image_size_without_flag_is_the_networks(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=(32, 48), **VIT)
    loaded = load(tmp_path, state, VIT_NAME, {"img_size": [32, 48], **VIT})
    assert loaded.preprocessing == Preprocessing((3, 32, 48), 0.9, "bicubic", (0.5,) * 3, (0.5,) * 3)
    loaded = load(tmp_path, state_of(VIT_NAME, **VIT), VIT_NAME, VIT)
    assert loaded.preprocessing.input_size == (3, 224, 224)


def test_image_sizes_that_fit_or_contradict(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=32, **VIT)
    for size in (32, (32, 32)):
        loaded = load(tmp_path, state, VIT_NAME, {"img_size": size, **VIT}, input_size=32)
        assert loaded.preprocessing.input_size == (3, 32, 32)
    fails(
        "--input_size: 48, but --model_kwargs has img_size=32",
        *(tmp_path, state, VIT_NAME, {"img_size": 32, **VIT}),
        input_size=48,
    )


def test_a_network_of_any_size_is_built_without_one(tmp_path: Path) -> None:
    state = state_of("resnet10t", num_classes=5)
    loaded = load(tmp_path, state, "resnet10t", {"num_classes": 5}, input_size=48)
    assert_holds(loaded.model, state)


def test_defaults_give_way(tmp_path: Path) -> None:
    defaults = {"img_size": 32, "num_classes": 10, "depth": 1}
    kwargs = {key: value for key, value in VIT.items() if key != "num_classes"}
    state = state_of(VIT_NAME, img_size=48, **{**VIT, "num_classes": 7})
    loaded = load(tmp_path, state, VIT_NAME, kwargs, defaults=defaults, input_size=48, num_classes=7)
    assert_holds(loaded.model, state)
    state = state_of(VIT_NAME, img_size=32, **{**VIT, "num_classes": 10})
    assert_holds(load(tmp_path, state, VIT_NAME, kwargs, defaults=defaults).model, state)


# Pretrained weights and mistakes


def test_pretrained_weights_of_timm(tmp_path: Path) -> None:
    state = state_of(VIT_NAME, img_size=32, **VIT)
    torch.save(state, tmp_path / "a.pth")
    overlay = {"file": str(tmp_path / "a.pth"), "custom_load": False, "num_classes": 5}
    kwargs = {"img_size": 32, **VIT, "pretrained_cfg_overlay": overlay}
    loaded = load(tmp_path, None, f"{VIT_NAME}.augreg_in21k_ft_in1k", kwargs)
    assert_holds(loaded.model, state)
    assert loaded.source == f"timm:{VIT_NAME}.augreg_in21k_ft_in1k"
    assert loaded.sha256 == state_sha256(state)
    kwargs["num_classes"] = 6
    fails("--num_classes: 6 asked for, but timm's weights for vit_tiny", tmp_path, None, VIT_NAME, kwargs)
    kwargs["pretrained_cfg_overlay"] = {**overlay, "file": str(tmp_path / "lost.pth"), "num_classes": 6}
    fails("--net: no pretrained weights for mine", tmp_path, None, VIT_NAME, kwargs)


def test_errors_name_the_tracks_flag(tmp_path: Path) -> None:
    fails("--net: timm has no model 'resnt50'; did you mean timm:resnet50", tmp_path, None, "resnt50", {})
    fails("--net: timm cannot build lcnet_035.lost", tmp_path, None, "lcnet_035.lost", {})
    fails("--model_kwargs: timm cannot build lcnet_035", tmp_path, None, "lcnet_035", {"bogus": 1})
    fails("--input_size: timm cannot build nest_tiny", tmp_path, None, "nest_tiny", {}, input_size=100)
    error = unknown_network("resnet19", ("resnet18", "vgg"), flag="--net")
    assert str(error) == "--net: no network 'resnet19'; did you mean resnet18?"
    assert "'lcnet_035'; did you mean timm:lcnet_035?" in str(unknown_network("lcnet_035", (), flag="--net"))


def test_counts() -> None:
    check_counts(None, None)
    check_counts(1, 1)
    for message, counts in (("--num_classes: 0; expected at least 1", (0, 1)), ("--input_size: -1; ", (1, -1))):
        with pytest.raises(UserError, match=f"^{message}"):
            check_counts(*counts)


def test_override() -> None:
    assert override(P, *UNCHANGED) == P
    changed = override(P, 48, 1.0, [0.7], [0.8, 0.9, 1.0], "bilinear")
    assert changed == Preprocessing((3, 48, 48), 1.0, "bilinear", (0.7,) * 3, (0.8, 0.9, 1.0))
    for message, settings in (
        ("--crop_pct: 0; expected more than 0", (None, 0, None, None, None)),
        ("--mean: 2 values; expected 1 or 3", (None, None, [0.1, 0.2], None, None)),
        ("--std: 0.0; expected positive", (None, None, None, [0.0], None)),
        ("--interpolation: 'cubic'; expected nearest", (None, None, None, None, "cubic")),
    ):
        with pytest.raises(UserError, match=f"^{message}"):
            override(P, *settings)  # type: ignore[arg-type]
