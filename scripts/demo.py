"""Both tracks on the built-in digits, by the presets `paper` and `fast`, side by side: `python scripts/demo.py --help`.

Flags that are not this script's go on to every run (`--seed`, `--device`, `--quiet`, …).
"""

from __future__ import annotations

from logart.interrupt import guarded, interrupted, leaving_at_once

with leaving_at_once("demo"):
    import argparse
    import csv
    import sys

    from logart.runs.process import run_in_subprocess

TRACKS = ("logart_cnn.main", "logart_vit.main")
COMMANDS = ("logart_cnn.command", "logart_vit.command")  # what takes seconds to import, for all runs at once
RESULTS = "demo.csv"


def main(argv: list[str] | None = None) -> int:
    """The entry point; returns the first exit code that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument(
        "--iters_w", default="1000", help="LLR steps per block (default 1000; the paper's 20,000 take long)"
    )
    parser.add_argument(
        "--results", default=RESULTS, help=f"the CSV file that gets the rows (default {RESULTS}, which git ignores)"
    )
    args, others = parser.parse_known_args(argv)
    runs = [[track, "--preset", "paper", "--iters_w", args.iters_w] for track in TRACKS]
    runs += [[track, "--preset", "fast"] for track in TRACKS]
    for run in sorted(runs):
        try:
            code = run_in_subprocess([*run, "--results", args.results, *others], *COMMANDS, "sklearn.datasets")
        except KeyboardInterrupt:
            return interrupted("demo", f"the rows of finished runs are in {args.results}")
        if code:
            return code
    from logart.runs.headline import headline  # here, since each run's process imports this file too

    with open(args.results, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))[-len(runs) :]
    print(f"\nside by side ({args.iters_w} steps a block in `paper`, none in `fast`):")
    print(headline(rows))
    return 0


if __name__ == "__main__":
    sys.exit(guarded("demo", main))
