"""Files that are damaged or made to do harm: one clear error, or a network that fits its file."""

import copy
import json
import math
from dataclasses import replace
from math import inf, nan
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from logart import QuantConfig, load_packed, quantize_model
from logart.grids.grid import Spacing
from logart.grids.plain import plain_codebook
from logart.networks.network import network_recipe
from logart.packed.checkpoint import to_packed
from logart.packed.file import PackedFile, PackedFileError
from logart_cnn.models import build_network

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


def with_tensors(data: bytes, **tensors: Tensor | None) -> bytes:
    """The file with other tensors, or without; `__` stands for a dot."""
    new = safetensors.torch.load(data) | {name.replace("__", "."): tensor for name, tensor in tensors.items()}
    metadata = parts(data)[0]["__metadata__"]
    return safetensors.torch.save({name: t for name, t in new.items() if t is not None}, metadata)


def with_text(data: bytes, text: str) -> bytes:
    header, rest = parts(data)
    header["__metadata__"]["logart"] = text
    return joined(json.dumps(header), rest)


def content_of(data: bytes) -> dict[str, Any]:
    return json.loads(parts(data)[0]["__metadata__"]["logart"])  # type: ignore[no-any-return]


def with_content(data: bytes, content: Any) -> bytes:
    return with_text(data, json.dumps(content))


def codebook_places(data: bytes) -> list[int]:
    """Where in the file bytes of codebooks are."""
    header, start = parts(data)[0], 8 + int.from_bytes(data[:8], "little")
    ends = [header[name]["data_offsets"] for name in header if name.endswith((".top_half_step", ".n_base2", ".flags"))]
    return [start + place for end in ends for place in range(*end)]


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


@settings(max_examples=600, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_mutated_bytes(data: st.DataObject, whole: bytes, place: Path) -> None:
    """Anywhere in the file, or in its header, or in the few bytes of codebooks."""
    end = int.from_bytes(whole[:8], "little") + 8
    ends = {"file": range(len(whole)), "header": range(end), "codebooks": codebook_places(whole)}
    changed = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        how = data.draw(st.sampled_from(("set", "set", "cut", "insert", "copy")))
        at = min(data.draw(st.sampled_from(ends[data.draw(st.sampled_from(tuple(ends)))])), max(0, len(changed) - 1))
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
    [[]], {}, {"a": []},
    [0, 0], [0, 1], [-1, 8], [2**62, 63], "Conv2d", "Linear", "float64", "F64", "I8", "BOOL", "F8_E4M3",
    {"track": "cnn", "arch": "resnet50", "model_kwargs": {}},
    {"track": "vit", "arch": "digits_vit", "model_kwargs": {"embed_dim": [1, 2], "depth": "many"}},
    {"track": "vit", "arch": "digits_vit", "model_kwargs": {"depth": 0, "img_size": -3}},
]  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place inside a JSON value."""
    inside = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(deep for key, item in inside for deep in places(item, (*path, key)))]


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_mutated_descriptions(data: st.DataObject, whole: bytes, place: Path) -> None:
    """Valid JSON that says something else: as the metadata, or as the whole header."""
    header, rest = parts(whole)
    inside = data.draw(st.sampled_from(("metadata", "metadata", "header")))
    tree: Any = content_of(whole) if inside == "metadata" else header
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
    survives(place, with_content(whole, tree) if inside == "metadata" else joined(json.dumps(header), rest))


def test_the_file_itself_is_fine(whole: bytes, place: Path) -> None:
    assert survives(place, whole) and survives(place, with_content(whole, content_of(whole)))


DTYPES = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float32, torch.float64, torch.bool)
WIDE = {dtype: dtype if dtype.is_floating_point else torch.int64 for dtype in DTYPES}


@pytest.fixture(scope="module")
def of_each_grid(whole: bytes, place: Path) -> dict[str, bytes]:
    """The same network on several grids, and with levels of no grid."""
    place.write_bytes(whole)
    file, files = PackedFile.read(place), {"dynamic": whole}
    for method in ("apot", "linear_minmax"):
        config = QuantConfig(n_bits=3, rounding="nearest", scale_method=method)  # type: ignore[arg-type]
        quantized, _ = quantize_model(build_network("digits_resnet", shapes={}).eval(), config, torch.randn(2, 1, 8, 8))
        files[method] = to_packed(quantized, file.info).to_bytes()
    plain = {
        name: replace(layer, spec=plain_codebook(layer.spec.codebook(3).levels, Spacing.LOG).spec)
        for name, layer in file.layers.items()
    }
    files["plain"] = replace(file, layers=plain).to_bytes()
    return files


@settings(max_examples=500, deadline=None, derandomize=True, database=None)
@given(data=st.data())
def test_mutated_tensors(data: st.DataObject, of_each_grid: dict[str, bytes], place: Path) -> None:
    """Valid safetensors whose tensors are others: of other types, shapes and values, missing, or under other names."""
    whole = of_each_grid[data.draw(st.sampled_from(sorted(of_each_grid)))]
    tensors = safetensors.torch.load(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.sampled_from(sorted(tensors)))
        how = data.draw(st.sampled_from(("retype", "reshape", "value", "delete", "rename")))
        tensor = tensors.pop(name)
        if how == "retype":
            tensors[name] = tensor.to(data.draw(st.sampled_from(DTYPES)))
        elif how == "reshape":
            tensors[name] = data.draw(st.sampled_from((tensor[None], tensor[:1], tensor[:0], torch.cat([tensor] * 2))))
        elif how == "value":
            numbers = (0.5, 1e300, inf, nan) if tensor.is_floating_point() else (2, 9, 33, 255, -99, 2.0**62)
            number = data.draw(st.sampled_from((0.0, 1.0, -1.0, *numbers)))
            tensors[name] = torch.full(tensor.shape, number, dtype=torch.float64).to(WIDE[tensor.dtype])
        elif how == "rename":
            tensors[data.draw(st.sampled_from(("x", "conv1.x", "conv1.scale", "conv1.step", "linear.bias")))] = tensor
        if not tensors:
            break
    survives(place, safetensors.torch.save(tensors, parts(whole)[0]["__metadata__"]))


def edited(whole: bytes, **changes: Any) -> bytes:
    """The file with something else in its metadata, or in its first layer's entry."""
    content = content_of(whole)
    for name, value in changes.items():
        (content if name in content else content["layers"]["conv1"])[name] = value
    return with_content(whole, content)


OUTER = "damaged metadata .expected a version and the objects layers and info, nothing else"
INTEGERS = ["top_half_step", "n_base2", "flags", "unused_codes"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"layers": 3}, OUTER),
        ({"info": []}, OUTER),
        ({"layers": {"x": None}}, "damaged layer x .None; expected kind, shape, bits, dtype, grid, terms"),
        ({"layers": {"x": {}}}, "damaged layer x"),
        ({"extra": 3}, "damaged layer conv1 .*expected kind, shape, bits, dtype, grid, terms"),
        ({"shape": [8, 1, 3, 4]}, r"damaged layer conv1 .codes: \[27\] torch.uint8; expected 36 bytes"),
        ({"shape": [2**40, 1, 3, 3]}, "shape"),
        ({"shape": [2**30, 2**30, 3, 3]}, "damaged layer conv1 .codes"),
        ({"shape": [72, 1, 1, True]}, "shape"),
        ({"shape": [9, 8, 1, 1]}, "8 codebooks for 9 rows"),
        ({"shape": [72]}, "shape"),
        ({"kind": "3 dots"}, "kind '3 dots'"),
        ({"layout": [[8, 1, 9], [0, 1]]}, "layout"),
        ({"layout": [[8, 1, 3, 3], [0, 1, 2, 4]]}, "layout"),
        ({"layout": [[8, 1, 3, 3], [1, 0, 2, 3]]}, "layout"),
        ({"layout": 3}, "layout 3"),
        ({"kind": []}, "kind"),
        ({"bits": 33}, "bits 33"),
        ({"bits": None}, "bits None"),
        ({"bits": 4}, "damaged layer conv1 .codes"),
        ({"dtype": "int8"}, "dtype 'int8'"),
        ({"terms": 5}, "terms 5"),
    ],
)
def test_each_lie_is_named(changes: dict[str, Any], said: str, whole: bytes, place: Path) -> None:
    place.write_bytes(edited(whole, **changes))
    with pytest.raises(PackedFileError, match=said):
        PackedFile.read(place)


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({"conv1__codes": None}, "damaged layer conv1 .codes: none; expected 27 bytes"),
        ({"conv1__codes": torch.zeros(28).byte()}, r"damaged layer conv1 .codes: \[28\] torch.uint8; expected 27"),
        ({"conv1__codes": torch.zeros(27).char()}, r"damaged layer conv1 .codes: \[27\] torch.int8"),
        ({"conv1__n_base2": None}, "damaged layer conv1 .the grid dynamic has other integers than"),
        ({"conv1__other": torch.zeros(8).byte()}, "damaged layer conv1 .the grid dynamic has other integers than"),
        ({"conv1__n_base2": torch.full((8,), 5).byte()}, "channel 0: n_base2 5 is out of range at 3 bits"),
        ({"conv1__n_base2": torch.zeros(9).byte()}, r"n_base2 is \[9\]"),
        ({"conv1__n_base2": torch.zeros(8)}, "n_base2 is torch.float32, neither an integer nor float64"),
        ({f"conv1__{name}": torch.zeros(3).byte() for name in INTEGERS}, "3 codebooks for 8 rows"),
    ],
)
def test_tensors_that_are_not_the_layers_are_named(
    tensors: dict[str, Tensor], said: str, whole: bytes, place: Path
) -> None:
    place.write_bytes(with_tensors(whole, **tensors))
    with pytest.raises(PackedFileError, match=said):
        PackedFile.read(place)


def test_a_byte_that_is_neither_true_nor_false_is_refused(whole: bytes, place: Path) -> None:
    whole = with_tensors(whole, flag=torch.tensor([True, False]))
    header, rest = parts(whole)
    start, end = header["flag"]["data_offsets"]
    assert rest[start:end] == b"\1\0"
    place.write_bytes(joined(json.dumps(header), rest[:start] + b"\1\2" + rest[end:]))
    with pytest.raises(PackedFileError, match="damaged tensor flag .neither true nor false"):
        PackedFile.read(place)


def test_foreign_and_broken_files_are_named(whole: bytes, tmp_path: Path) -> None:
    header, rest = parts(whole)
    text, content = json.dumps(header), json.dumps(content_of(whole))
    twice = text[:-1] + ', "linear.bias": ' + json.dumps(header["linear.bias"]) + "}"
    versions = {'{"version":' + version + "}": said for version, said in (
        ("6", "has format version 6, and this LogART reads version 5; update LogART"),
        ("4", "has format version 4, and this LogART reads version 5; save the network again"),
        ("5", OUTER), ('"5"', "another kind"), ("5.0", "another kind"), ("true", "another kind"), ("0", "another kind"),
        ("NaN", "damaged metadata"), ("1e400", "out of range"),
    )}  # fmt: skip
    # as earlier formats were written
    third = safetensors.torch.save({"x": torch.zeros(2)}, {"logart": '{"format":"logart-packed","version":3}'})
    fourth = safetensors.torch.save({"packed": torch.zeros(9).byte()}, {"logart": '{"version":4}'})
    cases = {
        b"": "possibly truncated",
        b"PK\x03\x04" + bytes(100): "not a valid safetensors file",
        (2**62).to_bytes(8, "little") + bytes(50): "not a valid safetensors file",
        whole[:-1]: "damaged",
        whole + b"x": "damaged",
        safetensors.torch.save({"x": torch.zeros(2)}): "not one that LogART packed",
        with_text(whole, "[" * 100000): "damaged metadata",
        with_text(whole, "[4]"): "damaged metadata .no object",
        third: "has format version 3, and this LogART reads version 5",
        fourth: "has format version 4, and this LogART reads version 5",
        with_text(whole, '{"format":"other"}'): "another kind",
        **{with_text(whole, version): said for version, said in versions.items()},
        joined("{" * 50000, b""): "damaged header",
        joined(twice, rest): "damaged header .a name appears twice",
        with_text(whole, content[:-1] + ',"info":{}}'): "damaged metadata .a name appears twice",
        with_text(whole, content[:-1] + ',"more":{}}'): OUTER,
        with_text(whole, content.replace('"info": {', '"info": {"x": 1e400, ')): "out of range",
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


def test_equal_networks_give_equal_files(whole: bytes, place: Path) -> None:
    place.write_bytes(whole)
    file = PackedFile.read(place)
    assert file.to_bytes() == whole == file.to_bytes()


def test_a_file_of_tensors_of_all_types_comes_back(whole: bytes, place: Path) -> None:
    place.write_bytes(whole)
    layers = PackedFile.read(place).layers
    rest = {
        "codes": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(3), "conv1.bias": torch.tensor([True]),
        "float32": torch.zeros(0, 5), "h": torch.randn(2, 1, 2).half(), "t": torch.arange(4.0).reshape(2, 2).T,
        "d": torch.randn(3, dtype=torch.float64), "bf": torch.randn(3).bfloat16(), "u": torch.tensor(7).byte(),
        "c": torch.randn(2, dtype=torch.complex64), "f8": torch.randn(3).to(torch.float8_e4m3fn),
        "i": torch.tensor([-1, 2**31 - 1], dtype=torch.int32), "s": torch.tensor([-2, 300], dtype=torch.int16),
    }  # fmt: skip
    rest["tied"] = rest["d"]
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


def test_any_reader_shows_codes_and_integers(whole: bytes, place: Path) -> None:
    """What the format's description promises, with nothing of this project's: codes are bits from the lowest up."""
    place.write_bytes(whole)
    with safetensors.safe_open(place, "np") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        content = json.loads(file.metadata()["logart"])
    layers = PackedFile.read(place).layers
    assert list(content["layers"]) == list(layers) and content["info"]["class_names"] == ["a", "b"]
    for name, entry in content["layers"].items():
        bits = [byte >> bit & 1 for byte in tensors[f"{name}.codes"].tolist() for bit in range(8)]
        count = math.prod(entry["shape"])
        codes = [sum(bits[3 * i + j] << j for j in range(3)) for i in range(count)]
        assert codes == layers[name].unpacked().flatten().tolist() and entry["bits"] == 3
        for column in ("top_half_step", "n_base2"):
            found = tensors[f"{name}.{column}"]
            assert found.dtype.itemsize == 1 and found.tolist() == layers[name].spec.columns[column].tolist()
    assert tensors["linear.bias"].shape == (10,)


def test_what_would_not_be_read_is_not_written(whole: bytes, place: Path) -> None:
    with pytest.raises(ValueError, match="names and settings would take 8400[0-9]+ bytes; at most 8388608 are read"):
        PackedFile({}, {}, {"note": "x" * 8_400_000}).to_bytes()
    with pytest.raises(ValueError, match="names and settings would take"):
        PackedFile({}, dict.fromkeys(map(str, range(150_000)), torch.zeros(0)), {}).to_bytes()
    with pytest.raises(ValueError, match="cannot be saved: torch.complex128"):
        PackedFile({}, {"x": torch.zeros(1, dtype=torch.complex128)}, {}).to_bytes()
    place.write_bytes(whole)
    file = PackedFile.read(place)
    with pytest.raises(ValueError, match="state has a tensor conv1.n_base2, which is a packed layer's too"):
        PackedFile(file.layers, {"conv1.n_base2": torch.zeros(1)}, {}).to_bytes()


def test_a_sparse_file_of_terabytes_is_refused_unread(whole: bytes, tmp_path: Path) -> None:
    for start, said in ((b"", "damaged header"), (whole, "its size is not what its header says")):
        path = tmp_path / f"{len(start)}.safetensors"
        with path.open("wb") as file:
            file.write(start)
            file.truncate(2**43)
        with pytest.raises(PackedFileError, match=said):
            PackedFile.read(path)
        path.unlink()
