"""The flags of both command lines, each defined once, in groups; a track shows its own names and takes the other's."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from logart.cli import FlagParser, finite
from logart.grids.activations import FLOAT_BITS, ActScale, SoftmaxGrid
from logart.grids.grid import ScaleSearch
from logart.grids.registry import GRIDS
from logart.grids.root2 import ROOT2_TEXT
from logart.networks.digits import DIGITS
from logart.networks.image_folder import ORDERS
from logart.networks.network import INTERPOLATIONS
from logart.quantization.cache import CacheLocation
from logart.quantization.config import PRESETS, SearchMethod
from logart.quantization.rounding_methods import METHODS
from logart.runs.results_file import RESULTS

VAL_BATCH_SIZE, WORKERS = 128, 2
GROUPS = ("data", "network", "grid", "search", "rounding", "activations", "run", "output")
# What the CNN track (after BRECQ) and the transformer track (after APHQ-ViT) call the same thing. Each shows its own
# name and takes both.
NAMES = {
    "data_path": "dataset",
    "arch": "model",
    "n_bits_w": "w_bit",
    "n_bits_a": "a_bit",
    "input_bits_a": "qconv_a_bit",
    "head_bits_a": "qhead_a_bit",
    "search_samples": "calib_size",
    "search_batch_size": "calib_batch_size",
    "calib_samples": "optim_size",
    "batch_size": "optim_batch_size",
    "calib_lr": "lr",
    "recon_input": "optim_mode",
    "workers": "num_workers",
}
OTHERS = {"input_size": ("--img_size",), "rrweight": ("--weight",)}
OWN = "the network's own"


class TrackFlags:
    """Adds flags under the names of one track.

    Args:
        parser: gets them.
        track: cnn or vit.
        fields: a flag's destination -> field of QuantConfig, for each that has one.
        defaults: of those fields, for the help.
    """

    def __init__(self, parser: FlagParser, track: str, fields: Mapping[str, str], defaults: Mapping[str, Any]) -> None:
        self.parser, self.track, self.fields, self.defaults = parser, track, fields, defaults

    def add(self, group: str, name: str, help: str, default: object = None, **kwargs: Any) -> None:
        """Add a flag that both tracks have, by the CNN track's name; its default is a field's, or said here."""
        own, other = name, NAMES.get(name)
        if other is not None and self.track == "vit":
            own, other = other, name
        if default is None:
            default = self.defaults[self.fields[own]]
        others = () if other is None else (f"--{other}",)
        self.parser.flag(f"--{own}", *others, *OTHERS.get(name, ()), group=group, default=default, help=help, **kwargs)

    def data(self) -> None:
        """Which images, and how they are read."""
        add, group = self.add, "data"
        add(group, "data_path", "a folder in ImageNet layout, or digits", DIGITS)
        add(group, "class_map", "which output of the network each class folder is: JSON, or a folder a line",
            "the folders of train and val in order", metavar="FILE")  # fmt: skip
        add(group, "class_order", "order of class folders that are numbers: number (timm's readers) or text "
            "(torchvision's)", "the checkpoint's class_to_idx, if it has one; number for published weights; must be "
            "given for others where both differ",
            choices=ORDERS)  # fmt: skip
        add(group, "calib_path", "calibrate on the images of this folder, without classes, in place of train", "train",
            metavar="FOLDER")  # fmt: skip
        add(group, "calib_from_val", "calibrate on so many images of val, which accuracy is then not measured on",
            "none", type=int, metavar="N")  # fmt: skip
        add(group, "val_limit", "measure accuracy on so many images only, always the same, of every class as many",
            "all", type=int, metavar="N")  # fmt: skip
        add(group, "input_size", "height and width in pixels where equal, or channels, height, width",
            OWN, type=int, nargs="+", action=_InputSize, metavar="N")  # fmt: skip
        add(group, "crop_pct", "part of the resized image that the centre crop keeps", OWN, type=finite)
        add(group, "mean", "per channel, of pixels in 0..1", OWN, type=finite, nargs="+")
        add(group, "std", "per channel", OWN, type=finite, nargs="+")
        add(group, "interpolation", "how images are resized", OWN, choices=INTERPOLATIONS)
        add(group, "val_batch_size", "validation images at a time", VAL_BATCH_SIZE, type=int)
        add(group, "workers", "processes that read validation images; 0 reads in this one", WORKERS, type=int)

    def network(self, names: Sequence[str], default: str, model_kwargs: str) -> None:
        """Which network; `names` those of the track, `model_kwargs` where these act."""
        add, group = self.add, "network"
        add(group, "arch", f"{', '.join(names)} or timm:NAME", default)
        add(group, "checkpoint", "float weights: .pth, .pt, .th, .tar, .bin or .safetensors", OWN)
        add(group, "checkpoint_key", "the entry of the checkpoint that has the weights, such as state_dict_ema, with "
            "dots between nested ones", "the likeliest; averaged weights only where there are no others",
            metavar="ENTRY")  # fmt: skip
        add(group, "model_kwargs", f"for timm.create_model{model_kwargs}", "none", nargs="+", metavar="KEY=VALUE")
        add(group, "num_classes", "outputs of the network", OWN, type=int)

    def grid(self) -> None:
        """The levels that weights may take."""
        add, group = self.add, "grid"
        add(group, "n_bits_w", "bits per weight, 2 to 8", type=int)
        add(group, "first_last_bits", "bits of every input layer and every head", "same", metavar="{2..8,same}")
        add(group, "layer_bits", "bits of layers by name (* and ? as in file names); the last that matches counts",
            "none", nargs="+", metavar="PATTERN=BITS")  # fmt: skip
        add(group, "bits_budget", "mean bits per quantized weight, 2 to 8: layers that the output minds more get more "
            "bits; --first_last_bits and --layer_bits stand, and count", "none", type=finite,
            metavar="BITS")  # fmt: skip
        add(group, "size_budget", "the same within so many bytes of packed codes (codebooks, biases and float layers "
            "do not count)", "none", type=int, metavar="BYTES")  # fmt: skip
        add(group, "skip", "layers that stay float, by name", "none", nargs="+", metavar="PATTERN")
        add(group, "channel_wise", "one codebook per output channel, or one per layer", "per channel",
            action=argparse.BooleanOptionalAction)  # fmt: skip
        add(group, "scale_method", "the grid", type=_other_names({"log_dynamic": "dynamic"}),
            choices=list(GRIDS))  # fmt: skip
        add(group, "asymmetric", "codes that a channel's shorter sign never reaches become small levels", "off",
            action=argparse.BooleanOptionalAction)  # fmt: skip
        add(group, "zero_code", "one code of each channel is zero", "off", action=argparse.BooleanOptionalAction)
        add(group, "wide_gap", "the smallest magnitude of a channel may lie one or two half-steps lower", "off",
            action=argparse.BooleanOptionalAction)  # fmt: skip
        add(group, "hardware_approx", "√2 ≈ 1+1/2 (or more terms) during search, rounding and evaluation", "off",
            action="store_true")  # fmt: skip
        add(group, "hardware_approx_terms", "powers of two that stand for √2: 1+1/2, 1+1/2-1/16, 1+1/2-1/16-1/64", 2,
            type=int, choices=list(ROOT2_TEXT))  # fmt: skip

    def search(self) -> None:
        """How the levels are chosen."""
        add, group = self.add, "search"
        add(group, "search_method", "the error that DBS and scale search minimise",
            choices=[m.value for m in SearchMethod])  # fmt: skip
        add(group, "search_samples", "images for DBS; tensor_wise looks at none", type=int)
        add(group, "search_batch_size", "images at a time in DBS", type=int)
        add(group, "scale_search", "also search a factor of each channel's levels; half_step: only √2's powers, which "
            "need no multiplier; without a value: grid", nargs="?", const="grid",
            choices=[m.value for m in ScaleSearch])  # fmt: skip

    def rounding(self, rounding: str, inputs: Mapping[str, str]) -> None:
        """How weights are rounded; `rounding` its default, `inputs` what the track calls LLR's and other names."""
        add, group = self.add, "rounding"
        add(group, "rounding", "to nearest, compensated in closed form, learned (LLR), or both in this order", rounding,
            choices=list(METHODS))  # fmt: skip
        add(group, "damping", "of compensated rounding, a share of the mean squared input; auto: of each layer by what "
            "holds on images kept back", 0.01, type=_damping, metavar="{auto,VALUE}")  # fmt: skip
        add(group, "mirror", "calibration images are seen mirrored, too", "off",
            action=argparse.BooleanOptionalAction)  # fmt: skip
        add(group, "crops", "further crops of every calibration image, at other places of the resized image", 0,
            type=int, metavar="N")  # fmt: skip
        add(group, "calib_samples", "images for LLR and compensated rounding", type=int)
        add(group, "batch_size", "images per LLR step", type=int)
        add(group, "iters_w", "LLR steps per block; 0 learns nothing", type=int)
        add(group, "calib_lr", "LLR's learning rate at the start", type=finite)
        default = self.defaults["recon_input"]
        add(group, "recon_input", "a block's input in LLR: of the quantized prefix, of the float one, or mixed",
            inputs.get(default, default), type=_other_names(inputs),
            choices=list(dict.fromkeys(inputs.values())))  # fmt: skip
        add(group, "rrweight", "λ, the rounding penalty against the reconstruction loss", type=finite)
        add(group, "b_start", "the penalty's exponent at the start", type=finite)
        add(group, "b_end", "the penalty's exponent at the end", type=finite)
        add(group, "warmup", "share of the steps without the penalty", type=finite)

    def activations(self) -> None:
        """How the inputs of layers are quantized."""
        add, group = self.add, "activations"
        add(group, "n_bits_a", f"bits of the input of every quantized layer, 2 to 16; {FLOAT_BITS} is float", type=int)
        add(group, "input_bits_a", "the same of the network's input layers alone", "the same", type=int)
        add(group, "head_bits_a", "the same of the heads alone", "the same", type=int)
        add(group, "act_scale", "steps between the levels of activations: powers of two, so that requantization is a "
            "shift, or any; auto: pow2 with --hardware_approx, else float",
            choices=[scale.value for scale in ActScale])  # fmt: skip
        add(group, "calibrate_with_act", "search and rounding of the weights see quantized activations", "off",
            action=argparse.BooleanOptionalAction)  # fmt: skip
        add(group, "iters_a", "steps for which the activation scales of each block are learned", type=int)
        if self.track == "vit":
            add(group, "softmax_grid", "levels of what softmax gives: as of other activations, or powers of 2 or √2",
                choices=[grid.value for grid in SoftmaxGrid])  # fmt: skip

    def run(self) -> None:
        """How the run goes about it."""
        add, group = self.add, "run"
        add(group, "preset", "defaults by name, which any flag overrides: fast (closed form, no learning), paper (the "
            "paper's settings), best (what measured best)", "none", choices=list(PRESETS))  # fmt: skip
        add(group, "seed", "of every random choice", 0, type=int)
        add(group, "device", "auto (CUDA when there is one), cpu, cuda or cuda:N", "auto")
        add(group, "cache", "where a block's captured inputs live: on the computing device, in host memory, there in "
            "half precision (other codes), on disk; auto: the first with room, not half", "auto",
            choices=["auto", *(place.value for place in CacheLocation)])  # fmt: skip
        add(group, "test_before_calibration", "also evaluate after DBS, before LLR",
            "off; always on for the built-in digits", action="store_true")  # fmt: skip
        add(group, "test_with_hardware_approx", "evaluate a second time with √2 ≈ 1+1/2 (or more terms), calibrated "
            "without it", "off", action="store_true")  # fmt: skip
        add(group, "once", "do nothing where the results file has this row or another process is at it", "off",
            action="store_true")  # fmt: skip
        add(group, "resume", "go on with an interrupted --run_dir, after its last finished block; its flags need not "
            "be repeated", "none", metavar="DIR")  # fmt: skip

    def output(self) -> None:
        """What the run leaves."""
        add, group = self.add, "output"
        add(group, "results", "the CSV file that gets a row", RESULTS)
        add(group, "save", "write the quantized network to a packed file, which `logart.load_packed` reads and "
            "`python -m logart.inspect` shows", "none", metavar="PATH.safetensors")  # fmt: skip
        add(group, "run_dir", "keep settings, log, the state of each finished block, the packed network and the report "
            "in a new folder", "none", metavar="DIR")  # fmt: skip
        add(group, "quiet", "no progress, no tables; only the accuracies", "off", action="store_true")


class _InputSize(argparse.Action):
    """One number, or timm's three: channels, height and width; of two, which are equal."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: Any = None) -> None:
        if len(values) not in (1, 2, 3) or len(values) == 2 and values[0] != values[1]:
            words = " ".join(map(str, values))
            raise argparse.ArgumentError(self, f"{words}; expected one number, or channels, height and width")
        setattr(namespace, self.dest, values if len(values) == 3 else values[0])


def _damping(text: str) -> float | str:
    return text if text == "auto" else finite(text)


def _other_names(names: Mapping[str, str]) -> Callable[[str], str]:
    """A flag's `type` that also takes other names of its values."""
    return lambda text: names.get(text, text)
