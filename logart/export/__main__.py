"""A packed network for other tools: `python -m logart.export FILE`, `--out` for hardware, `--onnx` for ONNX."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logart.cli import FlagParser, default_if_none, refuse_without_effect, run_command
from logart.errors import UserError, one_line
from logart.export.hardware_export import CHOICES, export_hardware
from logart.export.hardware_readme import approximation, cost_table
from logart.export.integer_export import export_integer
from logart.grids.root2 import ROOT2_TEXT
from logart.networks.data import open_images
from logart.networks.digits import DIGITS
from logart.networks.image_info import preprocessing_of
from logart.packed.file import PackedFile

DIGITS_IMAGES = 4  # of the built-in data's test images


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="logart-export",
        description="Export a packed network: codes, shift-and-add codebooks and golden vectors for hardware (--out), "
        "or ONNX (--onnx).",
    )
    parser.add_argument("file", metavar="FILE", help="a packed network (.safetensors)")
    parser.flag("--out", metavar="DIR", help="write the hardware export there, a new or an empty folder")
    parser.flag("--terms", type=int, choices=list(ROOT2_TEXT),
                help=f"what stands for an exact √2: {CHOICES}")  # fmt: skip
    parser.flag(
        "--inputs",
        metavar="PATH.npy|digits",
        help="what the golden vectors are of: preprocessed images, float32 [n, C, H, W], or the first "
        f"{DIGITS_IMAGES} test images of the built-in digits (default: those, for a network of digits)",
    )
    parser.flag("--onnx", metavar="OUT.onnx", help="write the network as ONNX there (extra [onnx])")
    parser.flag("--integer", metavar="DIR",
                help="write the whole CNN as an integer network there, a new or an empty folder: graph, layers, "
                "golden vectors and a NumPy program that computes it without multiplications")  # fmt: skip
    parser.flag("--a_bit", type=int, choices=range(2, 17), metavar="{2..16}",
                help="bits of what the integer network's layers read (default 8)")  # fmt: skip
    parser.flag("--n", type=int, metavar="N", help="golden images of the integer network (default 8)")
    parser.flag("--test_images", type=int, metavar="N",
                help="test images that the integer network's accuracy is measured on (default: all)")  # fmt: skip
    parser.flag("--quiet", action="store_true", help="print nothing")
    return parser


def command(args: argparse.Namespace) -> None:
    """From flags to files."""
    if args.out is None and args.onnx is None and args.integer is None:
        raise UserError("nothing to write: expected --out DIR, --integer DIR or --onnx OUT.onnx")
    both = {"terms": "--terms", "inputs": "--inputs"}
    refuse_without_effect(
        args, both, args.out is not None or args.integer is not None, "it acts on --out and --integer alone"
    )
    own = {"a_bit": "--a_bit", "n": "--n", "test_images": "--test_images"}
    refuse_without_effect(args, own, args.integer is not None, "it acts on --integer alone")
    for name, flag in list(own.items())[1:]:
        if getattr(args, name) is not None and getattr(args, name) < 1:
            raise UserError(f"{flag}: expected at least 1, got {getattr(args, name)}")
    if args.onnx is not None:
        from logart.export.onnx_export import check_target, export_onnx  # its packages are an extra

        check_target(args.onnx)
    if args.out is not None:
        images = _images(PackedFile.read(args.file).info, args.inputs)
        manifest = export_hardware(args.file, args.out, terms=args.terms, images=images)
        if not args.quiet:
            why = manifest["not_run"]
            print(cost_table(manifest))
            print(approximation(manifest))
            if why:
                print(f"The network was not run: {why}")
            print(f"golden vectors of {manifest['images']} images" if images is not None else "no golden vectors")
            print(f"exported to {args.out}")
    if args.integer is not None:
        export_integer(
            args.file,
            args.integer,
            _data(PackedFile.read(args.file).info, args.inputs),
            a_bit=default_if_none(args.a_bit, 8),
            images=default_if_none(args.n, 8),
            terms=args.terms,
            test_images=args.test_images,
            quiet=bool(args.quiet),
        )
        if not args.quiet:
            print(f"exported to {args.integer}")
    if args.onnx is not None:
        export_onnx(args.file, args.onnx)
        if not args.quiet:
            print(f"exported to {args.onnx}")


def _data(info: dict[str, Any], inputs: str | None) -> str:
    """The data set of --inputs; without it the digits for a network of digits."""
    source = info.get("source")
    if inputs is None and isinstance(source, dict) and source.get("data") == DIGITS:
        return DIGITS
    if inputs is None:
        raise UserError("--inputs: --integer needs images to choose formats from; expected a folder in ImageNet layout")
    return inputs


def _images(info: dict[str, Any], inputs: str | None) -> Tensor | None:
    """What --inputs asks for; without it the digits for a network of digits."""
    preprocessing = preprocessing_of(info)
    source, network = info.get("source"), info.get("network")
    if inputs is None and isinstance(source, dict) and isinstance(network, dict) and preprocessing is not None:
        inputs = DIGITS if source.get("data") == DIGITS else None
    if inputs is None:
        return None
    if inputs == DIGITS:
        if preprocessing is None:
            raise UserError("--inputs: the file does not say which images the network takes; expected PATH.npy")
        images = open_images(DIGITS, preprocessing, 10, flag="--inputs").val
        return torch.stack([images[i][0] for i in range(DIGITS_IMAGES)])
    try:
        array = np.load(inputs, allow_pickle=False)
    except Exception as error:  # a damaged file makes NumPy raise almost anything
        why = one_line(error)
        raise UserError(f"--inputs: cannot read {inputs} ({why:.160}); expected {DIGITS} or PATH.npy") from error
    size = None if preprocessing is None else preprocessing.input_size
    if not isinstance(array, np.ndarray) or array.dtype != np.float32 or array.ndim != 4 or not len(array):
        seen = f"{array.dtype} {list(array.shape)}" if isinstance(array, np.ndarray) else "several arrays"
        raise UserError(f"--inputs: {inputs} holds {seen}; expected preprocessed images, float32 [n, C, H, W]")
    if size is not None and array.shape[1:] != size:
        raise UserError(f"--inputs: {inputs} has images {list(array.shape[1:])}; the network takes {list(size)}")
    return torch.from_numpy(array)


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, None if argv is None else list(argv))


if __name__ == "__main__":
    sys.exit(main())
