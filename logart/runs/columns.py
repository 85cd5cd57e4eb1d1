"""The columns of results.csv, the same for both tracks: each is one entry of `COLUMNS`, and nothing else lists them.

An entry says what the documentation, the results file, `--once`, `--resume` and the report need to know of a column.
`python -m logart.runs.columns` prints docs/results_csv.md. Without torch, so that a row that is there is found at once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from enum import Enum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from logart.networks.evaluate import Accuracy
    from logart.quantization.config import QuantConfig

Cell = str | int | float | Path | None


class Part(Enum):
    """What a column is about; the value is its heading in the documentation."""

    NETWORK = "network and data"
    METHOD = "method"
    GRID = "grid"
    SEARCH = "search"
    IMAGES = "calibration images"
    CALIBRATION = "compensated and learned rounding"
    LLR = "learned rounding"
    ACTIVATIONS = "activations"
    DEFAULTS = "defaults"
    SEED = "seed"
    ACCURACY = "accuracy"
    COST = "cost"
    SURROUNDINGS = "surroundings"

    @property
    def is_setting(self) -> bool:
        """Whether its columns are known before the run and decide it; the others say how it went."""
        return self not in (Part.ACCURACY, Part.COST, Part.SURROUNDINGS)


class When(NamedTuple):
    """In which runs a setting acts."""

    words: str
    holds: Callable[[QuantConfig], bool]


ALWAYS = When("", lambda config: True)
SEARCHES = When("DBS or scale search", lambda config: config.searches and config.method.uses_dbs)
SEARCHES_DATA = When("search by layer or block outputs", lambda config: config.searches_data)
SEARCH_IMAGES = When(
    "search by layer or block outputs; a budget of bits without `calib_samples`",
    lambda config: config.searches_data or config.has_budget and not config.method.calibrates,
)
SEES_IMAGES = When("any stage that looks at calibration images", lambda config: config.images_needed > 0)
CALIBRATES = When("compensated rounding, LLR, quantized activations", lambda config: config.calibrates)
COMPENSATES = When("compensated rounding", lambda config: not config.method.uses_dbs)
ACTIVATIONS = When("quantized activations", lambda config: config.quantizes_activations)
LEARNS = When("LLR", lambda config: config.learns)
MIXES = When("LLR, input `mixed`", lambda config: config.learns and config.recon_input.value == "mixed")
WEIGHTED = When(
    "LLR, loss `hessian_perturb`", lambda config: config.learns and config.recon_metric.value == "hessian_perturb"
)


def grid_option(name: str) -> When:
    """Where a grid has this option (`Grid.options`)."""
    return When("grids that have this option", lambda config: name in config.grid.options)


@dataclass(frozen=True)
class Facts:
    """What a row is made from.

    Attributes:
        config: the settings.
        said: cells that only the command line can say, by column.
        terms_at_test: powers of two that stand for √2 at test only; 0 where none do.
        accuracies: by stage: float, searched, rounded, approximated.
        quantized_share: of the network's weights, 0 to 1.
        layers_by_bits: how many layers have each width.
        mean_bits: per quantized weight.
        search_seconds, reconstruction_seconds, total_seconds: what took how long.
        memory_mb: the run's peak.
        packed_bytes: of the network as a packed file; 0 where nobody packed it.
        device: as `device_name` gives it.
    """

    config: QuantConfig
    said: Mapping[str, Cell] = field(default_factory=dict)
    terms_at_test: int = 0
    accuracies: Mapping[str, Accuracy] = field(default_factory=dict)
    quantized_share: float = 0.0
    layers_by_bits: Mapping[int, int] = field(default_factory=dict)
    mean_bits: float = 0.0
    search_seconds: float = 0.0
    reconstruction_seconds: float = 0.0
    total_seconds: float = 0.0
    memory_mb: float = 0.0
    packed_bytes: int = 0
    device: str = ""

    def accuracy(self, stage: str, top: int) -> Cell:
        """In %, of a stage or of the final network; None where it was not measured."""
        event = {"final": self.final, "weights": self.of_weights}.get(stage, stage)
        measured = self.accuracies.get(event)
        return None if measured is None else round(measured.top1 if top == 1 else measured.top5, 3)

    def against_float(self, place: int) -> Cell:
        """Lost, won or agreement of the final network, see `Accuracy.against`; None where not both were measured."""
        final, reference = self.accuracies.get(self.final), self.accuracies.get("float")
        found = None if final is None or reference is None else final.against(reference)
        return None if found is None else round(found[place], 3)

    @property
    def of_weights(self) -> str:
        """The stage behind which weights are quantized and activations are not yet; "" where that is all there is."""
        behind = self.config.quantizes_activations and not self.config.calibrate_with_act
        return self.config.method.stages[-1].event if behind else ""

    @property
    def final(self) -> str:
        """The stage that gives the final network."""
        return self.config.stages[-1].event


@dataclass(frozen=True)
class Column:
    """One column.

    Attributes:
        name: in the header.
        part: what it is about; decides whether it is a setting and which rows a report averages.
        meaning: for the documentation.
        unit: "" where there is none.
        when: in which runs it acts.
        idle: the cell of a run in which it does not.
        value: the cell of a run in which it acts; None: what the command line says.
    """

    name: str
    part: Part
    meaning: str
    value: Callable[[Facts], Cell] | None = None
    unit: str = ""
    when: When = ALWAYS
    idle: Cell = None

    def cell(self, facts: Facts) -> Cell:
        """What the row of a run gets."""
        if not self.when.holds(facts.config):
            return self.idle
        return facts.said.get(self.name) if self.value is None else self.value(facts)


def _of_config(name: str, part: Part, meaning: str, field: str = "", **more: Any) -> Column:
    """A column that holds a setting as it is: the field of QuantConfig of this name, or of the column's."""

    def value(facts: Facts) -> Cell:
        found = getattr(facts.config, field or name)
        return str(found) if isinstance(found, bool) else getattr(found, "value", found)

    return Column(name, part, meaning, value, **more)


def _accuracy(name: str, stage: str, top: int, what: str) -> Column:
    return Column(name, Part.ACCURACY, f"top-{top} accuracy {what}", lambda f: f.accuracy(stage, top), unit="%")


def _version(name: str) -> Column:
    package = VERSIONS[name]
    return Column(name, Part.SURROUNDINGS, f"version of {package}", lambda f: package_version(package))


VERSIONS = {"torch_version": "torch", "timm_version": "timm", "project_version": "logart"}
COLUMNS = (
    Column("utc_time", Part.SURROUNDINGS, "when the row was written", lambda f: utc_now(), unit="ISO 8601, UTC"),
    Column("track", Part.NETWORK, "`cnn` or `vit`, the entry point that ran"),
    Column("arch", Part.NETWORK, "the network's name, as given to the entry point"),
    Column("checkpoint", Part.NETWORK,
           "where the float weights come from: a file (`file:entry` where it has entries), a URL or timm's full tag"),
    Column("checkpoint_sha256", Part.NETWORK, "SHA-256 of the float weights' file", unit="hex"),
    Column("network_options", Part.NETWORK,
           "overrides of the network's own settings: model kwargs, input size, mean, …"),
    Column("data", Part.NETWORK, "the data set: `digits`, or the name of its folder"),
    Column("class_order", Part.NETWORK,
           "which output each class folder is, where that had to be said: `number`, `text`, `checkpoint` (its own "
           "`class_to_idx`), `map:` and a hash"),
    Column("val_limit", Part.NETWORK, "`--val_limit`: accuracies are of so many images only; empty: of all",
           unit="images"),
    _of_config("bits", Part.METHOD, "width of a weight's code; with `bits_budget`, that rounded up", "n_bits",
               unit="bits"),
    Column("first_last_bits", Part.GRID, "width in the input layers and the heads, or `same`",
           lambda f: f.config.first_last_bits or "same", unit="bits"),
    Column("layer_bits", Part.GRID, "widths of layers by name, `PATTERN=BITS`", unit="bits",
           value=lambda f: " ".join(f"{pattern}={bits}" for pattern, bits in f.config.layer_bits.items()) or None),
    _of_config("bits_budget", Part.GRID, "mean width over the quantized weights that was allowed", unit="bits"),
    _of_config("size_budget", Part.GRID, "size of all packed codes that was allowed", unit="bytes"),
    Column("skip", Part.GRID, "patterns of the names of layers that were to stay float",
           lambda f: " ".join(f.config.skip) or None),
    _of_config("channel_wise", Part.GRID, "`True`: a codebook per output channel; `False`: one per layer"),
    _of_config("scale_method", Part.METHOD, "the grid, by the name that `--scale_method` has for it"),
    _of_config("scale_search", Part.GRID,
               "`grid`, `half_step` or `none`: which factors of the levels were tried, per channel",
               when=grid_option("scale_search"), idle="none"),
    _of_config("asymmetric", Part.GRID, "`True`: codes that a channel's shorter sign never reaches are small levels",
               when=grid_option("asymmetric"), idle="False"),
    _of_config("zero_code", Part.GRID, "`True`: one code is zero", when=grid_option("zero_code"), idle="False"),
    Column("wide_gap", Part.GRID, "`True`: smallest magnitudes may lie one or two half-steps lower",
           lambda f: "True" if f.config.wide_gap else None, when=grid_option("wide_gap")),
    _of_config("search_method", Part.METHOD,
               "the error that DBS and scale search minimise; compensated rounding has its own", when=SEARCHES),
    _of_config("search_samples", Part.SEARCH, "calibration images seen by DBS", unit="images", when=SEARCH_IMAGES),
    _of_config("search_batch_size", Part.SEARCH, "calibration images at a time in DBS", unit="images",
               when=SEARCHES_DATA),
    Column("preset", Part.DEFAULTS, "the preset that gave the defaults"),
    Column("rounding", Part.METHOD, "`nearest`, `compensated`, `learned` (LLR) or `both`",
           lambda f: f.config.method.name),
    _of_config("calib_samples", Part.CALIBRATION, "calibration images seen by LLR and compensated rounding",
               unit="images", when=CALIBRATES),
    _of_config("batch_size", Part.CALIBRATION, "calibration images per LLR step", unit="images", when=CALIBRATES),
    _of_config("damping", Part.CALIBRATION,
               "λ of compensated rounding over the mean squared input; `auto`: by images kept back, layer by layer",
               when=COMPENSATES),
    _of_config("mirror", Part.CALIBRATION, "`True`: calibration images were seen mirrored, too",
               when=SEES_IMAGES, idle="False"),
    Column("crops", Part.CALIBRATION, "how many further crops of every calibration image were seen; empty: none",
           lambda f: f.config.crops or None, when=SEES_IMAGES),
    _of_config("iters_w", Part.LLR, "LLR steps per block; 0: no LLR", "iters", unit="steps", when=LEARNS, idle=0),
    _of_config("lr", Part.LLR, "LLR's learning rate at the start", when=LEARNS),
    _of_config("rrweight", Part.LLR, "weight of the rounding penalty against the reconstruction loss", when=LEARNS),
    _of_config("b_start", Part.LLR, "exponent of the rounding penalty at the start", when=LEARNS),
    _of_config("b_end", Part.LLR, "exponent of the rounding penalty at the end", when=LEARNS),
    _of_config("warmup", Part.LLR, "share of the LLR steps without the rounding penalty", unit="fraction", when=LEARNS),
    _of_config("recon_input", Part.LLR, "a block's input in LLR: from the `quantized` or `float` prefix, or a mix",
               when=LEARNS),
    Column("recon_metric", Part.LLR, "LLR's reconstruction loss; `+kl`: the last layer's is the KL divergence",
           lambda f: f.config.recon_metric.value + "+kl" * f.config.head_kl, when=LEARNS),
    _of_config("drop_prob", Part.LLR, "share of a `mixed` input taken from the quantized prefix", unit="probability",
               when=MIXES),
    _of_config("temperature", Part.LLR, "of the KL divergence behind `hessian_perturb`", when=WEIGHTED),
    _of_config("bits_a", Part.ACTIVATIONS, "width of the input of every quantized layer", "n_bits_a", unit="bits",
               when=ACTIVATIONS),
    _of_config("input_bits_a", Part.ACTIVATIONS, "the same of the input layers", "actual_input_bits_a", unit="bits",
               when=ACTIVATIONS),
    _of_config("head_bits_a", Part.ACTIVATIONS, "the same of the heads", "actual_head_bits_a", unit="bits",
               when=ACTIVATIONS),
    _of_config("act_scale", Part.ACTIVATIONS, "steps between levels of activations: `pow2` or `float` (any)",
               "actual_act_scale", when=ACTIVATIONS),
    _of_config("softmax_grid", Part.ACTIVATIONS,
               "levels of what softmax gives: `uniform`, as of other activations, or a log grid", when=ACTIVATIONS),
    _of_config("calibrate_with_act", Part.ACTIVATIONS,
               "`True`: search and rounding of the weights saw quantized activations", when=ACTIVATIONS),
    _of_config("iters_a", Part.ACTIVATIONS, "steps for which each block's activation scales were learned", unit="steps",
               when=ACTIVATIONS),
    Column("hardware_approx", Part.GRID,
           "`True`: sqrt 2 is a sum of powers of two during search, rounding and evaluation",
           lambda f: str(bool(f.config.hardware_terms))),
    Column("hardware_approx_terms", Part.GRID, "how many powers of two, there or at test only: 1 + 1/2 are 2",
           lambda f: f.terms_at_test or f.config.hardware_terms or None),
    Column("calib_augment", Part.IMAGES, "`True`: calibration images are randomly cropped and flipped; CNN only",
           when=SEES_IMAGES),
    Column("calib_list", Part.IMAGES,
           "start of the SHA-256 of the names in `--calib_list`; empty where the seed chose", unit="hex",
           when=SEES_IMAGES),
    Column("calib_from", Part.IMAGES,
           "where calibration images come from: `path:FOLDER`, `val:N` (N of `val`, accuracies are of the others); "
           "empty: `train`"),
    Column("capture_precision", Part.IMAGES,
           "`half`: captured inputs and targets were rounded by `--cache half`; else empty"),
    _of_config("seed", Part.SEED, "seed of every random choice"),
    Column("config", Part.DEFAULTS, "the settings file of the run; ViT only"),
    Column("val_images", Part.ACCURACY, "test images behind each accuracy",
           lambda f: f.accuracies[f.final].images, unit="images"),
    _accuracy("Acc@1", "final", 1, "of the final quantized network"),
    _accuracy("Acc@5", "final", 5, "of the final quantized network"),
    _accuracy("float_Acc@1", "float", 1, "of the float network"),
    _accuracy("float_Acc@5", "float", 5, "of the float network"),
    _accuracy("search_Acc@1", "searched", 1, "after DBS, before LLR"),
    _accuracy("search_Acc@5", "searched", 5, "after DBS, before LLR"),
    _accuracy("weights_Acc@1", "weights", 1, "of the same weights before activations were quantized"),
    _accuracy("weights_Acc@5", "weights", 5, "of the same weights before activations were quantized"),
    _accuracy("approx_Acc@1", "approximated", 1, "with the hardware approximation at test only"),
    _accuracy("approx_Acc@5", "approximated", 5, "with the hardware approximation at test only"),
    Column("quantized_weights", Part.COST, "share of the network's weights that was quantized",
           lambda f: round(100 * f.quantized_share, 3), unit="%"),
    Column("layers_by_bits", Part.COST, "how many layers have each width, `WIDTH:LAYERS`",
           lambda f: " ".join(f"{bits}:{count}" for bits, count in f.layers_by_bits.items())),
    Column("lost", Part.ACCURACY, "test images that the float network has right and the quantized one has not",
           lambda f: f.against_float(0), unit="images"),
    Column("won", Part.ACCURACY, "test images that the quantized network has right and the float one has not",
           lambda f: f.against_float(1), unit="images"),
    Column("agreement", Part.ACCURACY, "test images that both networks give the same class",
           lambda f: f.against_float(2), unit="%"),
    Column("mean_bits", Part.COST, "mean width over the quantized weights", lambda f: round(f.mean_bits, 4),
           unit="bits"),
    Column("search_seconds", Part.COST, "time of DBS", lambda f: round(f.search_seconds, 3), unit="s"),
    Column("reconstruction_seconds", Part.COST, "time of compensated rounding and LLR",
           lambda f: round(f.reconstruction_seconds, 3), unit="s"),
    Column("total_seconds", Part.COST, "time of the whole run, evaluations included", 
           lambda f: round(f.total_seconds, 3), unit="s"),
    Column("peak_memory_mb", Part.COST, "most memory used: the GPU's on CUDA, the process's on the CPU",
           lambda f: round(f.memory_mb), unit="MiB"),
    Column("packed_bytes", Part.COST, "size of the quantized network as a packed file, less what is known of the run",
           lambda f: f.packed_bytes or None, unit="bytes"),
    Column("device", Part.SURROUNDINGS, "where the run computed", lambda f: f.device),
    *map(_version, VERSIONS),
    Column("command", Part.SURROUNDINGS, "what gives these figures again; files and folders by their last names"),
    Column("run_id", Part.SURROUNDINGS,
           "of the settings (before the dash) and of this very run: `--once` looks for the first, `--resume` for both"),
)  # fmt: skip
NAMES = tuple(column.name for column in COLUMNS)
SETTINGS = tuple(column.name for column in COLUMNS if column.part.is_setting)
SETTINGS_OF_COMMAND = tuple(c.name for c in COLUMNS if c.part.is_setting and c.value is None)


def columns_of(*parts: Part) -> tuple[str, ...]:
    """The names of all columns about these."""
    return tuple(column.name for column in COLUMNS if column.part in parts)


def settings_row(facts: Facts) -> dict[str, Cell]:
    """The cells that are known before a run, by column."""
    return {column.name: column.cell(facts) for column in COLUMNS if column.part.is_setting}


def measured_row(facts: Facts) -> dict[str, Cell]:
    """The cells that a run ends with, by column, but for its `run_id`."""
    return {column.name: column.cell(facts) for column in COLUMNS if not column.part.is_setting}


def utc_now() -> str:
    """The time as rows write it."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def package_version(package: str) -> str:
    """ "" where it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def versions() -> dict[str, str]:
    """The columns of versions."""
    return {column: package_version(package) for column, package in VERSIONS.items()}


def documentation() -> str:
    """docs/results_csv.md: every column with its unit, its meaning and when it acts."""
    lines = [
        "# results.csv",
        "",
        "Every run appends one row, also where `--results` names another file. Processes on several machines may share",
        "a file. One of an older version gets the columns that it lacks, empty in the rows that are there; columns of",
        "your own are kept and stay empty in new rows. A cell is empty where its column does not act. Rows whose",
        "settings are equal but for the seed are averaged by `python -m logart.report`.",
        "",
        "This page is printed by `python -m logart.runs.columns`.",
    ]
    for title, setting in (("Settings, known before the run", True), ("Measurements", False)):
        lines += ["", f"## {title}", "", "| column | part | unit | meaning | acts in |", "|---|---|---|---|---|"]
        lines += [
            f"| `{c.name}` | {c.part.value} | {c.unit} | {c.meaning} | {c.when.words or 'every run'} |"
            for c in COLUMNS
            if c.part.is_setting == setting
        ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(documentation(), end="")
