"""What several ranks of one run keep: the first rank's store, of which the others hear."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from logart import ranks
from logart.packed.block_state import load_state, state_file
from logart.quantization.state import StageResult, StageStore, Stored


@dataclass
class RankStore(StageStore):
    """A store on the first rank, another that keeps nothing on the others.

    What the first rank has of a finished block, restored or made now, all ranks have from there on.
    """

    first: StageStore

    def bits(self, allocate: Callable[[], dict[str, int]]) -> dict[str, int]:
        """See `StageStore`; where none are kept, all ranks allocate."""
        bits: dict[str, int] = {}
        asked: list[bool] = []

        def with_others() -> dict[str, int]:
            asked.append(ranks.from_first(True))
            return allocate()

        if ranks.is_first():
            bits = self.first.bits(with_others)
        if not asked and ranks.from_first(False):
            allocate()
        return ranks.from_first(bits)  # type: ignore[no-any-return]

    def restore(self, stage: str, index: int, own: Mapping[str, Stored]) -> StageResult | None:
        """See `StageStore`."""
        done = self.first.restore(stage, index, own)
        return None if ranks.from_first(done is None) else _of_first(own, done)

    def save(self, stage: str, index: int, own: Mapping[str, Stored], done: StageResult) -> None:
        """See `StageStore`."""
        self.first.save(stage, index, own, done)
        _of_first(own, done)

    def warn(self, message: str) -> None:
        """See `StageStore`."""
        self.first.warn(message)


def _of_first(own: Mapping[str, Stored], done: StageResult | None) -> StageResult:
    """What the first rank has of some layers, on all ranks."""
    sent = ranks.from_first(state_file(own, done).to_bytes() if done is not None and ranks.is_first() else None)
    if done is not None and ranks.is_first():
        return done
    with TemporaryDirectory() as folder:
        path = Path(folder) / "state"
        path.write_bytes(sent)
        return load_state(path, own)
