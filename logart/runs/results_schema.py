"""The columns of results.csv, the same for both tracks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

Cell = str | int | float | Path | None


class Column(NamedTuple):
    """One column: its name in the header, its unit ("" when it has none) and what it says."""

    name: str
    unit: str
    meaning: str


COLUMNS = (
    Column("utc_time", "ISO 8601, UTC", "when the row was written"),
    Column("track", "", "`cnn` or `vit`, the entry point that ran"),
    Column("arch", "", "the network's name, as given to the entry point"),
    Column("checkpoint", "", "where the float weights come from: a file, a URL or timm's full tag"),
    Column("checkpoint_sha256", "hex", "SHA-256 of the float weights' file"),
    Column("network_options", "", "overrides of the network's own settings: model kwargs, input size, mean, …"),
    Column("data", "", "the data set: `digits`, or the name of its folder"),
    Column("bits", "bits", "width of a weight's code"),
    Column("first_last_bits", "bits", "width in the first and last layer, or `same`"),
    Column("channel_wise", "", "`True`: a codebook per output channel; `False`: one per layer"),
    Column("scale_method", "", "the grid: linear, base 2, base sqrt 2 or dynamic"),
    Column("scale_search", "", "`grid`, `half_step` or `none`: which factors of the levels were tried, per channel"),
    Column("asymmetric", "", "`True`: codes that a channel's shorter sign never reaches are small levels"),
    Column("zero_code", "", "`True`: one code is zero"),
    Column("search_method", "", "the error that DBS and scale search minimise; compensated rounding has its own"),
    Column("search_samples", "images", "calibration images seen by DBS"),
    Column("search_batch_size", "images", "calibration images at a time in DBS"),
    Column("preset", "", "the preset that gave the defaults"),
    Column("rounding", "", "`nearest`, `compensated`, `learned` (LLR) or `both`"),
    Column("calib_samples", "images", "calibration images seen by LLR and compensated rounding"),
    Column("batch_size", "images", "calibration images per LLR step"),
    Column("iters_w", "steps", "LLR steps per block; 0: no LLR"),
    Column("lr", "", "LLR's learning rate at the start"),
    Column("rrweight", "", "weight of the rounding penalty against the reconstruction loss"),
    Column("b_start", "", "exponent of the rounding penalty at the start"),
    Column("b_end", "", "exponent of the rounding penalty at the end"),
    Column("warmup", "fraction", "share of the LLR steps without the rounding penalty"),
    Column("recon_input", "", "a block's input in LLR: from the `quantized` or `float` prefix, or a mix"),
    Column("recon_metric", "", "LLR's reconstruction loss; `+kl`: the last layer's is the KL divergence"),
    Column("drop_prob", "probability", "share of a `mixed` input taken from the quantized prefix"),
    Column("temperature", "", "of the KL divergence behind `hessian_perturb`"),
    Column("hardware_approx", "", "`True`: sqrt 2 is a sum of powers of two during search, rounding and evaluation"),
    Column("hardware_approx_terms", "", "how many powers of two, there or at test only: 1 + 1/2 are 2"),
    Column("calib_augment", "", "`True`: calibration images are randomly cropped and flipped"),
    Column("calib_list", "hex", "start of the SHA-256 of the names in `--calib_list`; empty where the seed chose"),
    Column("capture_precision", "", "`half`: captured inputs and targets were rounded by `--cache half`; else empty"),
    Column("seed", "", "seed of every random choice"),
    Column("config", "", "the settings file of the run; ViT only"),
    Column("val_images", "images", "test images behind each accuracy"),
    Column("Acc@1", "%", "top-1 accuracy of the final quantized network"),
    Column("Acc@5", "%", "top-5 accuracy of the final quantized network"),
    Column("float_Acc@1", "%", "top-1 accuracy of the float network"),
    Column("float_Acc@5", "%", "top-5 accuracy of the float network"),
    Column("search_Acc@1", "%", "top-1 accuracy after DBS, before LLR"),
    Column("search_Acc@5", "%", "top-5 accuracy after DBS, before LLR"),
    Column("approx_Acc@1", "%", "top-1 accuracy with the hardware approximation at test only"),
    Column("approx_Acc@5", "%", "top-5 accuracy with the hardware approximation at test only"),
    Column("search_seconds", "s", "time of DBS"),
    Column("reconstruction_seconds", "s", "time of compensated rounding and LLR"),
    Column("total_seconds", "s", "time of the whole run, evaluations included"),
    Column("peak_memory_mb", "MiB", "most memory used: the GPU's on CUDA, the process's on the CPU"),
    Column("device", "", "where the run computed"),
    Column("torch_version", "", "version of torch"),
    Column("timm_version", "", "version of timm"),
    Column("project_version", "", "version of this project"),
)
NAMES = tuple(column.name for column in COLUMNS)
SETTINGS = NAMES[NAMES.index("track") : NAMES.index("val_images")]  # what decides a run; the others say how it went


def columns_markdown() -> str:
    """The table of every column with its unit and meaning, as the README shows it."""
    head = ["| column | unit | meaning |", "|---|---|---|"]
    return "\n".join(head + [f"| `{name}` | {unit} | {meaning} |" for name, unit, meaning in COLUMNS])
