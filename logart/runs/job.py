"""What both commands do once they have a network, its images and settings: claim the row, open the folder, run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from logart.networks.data import ImageSource
from logart.networks.network import Network
from logart.quantization.config import QuantConfig, describe
from logart.runs.checks import check_network
from logart.runs.claims import claimed
from logart.runs.columns import settings_columns
from logart.runs.results_schema import Cell
from logart.runs.resume import fingerprint, opened
from logart.runs.run import RunOptions, run


@dataclass(frozen=True)
class Job:
    """A run that waits to be done.

    Attributes:
        network, source, config, options, columns, started: as for `run.run`.
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
            UserError: as `claims.claimed`, `run_checks.check_network`, `resume.opened` and `run.run`.
            NothingToDo: as `claims.claimed`.
            Interrupted: as `resume.opened`.
        """
        network, source, options = self.network, self.source, self.options
        settings = settings_columns(self.columns, self.config, options.test_with_terms)
        with claimed(options.results, settings, options.once):
            images, names = load()
            check_network(network.model, images, network.num_classes, flags=options.network_flags)
            who = fingerprint(self.config, self.columns, network.model, images, source.val.names, options.device)
            with opened(options.run_dir, options.resume, self.flags, who, names, self.started) as folder:
                if not options.quiet:
                    origin = f"{network.arch} ({network.source}) on {source.name}"
                    print(f"{origin}: {describe(self.config)}, on {options.device}\n{self.settings}", flush=True)
                arguments = (network, source, images, self.config, options, self.columns, self.started)
                run(*arguments, names=names, folder=folder)
        return names
