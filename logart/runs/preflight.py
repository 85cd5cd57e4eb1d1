"""What stops a run before its long work: a network that does not fit its images, outputs that cannot be written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logart.errors import UserError, one_line
from logart.files import real_place
from logart.packed.checkpoint import can_be_loaded
from logart.runs.results_file import check_results
from logart.runs.resume import check_folder
from logart.runs.run import RunOptions


def check_network(model: nn.Module, images: Tensor, num_classes: int, *, flags: str = "--arch, --checkpoint") -> None:
    """Run the float network once, so that one that does not fit its images shows before any long work.

    Args:
        model: on the CPU, in eval mode.
        images: [n, C, H, W]; the first two are looked at.
        num_classes: how many logits an image must get.
        flags: what errors name.

    Raises:
        UserError: it cannot run on these images, or gives anything but finite logits [n, num_classes].
    """
    images = images[:2].clone()  # some networks normalise in place
    size = "×".join(map(str, images.shape[1:]))
    try:
        with torch.no_grad():
            logits = model(images)
    except (RuntimeError, ValueError, AssertionError) as error:  # torch's and timm's answers to a size that is wrong
        reason = f"({one_line(error)}); see --input_size"
        raise UserError(f"{flags}: the network cannot run on images of {size} {reason}") from error
    expected = [len(images), num_classes]
    seen = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
    if seen != expected:
        raise UserError(f"{flags}: expected logits {expected} for {len(images)} images, got {seen}")
    if not logits.isfinite().all():
        raise UserError(f"{flags}: the float network's logits are not all finite")


def check_outputs(options: RunOptions, model_kwargs: Mapping[str, Any] | None, checkpoint: str | None) -> None:
    """Raise UserError where the row, the packed file or the run's folder could not be written; nothing is made.

    Args:
        options: names all of them.
        model_kwargs: of the network, which packed files must be able to say; a run's folder gets one too.
        checkpoint: the file of float weights, which the packed file must not replace.
    """
    check_results(options.results)
    if options.save is not None:
        _check_place(options.save, checkpoint)
    if options.save is not None or options.run_dir is not None:
        _check_arguments(model_kwargs, "--save" if options.save is not None else "--run_dir")
    if options.run_dir is not None:
        check_folder(options.run_dir)


def _check_arguments(model_kwargs: Mapping[str, Any] | None, flag: str) -> None:
    try:
        if not can_be_loaded(json.loads(json.dumps(model_kwargs, allow_nan=False))):
            raise ValueError("a packed file could not be loaded with these")
    except (TypeError, ValueError) as error:
        raise UserError(f"--model_kwargs: {one_line(error)}; with {flag}, expected numbers, texts and lists") from error


def _check_place(save: str, checkpoint: str | None) -> None:
    path, place = save, real_place(save)
    if Path(save).suffix != ".safetensors":
        raise UserError(f"--save: {path!r}; expected a file that ends in .safetensors")
    if place.is_dir() or not place.parent.is_dir():
        problem = "is a folder" if place.is_dir() else "lies in no folder that exists"
        raise UserError(f"--save: {path!r} {problem}; expected the path of a file")
    if not os.access(place.parent, os.W_OK | os.X_OK):
        raise UserError(f"--save: {str(place.parent)!r} is not writable; expected a folder that takes the file")
    if checkpoint is not None and place.resolve() == Path(checkpoint).resolve():
        raise UserError(f"--save: {path!r} is the file that --checkpoint reads; expected another")
