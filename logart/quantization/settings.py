"""What is asked of one quantization, checked once; `config.QuantConfig` adds the method that carries it out."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from enum import Enum
from fnmatch import fnmatchcase
from numbers import Real
from typing import Any

from logart.errors import SettingError
from logart.grids.activations import FLOAT_BITS, MAX_BITS_A, MIN_BITS_A, ActScale, SoftmaxGrid
from logart.grids.grid import MAX_BITS, MIN_BITS, Grid, GridOptions, ScaleSearch
from logart.grids.registry import grid_named
from logart.grids.root2 import root2


class SearchMethod(str, Enum):
    """Which error DBS minimises per channel: of the weight, the layer's output or the block's output."""

    TENSOR_WISE = "tensor_wise"
    LAYER_WISE = "layer_wise"
    BLOCK_WISE = "block_wise"


class ReconInput(str, Enum):
    """Whose prefix a block's input comes from while its rounding is learned; mixed draws per element (QDrop)."""

    QUANTIZED = "quantized"
    FLOAT = "float"
    MIXED = "mixed"


class ReconMetric(str, Enum):
    """What LLR minimises between a block's output and the float one's."""

    MSE = "mse"
    MAE = "mae"
    HESSIAN_PERTURB = "hessian_perturb"


@dataclass(frozen=True)
class Settings:
    """Everything that decides the codes, apart from the network and the images.

    Attributes:
        n_bits: 2 to 8, for every layer of which `first_last_bits` and `layer_bits` say nothing else.
        first_last_bits: bits of every input layer and every head of the network; None is the same as `n_bits`.
        channel_wise: one codebook per output channel, or one per layer.
        scale_method: the grid, by its name in `grids.registry`.
        search_method: the measure of DBS and scale search; compensated rounding has its own.
        search_samples: images for DBS.
        search_batch_size: images at a time in DBS.
        scale_search: which factors of the levels are tried, per channel.
        asymmetric, zero_code: how codes are spent, see `grids.reassigned_codes`.
        wide_gap: whether a channel's smallest magnitude may lie lower, see `grids.logarithmic`.
        rounding: how codes are found, a name in `rounding_methods.METHODS`.
        damping: λ of compensated rounding, as a share of the mean squared input; "auto" chooses it for each layer by
            images that the estimate has not seen, see `damping.choose_damping`.
        mirror: whether every calibration image is also seen mirrored, left to right.
        crops: how many further crops of every calibration image follow it; each is an image that `calib_samples` and
            `search_samples` do not count.
        calib_samples: images for LLR and compensated rounding.
        batch_size: images per LLR step, and at a time elsewhere in these stages.
        iters: LLR steps per block; 0 learns nothing.
        rrweight: λ, the weight of the rounding penalty.
        lr: start learning rate of α.
        b_start, b_end: the penalty's exponent β goes linearly from one to the other.
        warmup: share of the steps without the penalty, 0 to 1.
        recon_input: the inputs of blocks during LLR.
        drop_prob: with a mixed input, the probability that an element is the quantized prefix's.
        recon_metric: the loss of LLR.
        temperature: of the KL divergence that `hessian_perturb` looks at.
        head_kl: compare the last block's logits by their KL divergence, whatever the metric.
        hardware_terms: 0 for the exact √2, else the number of powers of two that stand for it.
        seed: of the order of images during LLR and of the probes of BW.
        layer_bits: bits by pattern (`fnmatch`) on the layers' names; of several that match, the last counts.
        skip: patterns of the names of layers that stay float.
        bits_budget: mean bits per weight, 2 to 8, over all quantized weights. Every layer of which `first_last_bits`
            and `layer_bits` say nothing gets the width at which the network's output minds it least within that
            (`sensitivity`, `budget`); `n_bits` becomes the budget, rounded up.
        size_budget: in place of it, the bytes of all packed codes: of each layer weights·bits / 8, rounded up.
            Codebooks, biases and what stays float do not count.
        n_bits_a: 2 to 16, of the input of every quantized layer; 32 leaves activations float.
        input_bits_a, head_bits_a: the same of the network's input layers and heads; None is the same as `n_bits_a`.
        act_scale: whether the levels of activations are steps of a power of two; AUTO is POW2 with a hardware
            approximation, else FLOAT.
        softmax_grid: the levels of what softmax gives in attention, 2 to 8 bits where they are a log grid's.
        calibrate_with_act: whether search and rounding of the weights see quantized activations; otherwise these are
            quantized behind them.
        iters_a: steps for which each block's activation scales are learned; 0 learns none.
    """

    n_bits: int = 4
    first_last_bits: int | None = None
    channel_wise: bool = True
    scale_method: str = "dynamic"
    search_method: SearchMethod = SearchMethod.TENSOR_WISE
    search_samples: int = 32
    search_batch_size: int = 32
    scale_search: ScaleSearch = ScaleSearch.NONE
    asymmetric: bool = False
    zero_code: bool = False
    wide_gap: bool = False
    rounding: str = "learned"
    damping: float | str = 0.01
    mirror: bool = False
    crops: int = 0
    calib_samples: int = 1024
    batch_size: int = 32
    iters: int = 1000
    rrweight: float = 0.1
    lr: float = 1e-2
    b_start: float = 20.0
    b_end: float = 2.0
    warmup: float = 0.2
    recon_input: ReconInput = ReconInput.QUANTIZED
    drop_prob: float = 0.5
    recon_metric: ReconMetric = ReconMetric.MSE
    temperature: float = 20.0
    head_kl: bool = False
    hardware_terms: int = 0
    seed: int = 0
    layer_bits: Mapping[str, int] = field(default_factory=dict)
    skip: Sequence[str] = ()
    bits_budget: float | None = None
    size_budget: int | None = None
    n_bits_a: int = FLOAT_BITS
    input_bits_a: int | None = None
    head_bits_a: int | None = None
    act_scale: ActScale = ActScale.AUTO
    softmax_grid: SoftmaxGrid = SoftmaxGrid.UNIFORM
    calibrate_with_act: bool = False
    iters_a: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a value of another type or out of its range, naming the field."""
        for one in fields(self):
            object.__setattr__(self, one.name, _checked_type(one.name, str(one.type), getattr(self, one.name)))
        self._check_budget()
        grid_named(self.scale_method)
        object.__setattr__(self, "search_method", SearchMethod(self.search_method))
        object.__setattr__(self, "scale_search", ScaleSearch(self.scale_search))
        object.__setattr__(self, "recon_input", ReconInput(self.recon_input))
        object.__setattr__(self, "recon_metric", ReconMetric(self.recon_metric))
        for name in ("n_bits", "first_last_bits"):
            bits = getattr(self, name)
            if bits is not None and not MIN_BITS <= bits <= MAX_BITS:
                raise ValueError(f"{name} must be {MIN_BITS} to {MAX_BITS}, got {bits}")
        if not all(MIN_BITS <= bits <= MAX_BITS for bits in self.layer_bits.values()):
            raise ValueError(f"layer_bits must be {MIN_BITS} to {MAX_BITS}, got {self.layer_bits}")
        for name in ("search_samples", "search_batch_size", "calib_samples", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("iters", "iters_a", "crops"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if not (0 < self.lr < float("inf") and 0 <= self.rrweight < float("inf")):
            raise ValueError(f"lr must be positive and rrweight at least 0, got {self.lr} and {self.rrweight}")
        if not float("inf") > self.b_start >= self.b_end > 1:
            raise ValueError(f"b_start ≥ b_end > 1 is needed, got {self.b_start} and {self.b_end}")
        for name in ("warmup", "drop_prob"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be 0 to 1, got {getattr(self, name)}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be positive, got {self.temperature}")
        if self.damping != "auto" and not 0 <= float(self.damping) < float("inf"):
            raise ValueError(f"damping must be auto or at least 0, got {self.damping}")
        root2(self.hardware_terms)
        self._check_activations()

    def _check_activations(self) -> None:
        for name in ("n_bits_a", "input_bits_a", "head_bits_a"):
            bits = getattr(self, name)
            if bits not in (None, FLOAT_BITS) and not MIN_BITS_A <= bits <= MAX_BITS_A:
                raise ValueError(f"{name} must be {MIN_BITS_A} to {MAX_BITS_A}, or {FLOAT_BITS} (float), got {bits}")
        object.__setattr__(self, "act_scale", ActScale(self.act_scale))
        object.__setattr__(self, "softmax_grid", SoftmaxGrid(self.softmax_grid))
        log = self.softmax_grid is not SoftmaxGrid.UNIFORM
        if log and self.quantizes_activations and self.n_bits_a > MAX_BITS:
            expected = f"2 to {MAX_BITS} for softmax_grid {self.softmax_grid.value}"
            raise ValueError(f"n_bits_a must be {expected}, got {self.n_bits_a}")

    def _check_budget(self) -> None:
        if self.bits_budget is not None and self.size_budget is not None:
            raise ValueError(
                f"bits_budget and size_budget exclude each other, got {self.bits_budget} and {self.size_budget}"
            )
        if self.bits_budget is not None:
            if not MIN_BITS <= self.bits_budget <= MAX_BITS:
                raise ValueError(f"bits_budget must be {MIN_BITS} to {MAX_BITS}, got {self.bits_budget}")
            object.__setattr__(self, "n_bits", math.ceil(self.bits_budget))
        if self.size_budget is not None and self.size_budget < 1:
            raise ValueError(f"size_budget must be at least 1, got {self.size_budget}")

    @property
    def has_budget(self) -> bool:
        """Whether widths are allocated to layers by their effect."""
        return self.bits_budget is not None or self.size_budget is not None

    @property
    def quantizes_activations(self) -> bool:
        """Whether the inputs of layers are quantized, too."""
        return self.n_bits_a != FLOAT_BITS

    @property
    def actual_act_scale(self) -> ActScale:
        """What AUTO comes to."""
        if self.act_scale is ActScale.AUTO:
            return ActScale.POW2 if self.hardware_terms else ActScale.FLOAT
        return self.act_scale

    @property
    def actual_input_bits_a(self) -> int:
        """Bits of the network's input layers' inputs, 32 where activations stay float."""
        return self._bits_at_an_end(self.input_bits_a)

    @property
    def actual_head_bits_a(self) -> int:
        """Bits of the heads' inputs, 32 where activations stay float."""
        return self._bits_at_an_end(self.head_bits_a)

    def _bits_at_an_end(self, own: int | None) -> int:
        return self.n_bits_a if own is None or not self.quantizes_activations else own

    @property
    def views(self) -> int:
        """How many times each calibration image is seen."""
        return (1 + self.crops) * (2 if self.mirror else 1)

    @property
    def searches(self) -> bool:
        """Whether there is more than one codebook to choose from, by the measure asked for."""
        several = self.grid.n_candidates(self.n_bits, self.grid_options) > 1
        return several and self.grid.own_error is None

    @property
    def grid(self) -> Grid:
        """The grid that `scale_method` names."""
        return grid_named(self.scale_method)

    @property
    def grid_options(self) -> GridOptions:
        """What is asked of the grid; options that do not act on it have their defaults."""
        asked = GridOptions(
            self.hardware_terms, self.scale_search, self.asymmetric, self.zero_code, self.wide_gap
        )
        return GridOptions(**{name: getattr(asked, name) for name in self.grid.options})

    def as_dict(self) -> dict[str, Any]:
        """All settings by name, as JSON can say them."""
        values = {name: getattr(value, "value", value) for name, value in asdict(self).items()}
        return values | {"skip": list(self.skip)}

    def skipped(self, layers: Sequence[str]) -> dict[str, str]:
        """The layers that `skip` names, each with its pattern.

        Raises:
            SettingError: a pattern matches none of them.
        """
        return {name: pattern for pattern in self.skip for name in _matching("skip", pattern, layers)}

    def bits_of(self, layers: Sequence[str], ends: Sequence[str]) -> dict[str, int]:
        """The bit width of each layer.

        Args:
            layers: that are quantized, in the order they run.
            ends: the input layers and the heads among them.

        Raises:
            SettingError: a pattern of `layer_bits` matches none of them.
        """
        return dict.fromkeys(layers, self.n_bits) | self.named_bits(layers, ends)

    def named_bits(self, layers: Sequence[str], ends: Sequence[str]) -> dict[str, int]:
        """`bits_of` those layers that `first_last_bits` or `layer_bits` name."""
        bits = {}
        if self.first_last_bits is not None:
            bits = {name: self.first_last_bits for name in ends if name in layers}
        for pattern, width in self.layer_bits.items():
            bits |= dict.fromkeys(_matching("layer_bits", pattern, layers), width)
        return bits

    def activation_bits(self, layers: Sequence[str], inputs: Sequence[str], heads: Sequence[str]) -> dict[str, int]:
        """The bit width of each layer's input, of those that are quantized; arguments as `bits_of`."""
        if not self.quantizes_activations:
            return {}
        bits = dict.fromkeys(layers, self.n_bits_a)
        for names, width in ((inputs, self.actual_input_bits_a), (heads, self.actual_head_bits_a)):
            bits |= {name: width for name in names if name in bits}
        return {name: width for name, width in bits.items() if width != FLOAT_BITS}


def _matching(setting: str, pattern: str, layers: Sequence[str]) -> list[str]:
    found = [name for name in layers if fnmatchcase(name, pattern)]
    if not found:
        shown = ", ".join(layers[:4]) + f", … {layers[-1]}" * (len(layers) > 4)
        raise SettingError(f"{setting}: {pattern!r} matches no layer that is quantized; they are {shown}")
    return found


def _checked_type(name: str, kind: str, value: Any) -> Any:
    """A field's value, which must be of the type that its annotation says, as that type."""
    if kind.startswith("Mapping"):
        if not isinstance(value, Mapping):
            raise ValueError(f"{name} must be bits by pattern, got {value!r}")
        return {str(pattern): _checked_type(name, "int", bits) for pattern, bits in value.items()}
    if kind.startswith("Sequence"):
        if isinstance(value, str) or not all(isinstance(pattern, str) for pattern in value):
            raise ValueError(f"{name} must be a list of patterns, got {value!r}")
        return tuple(value)
    if kind == "bool" and not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False, got {value!r}")
    if kind == "float | str" and value == "auto":
        return value
    if kind in ("float", "float | str") or (kind == "float | None" and value is not None):
        if isinstance(value, bool) or not isinstance(value, Real):
            raise ValueError(f"{name} must be a number, got {value!r}")
        return float(value)
    if kind == "int" or (kind == "int | None" and value is not None):
        if isinstance(value, bool) or not hasattr(value, "__index__"):
            raise ValueError(f"{name} must be a whole number, got {value!r}")
        return operator.index(value)
    return value
