"""From a name to a trained vision transformer of timm's: its weights, the images it expects."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import timm
from torch import Tensor, nn

from logart.networks.builders import register_builder
from logart.networks.network import (
    DIGITS_PREPROCESSING,
    TIMM,
    Network,
    Plan,
    Size,
    names_table,
    plan_by,
    unknown_network,
)
from logart.networks.timm_network import build_timm, plan_timm


@dataclass(frozen=True)
class Entry:
    """A network known by name; all that is known of it, which help and documentation are made from.

    Attributes:
        timm: timm's name of it. Bare names have changed their weights over the years; a tag names them for good.
        about: What it is.
        kwargs: Arguments that build it.
        weights: A path in this package; "" takes timm's.
    """

    timm: str
    about: str
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    weights: str = ""


DIGITS_VIT_KWARGS = {
    "img_size": 8,
    "patch_size": 4,
    "in_chans": 1,
    "embed_dim": 48,
    "depth": 4,
    "num_heads": 4,
    "mlp_ratio": 2,
    "num_classes": 10,
}
ENTRIES = {  # with the weights of the older papers
    "vit_tiny": Entry("vit_tiny_patch16_224.augreg_in21k_ft_in1k", "ViT-Ti/16"),
    "vit_small": Entry("vit_small_patch16_224.augreg_in21k_ft_in1k", "ViT-S/16"),
    "vit_base": Entry("vit_base_patch16_224.augreg_in21k_ft_in1k", "ViT-B/16"),
    "vit_large": Entry("vit_large_patch16_224.augreg_in21k_ft_in1k", "ViT-L/16"),
    "deit_tiny": Entry("deit_tiny_patch16_224.fb_in1k", "DeiT-Ti/16"),
    "deit_small": Entry("deit_small_patch16_224.fb_in1k", "DeiT-S/16"),
    "deit_base": Entry("deit_base_patch16_224.fb_in1k", "DeiT-B/16"),
    "swin_tiny": Entry("swin_tiny_patch4_window7_224.ms_in1k", "Swin-T"),
    "swin_small": Entry("swin_small_patch4_window7_224.ms_in1k", "Swin-S"),
    "swin_base": Entry("swin_base_patch4_window7_224.ms_in22k_ft_in1k", "Swin-B"),
    "swin_base_384": Entry("swin_base_patch4_window12_384.ms_in22k_ft_in1k", "Swin-B at 384 pixels"),
    "digits_vit": Entry("vit_tiny_patch16_224", "a small ViT for the built-in digits", DIGITS_VIT_KWARGS,
                        "weights/digits_vit.safetensors"),
}  # fmt: skip
MODELS: tuple[str, ...] = tuple(ENTRIES)
RAW_WEIGHTS = Path("checkpoint/vit_raw")  # under the working directory; the layout of AdaLog's repository
ROW_GROUPS = {"qkv": 3, "in_proj_weight": 3}  # one fused layer for queries, keys and values


def load_network(model: str, checkpoint: str | Path | None = None, **settings: Any) -> Network:
    """A vision transformer: one of `MODELS`, or 'timm:' and a name that timm knows.

    Args:
        model: Its name.
        checkpoint: A file of weights. Without one, the file `<timm's name>.bin` under `RAW_WEIGHTS` where there is
            one, else timm's pretrained weights; for digits_vit those of this package.
        settings: As for `network.plan_by`.

    Raises:
        UserError: As there.
    """
    return plan_network(model, checkpoint, **settings).load()


def plan_network(model: str, checkpoint: str | Path | None = None, **settings: Any) -> Plan:
    """The same before its weights are read or fetched."""
    return plan_by(_plan, "vit", model, checkpoint, **settings)


def _plan(
    model: str,
    checkpoint: str | Path | None,
    checkpoint_key: str | None,
    model_kwargs: Mapping[str, object] | None,
    num_classes: int | None,
    input_size: Size | None,
) -> Plan:
    if model not in ENTRIES and not model.startswith(TIMM):
        raise unknown_network(model, MODELS, flag="--model")
    entry = ENTRIES.get(model) or Entry(model.removeprefix(TIMM), "")
    plan = plan_timm(
        model,
        entry.timm,
        _weights_file(model, entry, checkpoint),
        checkpoint_key,
        flag="--model",
        model_kwargs=model_kwargs,
        defaults=entry.kwargs,
        num_classes=num_classes,
        input_size=input_size,
    )
    settings = plan.preprocessing
    if model == "digits_vit":
        settings = replace(DIGITS_PREPROCESSING, input_size=settings.input_size)
    return replace(plan, preprocessing=settings, load=lambda: replace(plan.load(), row_groups=ROW_GROUPS))


def build_network(
    arch: str,
    *,
    shapes: Mapping[str, Tensor],
    model_kwargs: Mapping[str, object] | None = None,
    num_classes: int | None = None,
    input_size: Size | None = None,
) -> nn.Module:
    """The network that `load_network` would give weights to; arguments as there, `shapes` decide nothing here."""
    entry = ENTRIES.get(arch) or Entry(arch.removeprefix(TIMM), "")
    return build_timm(
        entry.timm,
        flag="--model",
        model_kwargs=model_kwargs,
        defaults=entry.kwargs,
        num_classes=num_classes,
        input_size=input_size,
    )[0]  # type: ignore[no-any-return]


def _weights_file(
    model: str, entry: Entry, checkpoint: str | Path | None
) -> AbstractContextManager[Path] | None:  # fmt: skip
    """The file of the weights; None where there is none."""
    if checkpoint is not None:
        return nullcontext(Path(checkpoint))
    if entry.weights:
        return resources.as_file(resources.files("logart_vit").joinpath(entry.weights))
    bare, _, tag = entry.timm.partition(".")
    raw = RAW_WEIGHTS / f"{bare}.bin"
    asked = tag and model not in ENTRIES  # who names a tag wants those weights
    return nullcontext(raw) if raw.is_file() and not asked else None


def names_documentation() -> str:
    """The table of the names of --model."""
    rows = []
    for name, entry in ENTRIES.items():
        config = timm.get_pretrained_cfg(entry.timm)
        assert config is not None
        size = DIGITS_PREPROCESSING.input_size if entry.kwargs else config.input_size
        classes = entry.kwargs.get("num_classes", config.num_classes)
        rows.append((name, entry.about, size, classes, entry.weights or f"timm's {entry.timm}"))
    return names_table(rows)


register_builder("vit", build_network)
