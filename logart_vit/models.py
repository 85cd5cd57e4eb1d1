"""From a name to a trained vision transformer of timm's: its weights, the images it expects, its blocks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from logart.errors import UserError
from logart.networks.builders import register_builder
from logart.networks.network import DIGITS_PREPROCESSING, TIMM, Network, load_by, unknown_network
from logart.networks.timm_network import build_timm, load_timm

# timm's bare names have changed their weights over the years; these are the weights of the older papers.
MODELS = {
    "vit_tiny": "vit_tiny_patch16_224.augreg_in21k_ft_in1k",
    "vit_small": "vit_small_patch16_224.augreg_in21k_ft_in1k",
    "vit_base": "vit_base_patch16_224.augreg_in21k_ft_in1k",
    "vit_large": "vit_large_patch16_224.augreg_in21k_ft_in1k",
    "deit_tiny": "deit_tiny_patch16_224.fb_in1k",
    "deit_small": "deit_small_patch16_224.fb_in1k",
    "deit_base": "deit_base_patch16_224.fb_in1k",
    "swin_tiny": "swin_tiny_patch4_window7_224.ms_in1k",
    "swin_small": "swin_small_patch4_window7_224.ms_in1k",
    "swin_base": "swin_base_patch4_window7_224.ms_in22k_ft_in1k",
    "swin_base_384": "swin_base_patch4_window12_384.ms_in22k_ft_in1k",
    "digits_vit": "vit_tiny_patch16_224",
}
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
PACKAGED_WEIGHTS = {"digits_vit": "weights/digits_vit.safetensors"}
RAW_WEIGHTS = Path("checkpoint/vit_raw")  # under the working directory; the layout of AdaLog's repository
ROW_GROUPS = {"qkv": 3}  # one fused layer for queries, keys and values

# What timm feeds one tensor of the whole batch and takes one tensor from, as "module.class"; several families have a
# class Block, some of which take more. Embeddings and convolutional stages are blocks where transformer blocks are.
TRANSFORMER_BLOCKS = (
    "vision_transformer.Block",
    "vision_transformer.ResPostBlock",
    "vision_transformer.ParallelScalingBlock",
    "vision_transformer.DiffParallelScalingBlock",
    "vision_transformer.ParallelThingsBlock",
    "vision_transformer_sam.Block",
    "swin_transformer.SwinTransformerBlock",
    "swin_transformer_v2.SwinTransformerV2Block",
    "swin_transformer_v2_cr.SwinTransformerV2CrBlock",
    "cait.LayerScaleBlock",
    "convit.Block",
    "davit.SpatialBlock",
    "davit.ChannelBlock",
    "efficientformer.MetaBlock1d",
    "efficientformer_v2.EfficientFormerV2Block",
    "efficientvit_mit.EfficientVitBlock",
    "efficientvit_msra.EfficientVitBlock",
    "hiera.HieraBlock",
    "levit.LevitBlock",
    "maxxvit.MaxxVitBlock",
    "maxxvit.ParallelMaxxVitBlock",
    "maxxvit.TransformerBlock2d",
    "metaformer.MetaFormerBlock",
    "mobilevit.MobileVitBlock",
    "mobilevit.MobileVitV2Block",
    "nest.TransformerLayer",
    "nextvit.NextTransformerBlock",
    "tiny_vit.TinyVitBlock",
    "visformer.Block",
    "volo.Outlooker",
    "volo.Transformer",
)
EMBEDDINGS = (
    "patch_embed.PatchEmbed",
    "hybrid_embed.HybridEmbed",
    "vision_transformer_hybrid.HybridEmbed",
    "swin_transformer_v2_cr.PatchEmbed",
    "crossvit.PatchEmbed",
    "davit.Stem",
    "efficientformer.Stem4",
    "efficientformer_v2.Stem4",
    "efficientvit_mit.Stem",
    "efficientvit_msra.PatchEmbedding",
    "levit.Stem8",
    "levit.Stem16",
    "maxxvit.Stem",
    "metaformer.Stem",
    "pit.ConvEmbedding",
    "tiny_vit.PatchEmbed",
    "volo.PatchEmbed",
)
BETWEEN_BLOCKS = (
    "swin_transformer.PatchMerging",
    "swin_transformer_v2.PatchMerging",
    "swin_transformer_v2_cr.PatchMerging",
    "byobnet.BottleneckBlock",
    "davit.Downsample",
    "efficientformer.MetaBlock2d",
    "efficientvit_msra.PatchMerging",
    "levit.LevitDownsample",
    "maxxvit.MbConvBlock",
    "maxxvit.ConvNeXtBlock",
    "nest.ConvPool",
    "nextvit.NextConvBlock",
    "tiny_vit.MBConv",
    "tiny_vit.PatchMerging",
)


def load_network(model: str, checkpoint: str | Path | None = None, **settings: Any) -> Network:
    """A vision transformer: one of `MODELS`, or 'timm:' and a name that timm knows.

    Args:
        model: Its name.
        checkpoint: A file of weights. Without one, the file `<timm's name>.bin` under `RAW_WEIGHTS` where there is
            one, else timm's pretrained weights; for digits_vit those of this package.
        settings: As for `network.load_by`.

    Raises:
        UserError: As there; or a network without transformer blocks.
    """
    return load_by(_load, "vit", model, checkpoint, **settings)


def _load(
    model: str,
    checkpoint: str | Path | None,
    model_kwargs: Mapping[str, object] | None,
    num_classes: int | None,
    input_size: int | None,
) -> Network:
    if model not in MODELS and not model.startswith(TIMM):
        raise unknown_network(model, tuple(MODELS), flag="--model")
    name = MODELS.get(model, model.removeprefix(TIMM))
    is_digits = model == "digits_vit"
    with _weights_file(model, name, checkpoint) as path:
        network = load_timm(
            model,
            name,
            path,
            flag="--model",
            find_blocks=partial(_find_blocks, model),
            model_kwargs=model_kwargs,
            defaults=DIGITS_VIT_KWARGS if is_digits else None,
            num_classes=num_classes,
            input_size=input_size,
        )
    settings = network.preprocessing
    if is_digits:
        settings = replace(DIGITS_PREPROCESSING, input_size=settings.input_size)
    return replace(network, preprocessing=settings, row_groups=ROW_GROUPS)


def build_network(
    arch: str,
    *,
    shapes: Mapping[str, Tensor],
    model_kwargs: Mapping[str, object] | None = None,
    num_classes: int | None = None,
    input_size: int | None = None,
) -> nn.Module:
    """The network that `load_network` would give weights to; arguments as there, `shapes` decide nothing here."""
    return build_timm(
        MODELS.get(arch, arch.removeprefix(TIMM)),
        flag="--model",
        model_kwargs=model_kwargs,
        defaults=DIGITS_VIT_KWARGS if arch == "digits_vit" else None,
        num_classes=num_classes,
        input_size=input_size,
    )[0]  # type: ignore[no-any-return]


@contextmanager
def _weights_file(model: str, name: str, checkpoint: str | Path | None) -> Iterator[Path | None]:
    """The file of the weights; None where there is none."""
    if checkpoint is not None:
        yield Path(checkpoint)
    elif model in PACKAGED_WEIGHTS:
        with resources.as_file(resources.files("logart_vit").joinpath(PACKAGED_WEIGHTS[model])) as path:
            yield path
    else:
        bare, _, tag = name.partition(".")
        raw = RAW_WEIGHTS / f"{bare}.bin"
        asked = tag and model not in MODELS  # who names a tag wants those weights
        yield raw if raw.is_file() and not asked else None


def _find_blocks(model: str, network: nn.Module) -> tuple[str, ...]:
    """The class names of the network's blocks; a network without transformer blocks is refused."""
    present = {f"{type(module).__module__.rpartition('.')[2]}.{type(module).__name__}" for module in network.modules()}
    if present.isdisjoint(TRANSFORMER_BLOCKS):
        raise UserError(
            f"--model: {model}: no transformer blocks found; expected a vision transformer of timm's whose blocks "
            "take one tensor (CNNs: python -m logart_cnn.main)"
        )
    found = [block for block in EMBEDDINGS + TRANSFORMER_BLOCKS + BETWEEN_BLOCKS if block in present]
    return tuple(dict.fromkeys(block.partition(".")[2] for block in found))


register_builder("vit", build_network)
