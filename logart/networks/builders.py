"""Who builds networks by name, so that a packed file finds its network.

The entry points declare their builders in the installed distribution (group `logart.networks`, a track's name = module:
function) and register them when they are imported; nothing here names them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path

from torch import nn

GROUP = "logart.networks"
Builder = Callable[..., nn.Module]
_BUILDERS: dict[str, Builder] = {}


def register_builder(track: str, build: Builder) -> None:
    """Let packed files of this track be loaded without `model=`.

    Args:
        track: as the network's recipe has it, `network_recipe`.
        build: `build(arch, shapes=, model_kwargs=, num_classes=, input_size=)` gives the float network with any
            weights; shapes: a tensor on any device of the shape of each quantized weight, by name.
    """
    _BUILDERS[track] = build


def find_builder(track: str) -> Builder | None:
    """The builder of a track: registered in this process, or declared by what is installed; None if neither."""
    if track not in _BUILDERS:
        declared = {point.name: point for point in [*_of_the_source_tree(), *entry_points(group=GROUP)]}
        if track in declared:
            register_builder(track, declared[track].load())
    return _BUILDERS.get(track)


def _of_the_source_tree() -> Iterable[EntryPoint]:
    """What a checkout declares that was never installed, or not since; Python 3.10 cannot read it."""
    project = Path(__file__).parents[2] / "pyproject.toml"
    if sys.version_info < (3, 11) or not project.is_file():
        return []
    import tomllib

    points = tomllib.loads(project.read_text(encoding="utf-8")).get("project", {}).get("entry-points", {})
    return [EntryPoint(name, value, GROUP) for name, value in points.get(GROUP, {}).items()]
