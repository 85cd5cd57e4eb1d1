"""The paper's ten ablation rows, run by `ablation_cnn.sh` and `ablation_vit.sh`: `python scripts/ablation.py --help`.

Each row is a command in a process of its own, with --once, so that a sweep goes on where it stopped and several share
the work.
"""

from __future__ import annotations

from logart.interrupt import guarded, interrupted, leaving_at_once

with leaving_at_once("ablation"):
    import csv
    import os
    import shlex
    import signal
    import sys
    import time
    from collections.abc import Mapping
    from pathlib import Path
    from typing import Any, NamedTuple

    from logart import ranks
    from logart.cli import FlagParser
    from logart.errors import UserError
    from logart.runs.process import run_in_subprocess

GRIDS = {
    "base 2": "--scale_method log_2",
    "base √2": "--scale_method log_sqrt2",
    "dynamic, TW": "--scale_method dynamic --search_method tensor_wise",
    "dynamic, LW": "--scale_method dynamic --search_method layer_wise",
    "dynamic, BW": "--scale_method dynamic --search_method block_wise",
}
SEARCH_IMAGES, LLR_IMAGES = "32", "1024"
WAIT_SECONDS = 60  # between two looks at rows that others run: an owner that was killed leaves its files behind
EPILOG = """environment (default): BITS (4) and SEEDS (0), each one or several numbers; ITERS, steps of LLR per block
(the entry point's own); DEVICE (auto; under torchrun, auto is the worker's own GPU); RESULTS (results.csv), the file
that all workers share; EXTRA, more flags of the entry point, for every row; EXTRA_LLR, for the rows with LLR."""


class Track(NamedTuple):
    """What an entry point calls its flags, and its built-in network."""

    module: str
    data: str
    network: str
    bits: str
    search_images: str
    llr_images: str
    builtin: str


TRACKS = {
    "cnn": Track("logart_cnn.main", "--data_path", "--arch", "--n_bits_w", "--search_samples", "--calib_samples",
                 "digits_resnet"),
    "vit": Track("logart_vit.main", "--dataset", "--model", "--w_bit", "--calib_size", "--optim_size", "digits_vit"),
}  # fmt: skip


class Row(NamedTuple):
    """One row: what it is called, and the entry point's module and flags."""

    title: str
    words: list[str]


class Refused(Exception):
    """The first row was refused as a wrong call: what is wrong most likely is so in every row."""


def sweep(track: str, data: str, networks: list[str], environment: Mapping[str, str], device: str) -> list[Row]:
    """The rows in the order of the paper's table, network by network, bits by bits, seed by seed.

    Raises:
        UserError: a variable of the environment that is no number, or cannot be split into words.
    """
    t = TRACKS[track]
    every, learned = _words(environment, "EXTRA"), _words(environment, "EXTRA_LLR")
    iters = _numbers(environment, "ITERS", "")
    if len(iters) > 1:
        raise UserError(f"ITERS: {environment['ITERS']!r}; expected one number")
    settings = [
        (network, bits, seed)
        for network in networks or [t.builtin]
        for bits in _numbers(environment, "BITS", "4")
        for seed in _numbers(environment, "SEEDS", "0")
    ]
    rows = []
    for network, bits, seed in settings:
        common = [t.module, t.data, data, t.network, network, t.bits, bits, "--channel_wise", "--seed", seed]
        common += ["--device", device, "--results", environment.get("RESULTS") or "results.csv", "--once"]
        for grid, flags in GRIDS.items():
            words = [*common, *flags.split()]
            words += [t.search_images, SEARCH_IMAGES] if "dynamic" in grid else []
            llr = ["--rounding", "learned", t.llr_images, LLR_IMAGES, *(["--iters_w", *iters] if iters else [])]
            title = f"{network}, {bits} bits, seed {seed}: {grid}"
            rows.append(Row(title, [*words, "--rounding", "nearest", *every]))
            rows.append(Row(f"{title}, LLR", [*words, *llr, *every, *learned]))
    return rows


def _numbers(environment: Mapping[str, str], name: str, default: str) -> list[str]:
    numbers = (environment.get(name) or default).split()
    for number in numbers:
        if not (number.isascii() and number.isdigit()):
            raise UserError(f"{name}: {number!r}; expected numbers with spaces between, such as {name}='2 3 4'")
    return list(dict.fromkeys(numbers))


def _words(environment: Mapping[str, str], name: str) -> list[str]:
    try:
        return shlex.split(environment.get(name, ""))
    except ValueError as error:
        raise UserError(f"{name}: {environment[name]!r} ({error}); expected flags as in a shell") from None


def worker_device(environment: Mapping[str, str]) -> str:
    """DEVICE; where that is auto, and torchrun started this process on a machine with GPUs, the worker's own."""
    asked = environment.get("DEVICE") or "auto"
    if asked == "auto" and "LOCAL_RANK" in environment:
        from logart.runtime import resolve_device  # imports torch, for which no other worker has to wait

        if resolve_device("auto").type == "cuda":
            return f"cuda:{environment['LOCAL_RANK']}"
    return asked


def own_order(rows: list[Row], environment: Mapping[str, str]) -> list[Row]:
    """All rows, from this worker's share on: workers of torchrun or of a Slurm array then seldom meet."""
    for rank, count in (("RANK", "WORLD_SIZE"), ("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT")):
        if rank in environment and count in environment:
            start = len(rows) * int(environment[rank]) // int(environment[count]) % len(rows)
            return rows[start:] + rows[:start]
    return rows


def run_row(words: list[str]) -> int:
    """Run a row in a process of its own; returns its exit code."""
    command = words[0].replace(".main", ".command")  # what takes seconds to import, for all rows at once
    return run_in_subprocess(words, command, *(["sklearn.datasets"] if "digits" in words else []))


def run_all(rows: list[Row], claims: Path, wait: bool) -> tuple[list[Row], list[Row]]:
    """Run each row that nobody has run or is running; returns those that failed and those that others still run.

    Rows that others run are tried again as long as that brings anything, or, to `wait`, until nobody runs any.

    Raises:
        Refused: the first row was; its own line has said why.
    """
    from logart.runs.claims import CLAIMED_ELSEWHERE

    left, failed = list(enumerate(rows, 1)), []
    while left:
        before, again = _listing(claims), []
        for number, row in left:
            print(f"[{number}/{len(rows)}] {row.title}\n  python -m {shlex.join(row.words)}", flush=True)
            code = run_row(row.words)
            if code == CLAIMED_ELSEWHERE:
                again.append((number, row))
            elif code == 2 and row is rows[0]:
                raise Refused
            elif code:
                failed.append(row)
        if len(again) == len(left):
            if not wait:
                break
            _wait_for_change(claims, before)
        left = again
    return failed, [row for _, row in left]


def best_rows(results: str, rows: list[Row]) -> str:
    """The most accurate row of each network and bit width of the sweep, as a table."""
    from logart.runs.headline import headline

    def key(row: Mapping[str, str]) -> tuple[str, str]:
        return row.get("arch", ""), row.get("bits", "")

    swept = {(row.words[4], row.words[6]) for row in rows}
    best: dict[tuple[str, str], dict[str, str]] = {}
    with open(results, encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if key(row) in swept and float(row["Acc@1"]) > float(best.get(key(row), {}).get("Acc@1", -1)):
                best[key(row)] = row
    return headline(best.values())


def _listing(folder: Path) -> set[str]:
    try:
        return set(os.listdir(folder))
    except FileNotFoundError:
        return set()


def _wait_for_change(claims: Path, before: set[str]) -> None:
    end = time.monotonic() + WAIT_SECONDS
    while _listing(claims) == before and time.monotonic() < end:
        time.sleep(1)


def _stop(number: int, frame: Any) -> None:
    raise SystemExit(128 + number)


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns 0, 1 where a row failed, 2 for a wrong call, 130 after Ctrl-C."""
    parser = FlagParser(prog="ablation", description=__doc__.split(",")[0] + ".", epilog=EPILOG)
    parser.add_argument("track", choices=list(TRACKS))
    parser.add_argument("data", nargs="?", default="digits", help="a folder in ImageNet layout, or digits (default)")
    parser.add_argument("networks", nargs="*", help="as the entry point's --arch or --model (default the built-in one)")
    args = parser.parse_args(argv)
    from logart.runs.claims import claims_folder  # the help needs nothing but Python's own library

    environment = dict(os.environ)
    for name in ranks.VARIABLES:  # each row is a run of its own
        os.environ.pop(name, None)
    try:
        device = worker_device(environment)
        rows = own_order(sweep(args.track, args.data, args.networks, environment, device), environment)
    except UserError as error:
        parser.error(str(error))
    results = environment.get("RESULTS") or "results.csv"
    signal.signal(signal.SIGTERM, _stop)  # by which Slurm and torchrun end their workers
    started = time.perf_counter()
    try:
        # torchrun ends all workers when one ends badly, so none may do that while others are at work.
        failed, elsewhere = run_all(rows, claims_folder(results), wait="TORCHELASTIC_RUN_ID" in environment)
    except Refused:
        return 2
    except KeyboardInterrupt:
        return interrupted("ablation", "the same call goes on with the rows that are missing")
    done = len(rows) - len(failed) - len(elsewhere)
    print(f"{done} of {len(rows)} rows are in {results} ({time.perf_counter() - started:.0f} s)")
    if done:
        print(best_rows(results, rows))
    for row in elsewhere:
        print(f"others are at: {row.title}")
    for row in failed:
        print(f"failed: {row.title}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(guarded("ablation", main))
