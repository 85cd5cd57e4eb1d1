"""What both commands do once they have a network, its images and settings: claim the row, open the folder, run."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from torch import Tensor

from logart.networks.data import ImageSource
from logart.networks.network import Network
from logart.quantization.config import QuantConfig, describe
from logart.runs.claims import claimed
from logart.runs.columns import Cell, Facts, settings_row
from logart.runs.preflight import check_network
from logart.runs.results_file import new_run_id
from logart.runs.resume import PLACES, begun, fingerprint, opened
from logart.runs.run import RunOptions, run

_ELSEWHERE = ("results", "save", "save_calib_list", "once", "quiet")  # flags that change nothing of the figures


def command_line(track: str, flags: Mapping[str, Any]) -> str:
    """What a shell would be told to get a run's figures again, with files and folders by their last names.

    Args:
        track: the entry point, `cnn` or `vit`.
        flags: by name those that were given, as `resume.flags_to_keep` has them.
    """
    words = [f"logart-{track}"]
    for name, value in flags.items():
        if name not in _ELSEWHERE:
            values = [] if value is True else value if isinstance(value, list) else [value]
            words.append(f"--{name}")
            words += [PurePath(one).name if name in PLACES else str(getattr(one, "value", one)) for one in values]
    return shlex.join(words)


@dataclass(frozen=True)
class Job:
    """A run that waits to be done.

    Attributes:
        network, source, config, options, started: as for `run.run`.
        columns: the cells of the row that only the command line can say, by column.
        settings: all settings, resolved, in a line.
        flags: those that the run's folder keeps, by name.
    """

    network: Network
    source: ImageSource
    config: QuantConfig
    options: RunOptions
    columns: Mapping[str, Cell]
    started: float
    settings: str
    flags: Mapping[str, Any]

    def do(self, load: Callable[[], tuple[Tensor, list[str]]]) -> list[str]:
        """Run, unless `options.once` finds nothing to do.

        Args:
            load: gives the calibration images [n, C, H, W] and their names.

        Returns:
            The names of the calibration images.

        Raises:
            UserError: as `claims.claimed`, `preflight.check_network`, `resume.opened` and `run.run`.
            NothingToDo: as `claims.claimed`.
            Interrupted: as `resume.opened`.
        """
        network, source, options = self.network, self.source, self.options
        now = settings_row(Facts(self.config, self.columns, options.test_with_terms))
        # A run that is resumed names its files as it did when it was begun.
        new = {"run_id": new_run_id(now), "command": command_line(str(now["track"]), self.flags)}
        row = now | new if options.resume is None else begun(options.resume)["row"]
        with claimed(options.results, str(row["run_id"])) if options.once else nullcontext():
            images, names = load()
            check_network(network.model, images, network.num_classes, flags=options.network_flags)
            who = fingerprint(self.config, now, network.model, images, source.val.names, options.device)
            content = {"flags": self.flags, "row": row, "fingerprint": who}
            with opened(options.run_dir, options.resume, content, names, self.started) as folder:
                if not options.quiet:
                    origin = f"{network.arch} ({network.source}) on {source.name}"
                    print(f"{origin}: {describe(self.config)}, on {options.device}\n{self.settings}", flush=True)
                run(network, source, images, self.config, options, row, self.started, names=names, folder=folder)
        return names
