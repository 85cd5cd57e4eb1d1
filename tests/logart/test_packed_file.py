"""Files that are damaged or made to do harm: one clear error, or a network that fits its file."""

import copy
import json
import tracemalloc
import zlib
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
from logart.packed_words import WORDS
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


def with_tensors(data: bytes, **tensors: torch.Tensor | None) -> bytes:
    """The file with other tensors, or without."""
    new = {**safetensors.torch.load(data), **tensors}
    metadata = parts(data)[0]["__metadata__"]
    return safetensors.torch.save({name: t for name, t in new.items() if t is not None}, metadata)


def with_text(data: bytes, text: bytes) -> bytes:
    return with_tensors(data, description=torch.tensor(list(zlib.compress(text)), dtype=torch.uint8))


def text_of(data: bytes) -> bytes:
    return zlib.decompressobj(zdict=WORDS).decompress(safetensors.torch.load(data)["description"].numpy().tobytes())


def with_content(data: bytes, content: Any) -> bytes:
    return with_text(data, json.dumps(content).encode())


def content_of(data: bytes) -> dict[str, Any]:
    return json.loads(text_of(data))  # type: ignore[no-any-return]


def with_version(data: bytes, metadata: str) -> bytes:
    header, rest = parts(data)
    header["__metadata__"]["logart"] = metadata
    return joined(json.dumps(header), rest)


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


@settings(max_examples=2500, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_mutated_bytes(data: st.DataObject, whole: bytes, place: Path) -> None:
    """Anywhere in the file, or in the text that it holds compressed, which zlib's checksum would otherwise shield."""
    inside = data.draw(st.booleans())
    changed = bytearray(text_of(whole) if inside else whole)
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
    survives(place, with_text(whole, bytes(changed)) if inside else bytes(changed))


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
    """Valid safetensors whose description, or header, says something else."""
    header, rest = parts(whole)
    inside = data.draw(st.sampled_from(("description", "description", "header")))
    tree: Any = content_of(whole) if inside == "description" else header
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
    survives(place, with_content(whole, tree) if inside == "description" else joined(json.dumps(header), rest))


def test_the_file_itself_is_fine(whole: bytes, place: Path) -> None:
    assert survives(place, whole) and survives(place, with_content(whole, content_of(whole)))


def edited(whole: bytes, **changes: Any) -> bytes:
    """The file with something else in its first layer's entry, or beside the list of layers."""
    content = content_of(whole)
    for name, value in changes.items():
        (content if name in content else content["layers"][0])[name] = value
    return with_content(whole, content)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 3}, "lacks its list of layers"),
        ({"rest": []}, "lacks its list of layers, its other tensors or its info"),
        ({"info": []}, "lacks its list of layers, its other tensors or its info"),
        ({"layers": []}, "codes or codebooks that no layer in its list claims"),
        ({"layers": [0] * 70_000}, "lists 70000 layers or tensors; at most 65536 are read"),
        ({"shape": [8, 1, 3, 4]}, "damaged layer linear .60 elements, and 51 are left"),  # what follows is shifted
        ({"shape": [2**40, 1, 3, 3]}, "shape"),
        ({"shape": [2**30, 2**30, 3, 3]}, "elements, and 4455 are left"),
        ({"shape": [72, 1, 1, True]}, "shape"),
        ({"shape": [9, 8, 1, 1], "codebooks": 8}, "8 codebooks for 9 rows"),
        ({"codebooks": 0}, "0 codebooks for 8 rows"),
        ({"codebooks": 2.0}, "2.0 codebooks for 8 rows"),
        ({"shape": [8, 9]}, "shape"),
        ({"kind": "LSTM"}, "kind 'LSTM'"),
        ({"kind": []}, "kind"),
        ({"bits": 33}, "bits 33"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"terms": 5}, "terms 5"),
        ({"columns": ["step", "zero_point"]}, "damaged layer"),
        ({"columns": ["step"]}, "unknown columns"),
        ({"columns": "flags"}, "columns"),
        ({"name": "blocks.0.conv1"}, "lists a layer without a name, or twice"),
        ({"name": None}, "without a name"),
        ({"rest": {}}, "holds float32, which its description does not list"),
        ({"rest": {"float32": {"a": [1]}}}, "holds 145 elements of float32 without a name"),
        ({"rest": {"float32": {"a": [147]}}}, "damaged tensor a .147 elements, and 146 are left"),
        ({"rest": {"float32": {"a": [-1]}}}, "damaged tensor a .shape .-1"),
        ({"rest": {"float32": {"a": [0, 2**50]}}}, "damaged tensor a .shape"),
        ({"rest": {"float32": {"a": [1] * 99}}}, "damaged tensor a .shape"),
        ({"rest": {"float32": [1]}}, "damaged list of float32 .there are none"),
        ({"rest": {"int64": {"a": []}}}, "damaged list of int64 .there are none"),
        ({"rest": {"description": {"a": []}}}, "damaged list of description"),
        ({"rest": {"float32": {str(i): [0] for i in range(70_000)}}}, "lists 70000 layers or tensors"),
    ],
)
def test_each_lie_is_named(changes: dict[str, Any], said: str, whole: bytes, place: Path) -> None:
    place.write_bytes(edited(whole, **changes))
    with pytest.raises(PackedFileError, match=said):
        PackedFile.read(place)


def test_foreign_and_broken_files_are_named(whole: bytes, tmp_path: Path) -> None:
    header, rest = parts(whole)
    text, content = json.dumps(header), text_of(whole)
    twice = text[:-1] + ', "codes": ' + json.dumps(header["codes"]) + "}"
    versions = {'{"format":"logart-packed","version":' + version + "}": said for version, said in (
        ("4", "format version 4, and this LogART reads up to 3"),
        ("2", "format version 2, and this LogART reads 3 alone"),
        ('"2"', "another kind"), ("2.0", "another kind"), ("true", "another kind"), ("0", "another kind"),
        ("NaN", "damaged metadata"), ("1e400", "out of range"),
    )}  # fmt: skip
    zipped = safetensors.torch.load(whole)["description"]
    flat = torch.zeros(4, dtype=torch.uint8)
    cases = {
        b"": "cut short",
        b"PK\x03\x04" + bytes(100): "no safetensors file",
        (2**62).to_bytes(8, "little") + bytes(50): "no safetensors file",
        whole[:-1]: "damaged",
        whole + b"x": "damaged",
        safetensors.torch.save({"x": torch.zeros(2)}): "not one that LogART packed",
        safetensors.torch.save({"x": torch.zeros(2)}, {"logart": "[" * 100000}): "damaged metadata",
        with_version(whole, '{"format":"other","version":2}'): "another kind",
        **{with_version(whole, version): said for version, said in versions.items()},
        joined("{" * 50000, b""): "damaged header",
        joined(twice, rest): "damaged header .a name appears twice",
        with_text(whole, content[:-1] + b',"info":{}}'): "damaged description .a name appears twice",
        with_text(whole, b'{"layers":[],"rest":{},"info":{"x":1e400}}'): "out of range",
        with_text(whole, b"[" * 100000): "damaged description",
        with_tensors(whole, description=None): "damaged description .nothing where",
        with_tensors(whole, description=zipped[:-1]): "damaged description, or one of more than",
        with_tensors(whole, description=torch.cat([zipped, flat])): "damaged description, or one",
        with_tensors(whole, description=flat): "damaged description .Error",
        with_tensors(whole, description=zipped.reshape(1, -1)): "damaged description .torch.uint8 .1, ",
        with_tensors(whole, codes=None): "damaged codes or codebooks .nothing",
        with_tensors(whole, codes=flat): "damaged layer conv1 .27 elements, and 4 are left",
        with_tensors(whole, codebooks=flat.float()): "damaged codes or codebooks .torch.float32",
        with_tensors(whole, int8=flat): "damaged list|holds int8, which its description does not list",
        with_tensors(whole, float32=torch.zeros(146, dtype=torch.float64)): "damaged list of float32",
        with_tensors(whole, float32=torch.zeros(146, 1)): "damaged list of float32",
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


def test_equal_networks_give_equal_files(whole: bytes, place: Path) -> None:
    place.write_bytes(whole)
    file = PackedFile.read(place)
    assert file.to_bytes() == whole == file.to_bytes()


def test_a_file_of_tensors_of_all_types_comes_back(whole: bytes, place: Path) -> None:
    place.write_bytes(whole)
    layers = PackedFile.read(place).layers
    rest = {
        "codes": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "description": torch.tensor([True]),
        "float32": torch.zeros(0, 5), "h": torch.randn(2, 1, 2).half(), "t": torch.arange(4.0).reshape(2, 2).T,
        "d": torch.randn(3, dtype=torch.float64), "bf": torch.randn(3).bfloat16(), "u": torch.tensor(7).byte(),
    }  # fmt: skip
    PackedFile(layers, rest, {"x": 1}).write(place)
    file = PackedFile.read(place)
    assert file.rest.keys() == rest.keys() and file.info == {"x": 1} and file.layers.keys() == layers.keys()
    for name, tensor in rest.items():
        found = file.rest[name]
        assert found.dtype == tensor.dtype and torch.equal(found, tensor) and found.is_contiguous()
        assert found.untyped_storage().nbytes() == found.nbytes  # none keeps the others in memory
    assert file.to_bytes() == place.read_bytes()
    PackedFile({}, {}, {}).write(place)
    assert PackedFile.read(place) == PackedFile({}, {}, {})


def test_what_would_not_be_read_is_not_written(place: Path) -> None:
    with pytest.raises(ValueError, match="describe 4200042 characters; at most 4194304 are read"):
        PackedFile({}, {}, {"note": "x" * 4_200_000}).to_bytes()
    with pytest.raises(ValueError, match="70000 tensors; at most 65536 are read"):
        PackedFile({}, dict.fromkeys(map(str, range(70_000)), torch.zeros(0)), {}).to_bytes()


def test_a_description_that_would_expand_to_gigabytes_is_not_expanded(whole: bytes, place: Path) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join([packer.compress(bytes(2**20)) for _ in range(512)]) + packer.flush()
    assert len(bomb) < 2**20
    place.write_bytes(with_tensors(whole, description=torch.frombuffer(bytearray(bomb), dtype=torch.uint8)))
    tracemalloc.start()
    try:
        with pytest.raises(PackedFileError, match="one of more than 4194304 characters"):
            PackedFile.read(place)
        assert tracemalloc.get_traced_memory()[1] < 2**24
    finally:
        tracemalloc.stop()


def test_a_sparse_file_of_terabytes_is_refused_unread(whole: bytes, tmp_path: Path) -> None:
    for start, said in ((b"", "damaged header"), (whole, "its size is not what its header says")):
        path = tmp_path / f"{len(start)}.safetensors"
        with path.open("wb") as file:
            file.write(start)
            file.truncate(2**43)
        with pytest.raises(PackedFileError, match=said):
            PackedFile.read(path)
        path.unlink()
