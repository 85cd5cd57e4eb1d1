"""A packed network for other tools: `python -m logart.export FILE` with `--out`, `--integer` or `--onnx`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from logart.cli import FlagParser, default_if_none, refuse_without_effect, run_command
from logart.errors import NetworkError, UserError
from logart.export.hardware_export import CHOICES, export_hardware
from logart.export.hardware_readme import approximation, cost_table
from logart.export.inputs import EXPECTED, GOLDEN_IMAGES, golden_images, own_data
from logart.export.integer_export import TEST_IMAGES, export_integer
from logart.grids.root2 import ROOT2_TEXT
from logart.packed.file import PackedFile


def build_parser() -> FlagParser:
    """The command line."""
    parser = FlagParser(
        prog="logart-export",
        description="Export a packed network: codes, shift-and-add codebooks and golden vectors for hardware (--out), "
        "the whole CNN in integers (--integer), or ONNX (--onnx).",
    )
    parser.add_argument("file", metavar="FILE", help="a packed network (.safetensors)")
    parser.flag("--out", metavar="DIR", help="write the hardware export there, a new or an empty folder")
    parser.flag("--terms", type=int, choices=list(ROOT2_TEXT),
                help=f"what stands for an exact √2: {CHOICES}")  # fmt: skip
    parser.flag("--inputs", metavar="DATA",
                help="where images come from: a folder in ImageNet layout, whose train gives number formats and "
                "whose val golden vectors, or digits (default for a network of digits); with --out also PATH.npy, "
                "preprocessed images, float32 [n, C, H, W]")  # fmt: skip
    parser.flag(
        "--n",
        type=int,
        metavar="N",
        help=f"golden images (default {GOLDEN_IMAGES}; all of an array); with --out, 0 writes no golden vectors",
    )
    parser.flag("--onnx", metavar="OUT.onnx", help="write the network as ONNX there (extra [onnx])")
    parser.flag("--opset", type=int, metavar="N",
                help="of the ONNX file's operators, 18 to 23 (default: 18; 21 with linear grids of 4 bits or fewer, "
                "or activations of more than 8)")  # fmt: skip
    parser.flag("--fp16", action="store_true", help="the ONNX file computes in float16, images and logits too")
    parser.flag("--integer", metavar="DIR",
                help="write the whole CNN as an integer network there, a new or an empty folder: graph, layers, "
                "golden vectors and a NumPy program that computes it without multiplications")  # fmt: skip
    parser.flag("--a_bit", type=int, choices=range(2, 17), metavar="{2..16}",
                help="bits of what the integer network's layers read (default: as the file says, else 8)")  # fmt: skip
    parser.flag("--test_images", type=int, metavar="N",
                help="test images that the integer network's accuracy is measured on, of every class as many "
                f"(default {TEST_IMAGES})")  # fmt: skip
    parser.flag("--quiet", action="store_true", help="print nothing")
    return parser


def command(args: argparse.Namespace) -> None:
    """From flags to files."""
    if args.out is None and args.onnx is None and args.integer is None:
        raise UserError("nothing to write: expected --out DIR, --integer DIR or --onnx OUT.onnx")
    both = {"terms": "--terms", "inputs": "--inputs", "n": "--n"}
    refuse_without_effect(
        args, both, args.out is not None or args.integer is not None, "it acts on --out and --integer alone"
    )
    own = {"a_bit": "--a_bit", "test_images": "--test_images"}
    refuse_without_effect(args, own, args.integer is not None, "it acts on --integer alone")
    onnx_only = {"opset": "--opset", "fp16": "--fp16"}
    refuse_without_effect(args, onnx_only, args.onnx is not None, "it acts on --onnx alone")
    for flag, count, least in (("--n", args.n, int(args.integer is not None)), ("--test_images", args.test_images, 1)):
        if count is not None and count < least:
            raise UserError(f"{flag}: expected at least {least}, got {count}")
    if args.onnx is not None:
        from logart.export.onnx_export import OPSETS, check_target, export_onnx  # its packages are an extra

        check_target(args.onnx)
        if args.opset is not None and args.opset not in OPSETS:
            raise UserError(f"--opset: expected {OPSETS[0]} to {OPSETS[-1]}, got {args.opset}")
    if args.out is not None:
        _hardware(args)
    if args.integer is not None:
        _integer(args)
    if args.onnx is not None:
        written = export_onnx(args.file, args.onnx, opset=args.opset, half=bool(args.fp16))
        if not args.quiet:
            print(written)
            print(f"exported to {args.onnx}")


def _hardware(args: argparse.Namespace) -> None:
    """--out."""
    golden = None
    if args.n != 0:
        info = PackedFile.read(args.file).info
        inputs = args.inputs or own_data(info)
        if inputs is None:
            raise UserError(f"--inputs: golden vectors need images; expected {EXPECTED} (or --n 0 for none)")
        golden = golden_images(info, inputs, args.n)
    elif args.inputs is not None:
        raise UserError("--inputs has no effect here: --n 0 writes no golden vectors")
    manifest = export_hardware(args.file, args.out, terms=args.terms, golden=golden)
    if args.quiet:
        return
    print(cost_table(manifest))
    print(approximation(manifest))
    if manifest["not_run"]:
        print(f"The network was not run: {manifest['not_run']}")
    print(f"golden vectors of {manifest['images']} images" if golden is not None else "no golden vectors")
    print(f"exported to {args.out}")


def _integer(args: argparse.Namespace) -> None:
    """--integer."""
    inputs = args.inputs or own_data(PackedFile.read(args.file).info)
    if inputs is None:
        raise UserError("--inputs: --integer needs images to choose formats from; expected a folder in ImageNet layout")
    try:
        export_integer(
            args.file,
            args.integer,
            inputs,
            a_bit=args.a_bit,
            images=default_if_none(args.n, GOLDEN_IMAGES),
            terms=args.terms,
            test_images=default_if_none(args.test_images, TEST_IMAGES),
            quiet=bool(args.quiet),
        )
    except NetworkError as error:
        raise UserError(str(error)) from error
    if not args.quiet:
        print(f"exported to {args.integer}")


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point; returns the exit code."""
    return run_command(build_parser(), command, None if argv is None else list(argv))
