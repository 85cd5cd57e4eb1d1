"""Runs of both commands under a budget of bits: row, table, packed file, and what resuming them keeps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from small_runs import check_run_folder, rows

import logart.quantization.pipeline
import logart_cnn.main
import logart_vit.main
from logart.packed.file import PackedFile

RUNS = {
    "cnn": (logart_cnn.main.main, "--iters_w 2 --calib_samples 32 --rounding both --workers 0 --device cpu".split()),
    "vit": (logart_vit.main.main, "--iters_w 2 --optim_size 32 --optimize --num_workers 0 --device cpu".split()),
}


@pytest.mark.parametrize("track", RUNS)
def test_a_resumed_run_keeps_its_bits(
    track: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main, argv = RUNS[track]
    calls = []
    allocate = logart.quantization.pipeline.budgeted_bits
    monkeypatch.setattr(logart.quantization.pipeline, "budgeted_bits", lambda *args: calls.append(0) or allocate(*args))
    check_run_folder(main, [*argv, "--bits_budget", "2.7"], tmp_path)
    assert len(calls) == 1  # not measured again by the resumed run
    (row,) = rows(tmp_path / "results.csv")
    kept = json.loads((tmp_path / "run" / "bits.json").read_text())["bits"]
    packed = PackedFile.read(tmp_path / "run" / "packed.safetensors")
    assert {name: layer.n_bits for name, layer in packed.layers.items()} == kept
    weights = {name: layer.shape.numel() for name, layer in packed.layers.items()}
    mean = sum(weights[name] * bits for name, bits in kept.items()) / sum(weights.values())
    assert float(row["mean_bits"]) == pytest.approx(mean, abs=1e-4) and 2.6 < mean <= 2.7
    counts = dict(pair.split(":") for pair in row["layers_by_bits"].split())
    assert {int(bits): int(count) for bits, count in counts.items()} == {
        bits: list(kept.values()).count(bits) for bits in kept.values()
    }
    assert (row["bits"], row["bits_budget"], row["size_budget"]) == ("3", "2.7", "")
    assert packed.info["settings"]["bits_budget"] == 2.7
