"""The command that shows a packed file."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import logart.packed.inspect
from logart import QuantConfig, quantize_model, save_packed
from logart.grids.grid import CodebookSpec
from logart.packed.file import PackedFile
from logart.packed.inspect import main


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(144, 3)).eval()
    config = QuantConfig(n_bits=3, rounding="nearest", first_last_bits=None)  # type: ignore[arg-type]
    quantized, _ = quantize_model(model, config, torch.randn(2, 1, 8, 8))
    path = tmp_path_factory.mktemp("inspect") / "a.safetensors"
    save_packed(quantized, path, {**quantized.packed_info, "class_names": ["one", "t\x1bwo"]})  # type: ignore[dict-item]
    return path


def shown(capsys: pytest.CaptureFixture[str], *argv: object) -> str:
    assert main([str(word) for word in argv]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_table_tells_each_layer(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = shown(capsys, packed).splitlines()
    file = PackedFile.read(packed)
    table = {line.split()[0]: line.split() for line in lines if line.startswith(("0 ", "2 ")) and "×" in line}
    for name, shape, weights in (("0", "4×1×3×3", 36), ("2", "3×144", 432)):
        layer = file.layers[name]
        size = -(-weights * 3 // 8) + 2 * shape_channels(shape)  # top_half_step and n_base2, a byte each
        error = file.info["layers"][name]["error"]
        assert table[name][1:5] == [shape, "3", "dynamic", str(size)]
        assert table[name][5] == f"{4 * weights / size:.1f}×"
        assert float(table[name][6]) == pytest.approx(error, abs=1e-5)
        mix = dict(pair.split(":") for pair in table[name][7:])
        assert sum(map(int, mix.values())) == layer.spec.channels
        assert {int(k): int(n) for k, n in mix.items()} == {
            k: layer.spec.columns["n_base2"].tolist().count(k) for k in layer.spec.columns["n_base2"].tolist()
        }
    assert lines[-1].endswith(f"the whole file: {packed.stat().st_size} bytes")
    assert any("n_bits=3" in line for line in lines)
    assert "class_names: one, t�wo" in lines  # nothing that a file says moves the cursor


def shape_channels(shape: str) -> int:
    return int(shape.split("×")[0])


def test_one_layers_codebooks(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layer = PackedFile.read(packed).layers["0"]
    books = json.loads(shown(capsys, packed, "--layer", "0", "--json"))
    assert len(books) == 4
    for channel, book in enumerate(books):
        codes = layer.unpacked()[channel].reshape(-1)
        assert torch.tensor(book["levels"])[codes.long()].tolist() == layer.weight()[channel].reshape(-1).tolist()
        assert book["uses"] == [int((codes == code).sum()) for code in range(8)]
        assert book["n_base2"] == layer.spec.columns["n_base2"][channel]
    lines = shown(capsys, packed, "--layer", "0").splitlines()
    assert len(lines) == 5
    level, uses = books[2]["levels"][7], books[2]["uses"][7]
    assert lines[3].startswith("2: top_half_step ") and lines[3].endswith(f"{level:.6g}({uses})")


def test_json_says_what_the_table_says(packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = json.loads(shown(capsys, packed, "--json"))
    file = PackedFile.read(packed)
    assert list(content["layers"]) == list(file.layers) and content["layers"]["0"]["shape"] == [4, 1, 3, 3]
    assert content["layers"]["2"]["error"] == file.info["layers"]["2"]["error"]
    assert content["rest"] == {"0.bias": {"shape": [4], "bytes": 16}, "2.bias": {"shape": [3], "bytes": 12}}
    assert content["info"]["settings"] == file.info["settings"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["nowhere.safetensors"], "nowhere.safetensors: does not exist"),
        (["{}", "--layer", "5"], "--layer: '5' is none of its layers; expected one of 0, 2"),
        ([], "the following arguments are required: file"),
    ],
)
def test_wrong_calls_get_one_line(argv: list[str], said: str, packed: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = [word.format(packed) for word in argv]
    try:
        code = main(argv)
    except SystemExit as error:
        code = error.code  # type: ignore[assignment]
    captured = capsys.readouterr()
    assert code == 2 and captured.out == "" and captured.err.count("\n") == 1 and said in captured.err


@pytest.mark.parametrize("json_flag", [(), ("--json",)])
def test_codebooks_are_made_and_printed_some_at_a_time(
    json_flag: tuple[str, ...], packed: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = shown(capsys, packed, "--layer", "0", *json_flag)
    made, printed_before = [], []
    original = CodebookSpec.codebook

    def counting(spec: CodebookSpec, *args: object) -> object:
        made.append(spec.channels)
        printed_before.append(sum(out.count("{") + out.count("top_half_step") for out in written))
        return original(spec, *args)  # type: ignore[arg-type]

    written: list[str] = []
    write = sys.stdout.write
    monkeypatch.setattr(sys.stdout, "write", lambda text: (written.append(text), write(text))[1])
    monkeypatch.setattr(CodebookSpec, "codebook", counting)
    monkeypatch.setattr(logart.packed.inspect, "_CHUNK_SIZE", 18)  # two rows of nine weights
    assert shown(capsys, packed, "--layer", "0", *json_flag) == expected
    assert made == [2, 2]
    assert printed_before[0] == 0 < printed_before[1]  # the first two were out before the next were made
