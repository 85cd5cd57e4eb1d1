"""The settings of one quantization and the rounding method that they come to; presets."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from logart.grids.activations import ActScale, SoftmaxGrid
from logart.grids.grid import ScaleSearch
from logart.grids.root2 import ROOT2_TEXT
from logart.quantization.activation_stage import Activations, LearnSteps
from logart.quantization.rounding_methods import METHODS, RoundingMethod, Stage
from logart.quantization.settings import ReconInput, ReconMetric, SearchMethod, Settings

__all__ = ["PRESETS", "QuantConfig", "ReconInput", "ReconMetric", "SearchMethod", "describe", "preset"]


PRESETS = ("fast", "paper", "best")


def preset(name: str, n_bits: float) -> dict[str, Any]:
    """The defaults that a preset of `PRESETS` stands for at so many bits, or mean bits: see docs/experiments.md."""
    if name == "paper":
        return {"rounding": "learned", "calib_samples": 1024, "iters": 20000, "rrweight": 10000.0}
    closed: dict[str, Any] = {"rounding": "compensated", "damping": "auto"}
    if n_bits <= 3:  # few levels must lie well, wide apart around zero
        closed["wide_gap"] = True
    if name == "fast":  # half-steps cost nothing
        return closed | {"calib_samples": 256} | ({"scale_search": ScaleSearch.HALF_STEP} if n_bits <= 3 else {})
    best = closed | {"calib_samples": 1024, "mirror": True, "iters": 300, "lr": 0.01}
    if n_bits <= 3:  # with more levels the steps are for who asks for LLR
        best["rounding"] = "both"
    # With more bits there is nothing left for these to gain, and thousands of candidates to search.
    return best | ({"scale_search": ScaleSearch.GRID} if n_bits <= 5 else {})


@dataclass(frozen=True)
class QuantConfig(Settings):
    """Everything that decides the codes, apart from the network and the images; attributes as `Settings`."""

    def __post_init__(self) -> None:
        """Raise ValueError for a value of another type or out of its range, naming the field."""
        super().__post_init__()
        if self.rounding not in METHODS:
            raise ValueError(f"rounding must be one of {', '.join(METHODS)}, got {self.rounding!r}")
        if self.chooses_damping and self.calib_samples < 2:
            raise ValueError(f"calib_samples must be at least 2 with damping auto, got {self.calib_samples}")

    @property
    def chooses_damping(self) -> bool:
        """Whether compensated rounding runs and chooses its damping."""
        return self.damping == "auto" and not self.method.uses_dbs

    @property
    def searches_data(self) -> bool:
        """Whether DBS looks at images: more than one candidate, by layer or block output."""
        return self.method.uses_dbs and self.searches and self.search_method is not SearchMethod.TENSOR_WISE

    @property
    def method(self) -> RoundingMethod:
        """What `rounding` comes to: without steps nothing is learned."""
        asked = METHODS[self.rounding]
        return asked if self.iters else METHODS[asked.without_steps]

    @property
    def stages(self) -> tuple[Stage, ...]:
        """What runs, in this order: the rounding method's stages, and before or behind them those of activations."""
        rounding, learns = self.method.stages, self.iters_a > 0
        if not self.quantizes_activations:
            return rounding
        if self.calibrate_with_act:
            return (Activations(), *rounding, *([LearnSteps()] if learns else []))
        return (*rounding, Activations(learns_steps=learns))

    @property
    def calibrates(self) -> bool:
        """Whether `calib_samples` and `batch_size` act."""
        return self.method.calibrates or self.quantizes_activations

    @property
    def learns(self) -> bool:
        """Whether LLR runs."""
        return self.method.learns

    @property
    def images_needed(self) -> int:
        """How many calibration images the stages that run look at."""
        needed = max(stage.images(self)[0] if stage.needs(self) else 0 for stage in self.stages)
        return needed or (self.search_samples if self.has_budget else 0)


def describe(config: QuantConfig) -> str:
    """The settings in a line, those that act."""
    bits = f"{config.n_bits} bits"
    if config.has_budget:
        mean = config.bits_budget
        bits = f"{config.size_budget} bytes of codes" if mean is None else f"{mean:g} bits on average"
    grid = f"{bits}, {config.scale_method}"
    if config.searches and config.method.uses_dbs:
        grid += f" ({config.search_method.value} DBS)"
    words = [grid, f"a codebook per {'channel' if config.channel_wise else 'layer'}"]
    options = config.grid_options
    if options.scale_search is not ScaleSearch.NONE:
        words.append(f"{options.scale_search.value} scale search")
    words += [name for name in ("asymmetric", "zero_code", "wide_gap") if getattr(options, name)]
    words.append(config.method.describe(config))
    if config.quantizes_activations:
        steps = "powers of two" if config.actual_act_scale is ActScale.POW2 else "any step"
        softmax = config.softmax_grid
        log = f", softmax {softmax.value}" if softmax is not SoftmaxGrid.UNIFORM else ""
        learned = f", {config.iters_a} steps a block" * (config.iters_a > 0)
        seen = ", seen by the calibration of weights" * config.calibrate_with_act
        ends = {"input": config.actual_input_bits_a, "head": config.actual_head_bits_a}
        other = "".join(f"{end} {bits} bits, " for end, bits in ends.items() if bits != config.n_bits_a)
        words.append(f"activations {config.n_bits_a} bits ({other}{steps}{log}{learned}{seen})")
    words += [f"{pattern} {bits} bits" for pattern, bits in config.layer_bits.items()]
    words += [f"{pattern} float" for pattern in config.skip]
    if options.terms:
        words.append(f"√2 ≈ {ROOT2_TEXT[options.terms]}")
    return ", ".join([*words, f"seed {config.seed}"])
