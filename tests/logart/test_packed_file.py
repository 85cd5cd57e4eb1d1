"""Files that are damaged or made to do harm: one clear error, or a network that fits its file."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from logart import QuantConfig, load_packed, quantize_model
from logart.checkpoint import to_packed
from logart.network import network_recipe
from logart.packed_file import PackedFile, PackedFileError
from logart_cnn.models import build_network

RECIPE = {"network": network_recipe("cnn", "digits_resnet", {}, None, None), "class_names": ["a", "b"]}


@pytest.fixture(scope="module")
def whole() -> bytes:
    torch.manual_seed(0)
    config = QuantConfig(n_bits=3, rounding="nearest", asymmetric=True)  # type: ignore[arg-type]
    images = torch.randn(2, 1, 8, 8)
    quantized, _ = quantize_model(build_network("digits_resnet", shapes={}).eval(), config, images)
    return to_packed(quantized, RECIPE).to_bytes()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz") / "a.safetensors"


def parts(data: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, parsed, and what follows it."""
    end = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:end]), data[end:]


def joined(header: str, rest: bytes) -> bytes:
    text = header.encode()
    return len(text).to_bytes(8, "little") + text + rest


def with_content(data: bytes, content: Any) -> bytes:
    header, rest = parts(data)
    header["__metadata__"]["logart"] = content if isinstance(content, str) else json.dumps(content)
    return joined(json.dumps(header), rest)


def content_of(data: bytes) -> dict[str, Any]:
    return json.loads(parts(data)[0]["__metadata__"]["logart"])  # type: ignore[no-any-return]


def survives(path: Path, data: bytes) -> bool:
    """Whether the file reads; anything else than one line about it fails the test."""
    path.write_bytes(data)
    try:
        file = PackedFile.read(path)
        for layer in file.layers.values():
            assert layer.weight().isfinite().all()
        loaded = load_packed(path)
        loaded(torch.zeros(1, 1, 8, 8))
    except PackedFileError as error:
        assert "\n" not in str(error) and len(str(error)) < 1000
        return False
    return True


@settings(max_examples=2000, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_mutated_bytes(data: st.DataObject, whole: bytes, place: Path) -> None:
    changed = bytearray(whole)
    header = int.from_bytes(whole[:8], "little") + 8
    for _ in range(data.draw(st.integers(1, 4))):
        how = data.draw(st.sampled_from(("set", "header", "cut", "insert", "copy")))
        end = min(header, len(changed)) if how == "header" else len(changed)
        at = data.draw(st.integers(0, max(0, end - 1)))
        if how == "cut":
            del changed[at : at + data.draw(st.sampled_from((1, 7, 64, len(whole))))]
        elif how == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif how == "copy":
            changed[at:at] = changed[: data.draw(st.integers(1, 200))]
        elif changed:
            changed[at] = data.draw(st.integers(0, 255))
    survives(place, bytes(changed))


NASTY = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 1.5,
    "", "x", "\x1b[2J\n", "../../etc", [], [0], [2**40] * 4, [1] * 100,
    [[]], {}, {"a": []}, {"name": "conv1"}, "Conv2d", "Linear", "float64", "float8_e4m3fn", ["step", "zero_point"],
    {"track": "cnn", "arch": "resnet50", "model_kwargs": {}},
    {"track": "vit", "arch": "digits_vit", "model_kwargs": {"embed_dim": [1, 2], "depth": "many"}},
    {"track": "vit", "arch": "digits_vit", "model_kwargs": {"depth": 0, "img_size": -3}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deep for key, item in inside for deep in places(item, (*path, key)))]


@settings(max_examples=1500, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_mutated_descriptions(data: st.DataObject, whole: bytes, place: Path) -> None:
    """Valid safetensors whose metadata, or header, says something else."""
    content = content_of(whole)
    header, rest = parts(whole)
    inside = data.draw(st.sampled_from(("metadata", "header")))
    tree: Any = content if inside == "metadata" else header
    for _ in range(data.draw(st.integers(1, 3))):
        path = data.draw(st.sampled_from(places(tree)))
        if not path:
            continue
        parent = tree
        for key in path[:-1]:
            parent = parent[key]
        how = data.draw(st.sampled_from(("replace", "delete", "copy")))
        if how == "delete":
            del parent[path[-1]]
        elif how == "copy" and isinstance(parent, list):
            parent.append(parent[path[-1]])
        else:
            parent[path[-1]] = copy.deepcopy(data.draw(st.sampled_from(NASTY)))
    if inside == "metadata":
        header["__metadata__"]["logart"] = json.dumps(content)
    survives(place, joined(json.dumps(header), rest))


def test_the_file_itself_is_fine(whole: bytes, place: Path) -> None:
    assert survives(place, whole) and survives(place, with_content(whole, content_of(whole)))


def edited(whole: bytes, **changes: Any) -> bytes:
    """The file with something else in its first layer's entry, or in the metadata."""
    content = content_of(whole)
    for name, value in changes.items():
        (content if name in content else content["layers"][0])[name] = value
    return with_content(whole, content)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"version": 2}, "format version 2, and this LogART reads up to 1"),
        ({"version": "1"}, "another kind"),
        ({"format": "other"}, "another kind"),
        ({"layers": 3}, "lacks its list of layers"),
        ({"info": []}, "lacks its list of layers or its info"),
        ({"shape": [8, 1, 3, 4]}, "96 codes of 3 bits cannot be"),
        ({"shape": [2**40, 1, 3, 3]}, "shape"),
        ({"shape": [2**30, 2**30, 3, 3]}, "codes of 3 bits cannot be"),
        ({"shape": [72, 1, 1, True]}, "shape"),
        ({"shape": [9, 8, 1, 1]}, "8 codebooks for 9 rows"),
        ({"shape": [8, 9]}, "shape"),
        ({"kind": "LSTM"}, "kind 'LSTM'"),
        ({"kind": []}, "kind"),
        ({"bits": 4}, "72 codes of 4 bits cannot be"),
        ({"bits": 33}, "bits 33"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"terms": 5}, "terms 5"),
        ({"columns": ["step", "zero_point"]}, "expected 9 bytes a channel"),
        ({"columns": "flags"}, "columns"),
        ({"name": "conv2"}, "damaged layer conv2 .its tensors are missing"),
        ({"name": "blocks.0.conv1"}, "damaged layer|twice"),
        ({"name": None}, "without a name"),
    ],
)
def test_each_lie_is_named(changes: dict[str, Any], said: str, whole: bytes, place: Path) -> None:
    place.write_bytes(edited(whole, **changes))
    with pytest.raises(PackedFileError, match=said):
        PackedFile.read(place)


def test_foreign_and_broken_files_are_named(whole: bytes, tmp_path: Path) -> None:
    header, rest = parts(whole)
    text = json.dumps(header)
    twice = text[:-1] + ', "conv1.bias": ' + json.dumps(header["conv1.bias"]) + "}"
    cases = {
        b"": "cut short",
        b"PK\x03\x04" + bytes(100): "no safetensors file",
        (2**62).to_bytes(8, "little") + bytes(50): "no safetensors file",
        whole[:-1]: "damaged",
        whole + b"x": "damaged",
        safetensors.torch.save({"x": torch.zeros(2)}): "not one that LogART packed",
        safetensors.torch.save({"x": torch.zeros(2)}, {"logart": "[" * 100000}): "damaged metadata",
        safetensors.torch.save({"x": torch.zeros(2)}, {"logart": "NaN"}): "damaged metadata",
        joined("{" * 50000, b""): "damaged header",
        with_content(whole, json.dumps(content_of(whole)).replace('"version": 1', '"version": 1e400')): "out of range",
        joined(twice, rest): "damaged header .a name appears twice",
        with_content(whole, json.dumps(content_of(whole))[:-1] + ', "info": {}}'): "a name appears twice",
    }
    for index, (data, said) in enumerate(cases.items()):
        path = tmp_path / f"{index}.safetensors"
        path.write_bytes(data)
        with pytest.raises(PackedFileError, match=said) as error:
            PackedFile.read(path)
        assert str(path) in str(error.value)
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "none", "does not exist")):
        with pytest.raises(PackedFileError, match=said):
            PackedFile.read(path)


def test_bits_after_the_last_code_are_refused(place: Path) -> None:
    quantized, _ = quantize_model(
        nn.Sequential(nn.Linear(3, 1)).eval(), QuantConfig(n_bits=3, rounding="nearest"), torch.randn(2, 3)  # type: ignore[arg-type]
    )
    data = bytearray(to_packed(quantized).to_bytes())
    start = data.index(bytes(to_packed(quantized).layers["0"].codes.tolist()))
    data[start + 1] |= 0x80
    place.write_bytes(data)
    with pytest.raises(PackedFileError, match="bits after the last code"):
        PackedFile.read(place)


def test_equal_networks_give_equal_files_and_names_are_kept_apart(whole: bytes, place: Path) -> None:
    place.write_bytes(whole)
    file = PackedFile.read(place)
    assert file.to_bytes() == whole == file.to_bytes()
    with pytest.raises(ValueError, match="cannot be called codes:conv1"):
        PackedFile(file.layers, {"codes:conv1": torch.zeros(1)}, {}).to_bytes()


def test_a_sparse_file_of_terabytes_is_refused_unread(whole: bytes, tmp_path: Path) -> None:
    for start, said in ((b"", "damaged header"), (whole, "its size is not what its header says")):
        path = tmp_path / f"{len(start)}.safetensors"
        with path.open("wb") as file:
            file.write(start)
            file.truncate(2**43)
        with pytest.raises(PackedFileError, match=said):
            PackedFile.read(path)
        path.unlink()
