"""Files that are damaged or made to do harm: one clear error, or a network that fits its file."""

import copy
import json
import tracemalloc
import zlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from logart import QuantConfig, load_packed, quantize_model
from logart.networks.network import network_recipe
from logart.packed.checkpoint import to_packed
from logart.packed.file import PackedFile, PackedFileError
from logart.packed.words import WORDS
from logart_cnn.models import build_network

EMPTY = torch.zeros(0, dtype=torch.uint8)
RECIPE = {"network": network_recipe("cnn", "digits_resnet", {}, None, None), "class_names": ["a", "b"]}


@pytest.fixture(scope="module")
def whole() -> bytes:
    torch.manual_seed(0)
    config = QuantConfig(n_bits=3, rounding="nearest", asymmetric=True)  # type: ignore[arg-type]
    images = torch.randn(2, 1, 8, 8)
    quantized, _ = quantize_model(build_network("digits_resnet", shapes={}).eval(), config, images)
    return to_packed(quantized, {**quantized.packed_info, **RECIPE}).to_bytes()  # type: ignore[dict-item]


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


def with_packed(data: bytes, packed: bytes) -> bytes:
    return with_tensors(data, packed=torch.frombuffer(bytearray(packed), dtype=torch.uint8) if packed else EMPTY)


def opened(data: bytes) -> tuple[bytes, bytes]:
    """The description's text, and what follows it."""
    unzip = zlib.decompressobj(zdict=WORDS)
    text = unzip.decompress(safetensors.torch.load(data)["packed"].numpy().tobytes())
    return text, unzip.unused_data


def with_text(data: bytes, text: bytes) -> bytes:
    return with_packed(data, zlib.compress(text) + opened(data)[1])


def with_body(data: bytes, body: bytes) -> bytes:
    return with_packed(data, zlib.compress(opened(data)[0]) + body)


@pytest.fixture(scope="module")
def codebook_places(whole: bytes, place: Path) -> list[int]:
    """Where, behind the description, bytes of codebooks are."""
    place.write_bytes(whole)
    file, found, start = PackedFile.read(place), [], 0
    for layer in file.layers.values():
        codes, books = layer.n_bytes(file.ranges)
        found += range(start + codes, start + codes + books)
        start += codes + books
    return found


def with_content(data: bytes, content: Any) -> bytes:
    return with_text(data, json.dumps(content).encode())


def content_of(data: bytes) -> dict[str, Any]:
    return json.loads(opened(data)[0])  # type: ignore[no-any-return]


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
def test_mutated_bytes(data: st.DataObject, whole: bytes, codebook_places: list[int], place: Path) -> None:
    """Anywhere in the file, or in the text that it holds compressed, which zlib's checksum would otherwise shield, or
    in the few bytes of codebooks, or in all that follows the text."""
    part = data.draw(st.sampled_from(("file", "header", "text", "codebooks", "body")))
    text, body = opened(whole)
    changed = bytearray({"text": text, "codebooks": body, "body": body}.get(part, whole))
    ends = {"header": range(int.from_bytes(whole[:8], "little") + 8), "codebooks": codebook_places}
    for _ in range(data.draw(st.integers(1, 4))):
        how = data.draw(st.sampled_from(("set", "set", "cut", "insert", "copy")))
        at = min(data.draw(st.sampled_from(ends.get(part) or range(max(1, len(changed))))), max(0, len(changed) - 1))
        if how == "cut":
            del changed[at : at + data.draw(st.sampled_from((1, 7, 64, len(whole))))]
        elif how == "insert":
            changed[at:at] = data.draw(st.binary(min_size=1, max_size=9))
        elif how == "copy":
            changed[at:at] = changed[: data.draw(st.integers(1, 200))]
        elif changed:
            changed[at] = data.draw(st.integers(0, 255))
    again = {"text": with_text, "codebooks": with_body, "body": with_body}.get(part, lambda _, data: data)
    survives(place, again(whole, bytes(changed)))


NASTY = [
    None, True, -1, 0, 1, 2, 7, 2**31, 2**63, 10**30, 1.5,
    "", "x", "\x1b[2J\n", "../../etc", [], [0], [2**40] * 4, [1] * 100,
    [[]], {}, {"a": []},
    [0, 0], [0, 1], [-1, 8], [-7, 4], [2**62, 63], [None] * 13, [1] * 13,
    {"name": "conv1"}, "Conv2d", "Linear", "float64", "float8_e4m3fn", ["step", "zero_point"],
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
        if name in content:
            content[name] = value
        else:
            content["layers"].setdefault(name, [None] * 13)[0] = value
    return with_content(whole, content)


MISSING = "damaged description .it lacks one of layers, ranges, rest, info"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 3}, MISSING),
        ({"ranges": 3}, MISSING),
        ({"rest": []}, MISSING),
        ({"info": []}, MISSING),
        ({"layers": {}}, "damaged report .column block is no list of 0"),
        ({"layers": {}, "report": {}}, "holds [0-9]+ bytes that its description does not claim"),
        ({"layers": {"name": 3}}, "damaged list of layers .column name is no list of 0"),
        ({"layers": {"name": ["a"], "kind": []}}, "damaged list of layers .column kind is no list of 1"),
        ({"layers": {"name": ["a"], "kind": "C"}}, "damaged list of layers .column kind is no list of 1"),
        ({"layers": {"kind": ["Conv2d"]}}, "damaged list of layers .column kind is no list of 0"),
        ({"layers": {"name": ["a"]}}, "damaged layer a .kind None"),
        ({"layers": {"name": [0] * 70_000}}, "lists 70000 layers or tensors; at most 65536 are read"),
        ({"shape": [8, 1, 3, 4]}, "damaged layer"),  # what follows is shifted
        ({"shape": [2**40, 1, 3, 3]}, "shape"),
        ({"shape": [2**30, 2**30, 3, 3]}, "damaged layer conv1 .[0-9]+ bytes, and [0-9]+ are left"),
        ({"shape": [72, 1, 1, True]}, "shape"),
        ({"shape": [9, 8, 1, 1], "codebooks": 8}, "8 codebooks for 9 rows"),
        ({"codebooks": 0}, "0 codebooks for 8 rows"),
        ({"codebooks": 2.0}, "2.0 codebooks for 8 rows"),
        ({"shape": [8, 9]}, "shape"),
        ({"kind": "LSTM"}, "kind 'LSTM'"),
        ({"kind": []}, "kind"),
        ({"bits": 33}, "bits 33"),
        ({"bits": None}, "bits None"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"terms": 5}, "terms 5"),
        ({"columns": ["step", "zero_point"]}, "damaged layer conv1 .unknown columns"),
        ({"columns": ["step"]}, "unknown columns"),
        ({"columns": "flags"}, "columns"),
        ({"name": "blocks.0.conv1"}, "lists a layer without a name, or twice"),
        ({"name": None}, "without a name"),
        ({"ranges": {}}, "damaged layer conv1 .unknown columns"),
        ({"ranges": {"x": [0, 1]}}, "damaged list of ranges .columns"),
        ({"ranges": {"scale": [0, 64]}}, "damaged list of ranges .scale .0, 64. is out of range"),
        ({"ranges": {"top_half_step": [9999, 0], "n_base2": [0, 0]}}, "channel 0: top_half_step 9999 is out of range"),
        ({"ranges": {"top_half_step": [0, 40], "n_base2": [0, 40]}}, "damaged layer conv1"),
        ({"report": []}, "damaged report .no columns"),
        ({"report": {"error": [0]}}, "damaged report .column error is no list of 13"),
        ({"rest": {}}, "holds 584 bytes that its description does not claim"),
        ({"rest": {"float32": {"a": [1]}}}, "holds 580 bytes"),
        ({"rest": {"float32": {"a": [147]}}}, "damaged tensor a .588 bytes, and 584 are left"),
        ({"rest": {"float64": {"a": [74]}}}, "damaged tensor a .592 bytes, and 584 are left"),
        ({"rest": {"bool": {"a": [584]}}}, "damaged tensor a .neither true nor false"),
        ({"rest": {"float32": {"a": [-1]}}}, "damaged tensor a .shape .-1"),
        ({"rest": {"float32": {"a": [0, 2**50]}}}, "damaged tensor a .shape"),
        ({"rest": {"float32": {"a": [1] * 99}}}, "damaged tensor a .shape"),
        ({"rest": {"float32": {"a": [1]}, "int32": {"a": [1]}}}, "damaged tensor a .shape"),
        ({"rest": {"float32": [1]}}, "damaged list of float32"),
        ({"rest": {"quint8": {"a": []}}}, "damaged list of quint8"),
        ({"rest": {"float32": {str(i): [0] for i in range(70_000)}}}, "lists 70000 layers or tensors"),
    ],
)
def test_each_lie_is_named(changes: dict[str, Any], said: str, whole: bytes, place: Path) -> None:
    place.write_bytes(edited(whole, **changes))
    with pytest.raises(PackedFileError, match=said):
        PackedFile.read(place)


def test_foreign_and_broken_files_are_named(whole: bytes, tmp_path: Path) -> None:
    header, rest = parts(whole)
    text, (content, body) = json.dumps(header), opened(whole)
    twice = text[:-1] + ', "packed": ' + json.dumps(header["packed"]) + "}"
    versions = {'{"version":' + version + "}": said for version, said in (
        ("5", "format version 5, and this LogART reads up to 4"),
        ("3", "format version 3, and this LogART reads 4 alone"),
        ('"4"', "another kind"), ("4.0", "another kind"), ("true", "another kind"), ("0", "another kind"),
        ("NaN", "damaged metadata"), ("1e400", "out of range"),
    )}  # fmt: skip
    packed = safetensors.torch.load(whole)["packed"]
    zipped, flat = zlib.compress(content), torch.zeros(4, dtype=torch.uint8)
    cases = {
        b"": "cut short",
        b"PK\x03\x04" + bytes(100): "no safetensors file",
        (2**62).to_bytes(8, "little") + bytes(50): "no safetensors file",
        whole[:-1]: "damaged",
        whole + b"x": "damaged",
        safetensors.torch.save({"x": torch.zeros(2)}): "not one that LogART packed",
        safetensors.torch.save({"x": torch.zeros(2)}, {"logart": "[" * 100000}): "damaged metadata",
        safetensors.torch.save({"x": torch.zeros(2)}, {"logart": "[4]"}): "damaged metadata .no object",
        with_version(whole, '{"format":"logart-packed","version":3}'): "has format version 3, and this LogART reads 4",
        with_version(whole, '{"format":"other"}'): "another kind",
        **{with_version(whole, version): said for version, said in versions.items()},
        joined("{" * 50000, b""): "damaged header",
        joined(twice, rest): "damaged header .a name appears twice",
        with_text(whole, content[:-1] + b',"info":{}}'): "damaged description .a name appears twice",
        with_text(whole, b'{"layers":{},"ranges":{},"rest":{},"info":{"x":1e400}}'): "out of range",
        with_text(whole, b"[" * 100000): "damaged description",
        with_packed(whole, zipped[:-1]): "damaged description .cut short, or more than",
        with_packed(whole, zipped): "damaged layer conv1 .27 bytes, and 0 are left",
        with_packed(whole, b""): "damaged description .cut short",
        with_packed(whole, bytes(4)): "damaged description .Error",
        with_body(whole, body + bytes(4)): "holds 4 bytes that its description does not claim",
        with_body(whole, body[:-1]): "damaged tensor linear.bias .40 bytes, and 39 are left",
        with_tensors(whole, packed=None): "holds other tensors than packed, a row of bytes",
        with_tensors(whole, packed=packed.reshape(1, -1)): "holds other tensors than packed",
        with_tensors(whole, packed=packed.float()): "holds other tensors than packed",
        with_tensors(whole, float32=flat): "holds other tensors than packed",
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


@pytest.mark.parametrize("what", ["code", "codebook"])
def test_bits_after_the_last_are_refused(what: str, place: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 1), nn.Linear(1, 1)).eval()
    for layer, weight in zip(model, (1.0, 2.0**-2), strict=True):  # top half-steps 4 apart, both of base 2 alone
        nn.init.constant_(layer.weight, weight)  # type: ignore[arg-type]
    quantized, _ = quantize_model(model, QuantConfig(n_bits=3, rounding="nearest"), torch.randn(2, 3))  # type: ignore[arg-type]
    file = to_packed(quantized)
    whole = file.to_bytes()
    body = bytearray(opened(whole)[1])
    codes, books = file.layers["0"].n_bytes(file.ranges)
    assert (codes, books) == (2, 1) and dict(file.ranges) == {"top_half_step": (-4, 3), "n_base2": (4, 0)}
    body[{"code": 1, "codebook": 2}[what]] |= 0x80
    place.write_bytes(with_body(whole, opened(whole)[1]))
    assert len(PackedFile.read(place).layers) == 2
    place.write_bytes(with_body(whole, bytes(body)))
    with pytest.raises(PackedFileError, match=f"layer 0 .bits after the last {what}"):
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
        "c": torch.randn(2, dtype=torch.complex64), "f8": torch.randn(3).to(torch.float8_e4m3fn),
        "i": torch.tensor([-1, 2**31 - 1], dtype=torch.int32), "s": torch.tensor([-2, 300], dtype=torch.int16),
    }  # fmt: skip
    PackedFile(layers, rest, {"x": 1}).write(place)
    file = PackedFile.read(place)
    assert file.rest.keys() == rest.keys() and file.info == {"x": 1} and file.layers.keys() == layers.keys()
    for name, tensor in rest.items():
        found = file.rest[name]
        assert found.dtype == tensor.dtype and found.shape == tensor.shape and found.is_contiguous()
        assert found.tolist() == tensor.tolist()
        assert found.untyped_storage().nbytes() == found.nbytes  # none keeps the others in memory
    assert file.to_bytes() == place.read_bytes()
    PackedFile({}, {}, {}).write(place)
    assert PackedFile.read(place) == PackedFile({}, {}, {})


def test_what_would_not_be_read_is_not_written(place: Path) -> None:
    with pytest.raises(ValueError, match="describe 4200054 characters; at most 4194304 are read"):
        PackedFile({}, {}, {"note": "x" * 4_200_000}).to_bytes()
    with pytest.raises(ValueError, match="70000 tensors; at most 65536 are read"):
        PackedFile({}, dict.fromkeys(map(str, range(70_000)), torch.zeros(0)), {}).to_bytes()
    with pytest.raises(ValueError, match="x is complex128, which a packed file does not hold"):
        PackedFile({}, {"x": torch.zeros(1, dtype=torch.complex128)}, {}).to_bytes()


@pytest.mark.parametrize(
    "known",
    [None, 3, {}, {"conv1": {}}, dict.fromkeys("ab", {"x": 1}), "swapped", "empty", "unlike", "nested"],
    ids=str,
)
def test_what_is_known_of_layers_comes_back_whatever_it_is(known: Any, whole: bytes, place: Path) -> None:
    """By column where that says the same, else as it is."""
    place.write_bytes(whole)
    file = PackedFile.read(place)
    names, by_column = list(file.layers), known == "nested"
    if known == "swapped":
        known = {name: {"n_changed_codes": 1} for name in reversed(names)}
    elif known == "empty":
        known = {name: {} for name in names}
    elif known == "unlike":
        known = {
            name: {"n_changed_codes": 1} if name != "linear" else {"n_changed_codes": 1, "error": 2} for name in names
        }
    elif known == "nested":
        known = {name: {"n_changed_codes": [index], "é": {"x": None}} for index, name in enumerate(names)}
    data = replace(file, info={"a": 1, "layers": known, "b": 2}).to_bytes()
    place.write_bytes(data)
    again = PackedFile.read(place)
    assert again.info == {"a": 1, "layers": known, "b": 2} and ("report" in content_of(data)) == by_column
    if isinstance(known, dict):
        assert list(again.info["layers"]) == list(known)
    assert again.to_bytes() == data


def test_a_description_that_would_expand_to_gigabytes_is_not_expanded(whole: bytes, place: Path) -> None:
    packer = zlib.compressobj(9)
    bomb = b"".join([packer.compress(bytes(2**20)) for _ in range(512)]) + packer.flush()
    assert len(bomb) < 2**20
    place.write_bytes(with_packed(whole, bomb))
    tracemalloc.start()
    try:
        with pytest.raises(PackedFileError, match="cut short, or more than 4194304 characters"):
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
