"""Config files of the ViT track: the shipped ones' values, what a file may hold, one clear line for every mistake."""

from __future__ import annotations

import inspect
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from logart.errors import UserError
from logart.grids.grid import ScaleSearch
from logart.grids.registry import GRIDS
from logart.quantization.config import SearchMethod
from logart_vit.settings import ACT_SCALES, OPTIM_METRICS, OPTIM_MODES, SOFTMAX_GRIDS, Config, load_config

ROOT = Path(__file__).parents[2]
BEST = {
    "w_bit": 4,
    "a_bit": 32,
    "qconv_a_bit": None,
    "qhead_a_bit": None,
    "act_scale": "auto",
    "softmax_grid": "uniform",
    "calibrate_with_act": False,
    "iters_a": 0,
    "first_last_bits": None,
    "channel_wise": True,
    "scale_method": "dynamic",
    "search_method": "tensor_wise",
    "scale_search": "none",
    "asymmetric": False,
    "zero_code": False,
    "wide_gap": False,
    "calib_size": 128,
    "calib_batch_size": 32,
    "optim_size": 1024,
    "optim_batch_size": 32,
    "optim_metric": "hessian_perturb",
    "temperature": 20.0,
    "optim_mode": "qdrop",
    "drop_prob": 0.5,
    "iters_w": 300,
    "lr": 0.1,
    "rrweight": 0.1,
    "b_start": 20.0,
    "b_end": 2.0,
    "warmup": 0.2,
    "val_batch_size": 128,
    "num_workers": 2,
}
BRECQ = {"optim_metric": "mse", "optim_mode": "qinp"}
SUBCLASS = "from logart_vit.settings import Config as Base\nclass Config(Base):\n"
KINDS = {name: type(value) for name, value in BEST.items() if value is not None}

Writer = Callable[[str], Path]


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    """Write a config file and give its path."""

    def write_file(text: str) -> Path:
        path = tmp_path / "mine.py"
        path.write_text(text, "utf-8")
        return path

    return write_file


def loaded(text: str) -> dict[str, Any]:
    """As `write` and `load_config`, for hypothesis, which runs a test many times with one fixture."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "mine.py"
        path.write_text(text, "utf-8")
        return load_config(path)


def refused(path: Path, **kwargs: Any) -> str:
    """What follows the flag and the path in the one line that refuses a file."""
    with pytest.raises(UserError) as caught:
        load_config(path, **kwargs)
    start = f"{kwargs.get('flag', '--config')}: {path}"
    assert str(caught.value).startswith(start) and "\n" not in str(caught.value)
    return str(caught.value).removeprefix(start)


def identical(seen: dict[str, Any], expected: dict[str, Any]) -> bool:
    """Equal in order, value and type: True is not 1, 20.0 is not 20, an enum's member is no text."""
    return [(k, type(v), v) for k, v in seen.items()] == [(k, type(v), v) for k, v in expected.items()]


# The shipped files


@pytest.mark.parametrize(
    ("name", "differs"),
    [
        ("4bit/best", {}),
        ("3bit/best", {"w_bit": 3}),
        ("4bit/brecq_baseline", BRECQ),
        ("3bit/brecq_baseline", BRECQ | {"w_bit": 3}),
    ],
)
def test_the_shipped_configs(name: str, differs: dict[str, Any]) -> None:
    assert identical(load_config(ROOT / f"configs/{name}.py"), BEST | differs)


def test_every_shipped_config_is_tested_above() -> None:
    shipped = {str(path.relative_to(ROOT / "configs")) for path in (ROOT / "configs").rglob("*.py")}
    assert shipped == {f"{bits}bit/{name}.py" for bits in (3, 4) for name in ("best", "brecq_baseline")}


def test_every_field_is_documented() -> None:
    entries = [line.partition(": ")[0] for line in (inspect.getdoc(Config) or "").split("\n")]
    assert [name for entry in entries for name in entry.strip().split(", ") if name in BEST] == list(BEST)


# What a file may hold


@pytest.mark.parametrize(
    "text",
    [
        SUBCLASS + "    w_bit = 2\n    lr = 0.5\n",
        "class Config:\n    w_bit = 2\n    lr = 0.5\n",
        "class Config:\n    def __init__(self):\n        self.w_bit = 2\n        self.lr = HALF\nHALF = 0.5\n",
        SUBCLASS + "    lr = 0.25\n    def __init__(self):\n        self.w_bit, self.lr = 2, self.lr * 2\n",
        "class Shared:\n    w_bit = 2\nclass Config(Shared):\n    lr = 0.5\n",
        "class Config:\n    __slots__ = 'w_bit', 'lr'\n    def __init__(self):\n        self.w_bit, self.lr = 2, 0.5\n",
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass(slots=True)\nclass Config:\n    w_bit: int = 2\n    lr: float = 0.5\n",
        "class Config:\n    w_bit = 2\n    @property\n    def lr(self):\n        return self.w_bit / 4\n",
    ],
    ids=["subclass", "plain", "init", "subclass-init", "inherited", "slots", "dataclass", "computed-field"],
)
def test_forms_of_the_class(write: Writer, text: str) -> None:
    assert identical(load_config(write(text)), BEST | {"w_bit": 2, "lr": 0.5})


def test_what_is_no_setting_is_ignored(write: Writer) -> None:
    text = """
from functools import cached_property
class Config:
    _note = "private"
    lr = 0.5
    def halved(self): return self.lr / 2
    @property
    def ratio(self): raise RuntimeError("not to be read")
    @cached_property
    def once(self): raise RuntimeError("not to be read")
    @staticmethod
    def helper(): pass
    @classmethod
    def other(cls): pass
    class Inner: pass
"""
    assert identical(load_config(write(text)), BEST | {"lr": 0.5})


def test_the_base_itself_is_a_config(write: Writer) -> None:
    assert identical(load_config(str(write("from logart_vit.settings import Config\n"))), BEST)


@given(
    st.fixed_dictionaries(
        {},
        optional={
            name: {
                int: st.integers(),
                bool: st.booleans(),
                float: st.floats(allow_nan=False, allow_infinity=False) | st.integers(-(2**53), 2**53),
            }[kind]
            for name, kind in KINDS.items()
            if kind is not str
        }
        | {
            **dict.fromkeys(("first_last_bits", "qconv_a_bit", "qhead_a_bit"), st.none() | st.integers()),
            "act_scale": st.sampled_from(ACT_SCALES),
            "softmax_grid": st.sampled_from(SOFTMAX_GRIDS),
            "scale_method": st.sampled_from(list(GRIDS)),
            "search_method": st.sampled_from([method.value for method in SearchMethod]),
            "scale_search": st.sampled_from([search.value for search in ScaleSearch]),
            "optim_metric": st.sampled_from(OPTIM_METRICS),
            "optim_mode": st.sampled_from(OPTIM_MODES),
        },
    )
)
def test_values_arrive_unchanged_and_the_rest_stays(values: dict[str, Any]) -> None:
    lines = "".join(f"    {name} = {value!r}\n" for name, value in values.items())
    exact = {name: float(value) if KINDS.get(name) is float else value for name, value in values.items()}
    assert identical(loaded(f"class Config:\n    pass\n{lines}"), BEST | exact)


def test_the_known_values() -> None:
    assert (OPTIM_METRICS, OPTIM_MODES) == (("hessian_perturb", "mse", "mae"), ("qinp", "rinp", "qdrop"))


def test_members_of_the_enums_become_plain_text(write: Writer) -> None:
    text = (
        "from logart.quantization.config import SearchMethod\n"
        "class Config:\n    scale_method = 'log_2'\n    search_method = SearchMethod.BLOCK_WISE\n"
    )
    assert identical(load_config(write(text)), BEST | {"scale_method": "log_2", "search_method": "block_wise"})


# Traces of loading


def test_loading_leaves_no_trace_and_sees_every_edit(write: Writer, tmp_path: Path) -> None:
    modules, path, argv = set(sys.modules), list(sys.path), list(sys.argv)
    for bits in (2, 5):  # files of one size, written within a second: bytecode of the first would pass for both
        assert load_config(write(f"class Config:\n    w_bit = {bits}\n"))["w_bit"] == bits
    assert [file.name for file in tmp_path.iterdir()] == ["mine.py"]
    assert (set(sys.modules), sys.path, sys.argv) == (modules, path, argv)


def test_the_file_does_not_run_as_the_program(write: Writer) -> None:
    main = sys.modules["__main__"]
    text = "if __name__ in ('__main__', 'mine'):\n    raise RuntimeError(__name__)\n" + SUBCLASS + "    w_bit = 2\n"
    assert load_config(write(text))["w_bit"] == 2
    assert sys.modules["__main__"] is main


# Mistakes


def test_a_path_that_is_no_python_file(tmp_path: Path) -> None:
    expected = "; expected a .py file that defines a class Config"
    assert refused(tmp_path / "none.py") == " does not exist" + expected
    assert refused(tmp_path) == " is a folder" + expected
    (tmp_path / "folder.py").mkdir()
    assert refused(tmp_path / "folder.py") == " is a folder" + expected
    (tmp_path / "config.yaml").write_text("w_bit: 4")
    assert refused(tmp_path / "config.yaml", flag="--other") == " is no .py file" + expected


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("\nclass Config:\n    w_bit 4\n", "SyntaxError: invalid syntax (mine.py, line 3)"),
        ("raise KeyError('a')", "KeyError: 'a'"),
        ("raise ValueError('two\\n  lines')", "ValueError: two lines"),
        ("import no_such_module", "ModuleNotFoundError: No module named 'no_such_module'"),
        ("raise RuntimeError", "RuntimeError"),
        ("raise SystemExit(3)", "SystemExit: 3"),
    ],
)
def test_code_that_fails(write: Writer, text: str, reason: str) -> None:
    assert refused(write(text)) == f" cannot be loaded ({reason})"


def test_an_interrupt_is_no_mistake_of_the_file(write: Writer) -> None:
    with pytest.raises(KeyboardInterrupt):
        load_config(write("raise KeyboardInterrupt"))


@pytest.mark.parametrize("text", ["", "w_bit = 3\n", "class config:\n    w_bit = 3\n", "Config = dict(w_bit=3)\n"])
def test_no_class(write: Writer, text: str) -> None:
    assert refused(write(text)) == " defines no class Config"


def test_a_class_that_cannot_be_made(write: Writer) -> None:
    message = refused(write("class Config:\n    def __init__(self, bits): pass\n"))
    assert message.startswith(": Config() fails (TypeError: ") and "'bits'); it is made without arguments" in message
    message = refused(write("class Config:\n    def __init__(self): exit(1)\n"))
    assert message == ": Config() fails (SystemExit: 1); it is made without arguments"


@pytest.mark.parametrize(
    ("name", "nearest"),
    [("optim_sise", "optim_size"), ("W_BIT", "w_bit"), ("warm_up", "warmup"), ("scale_methods", "scale_method")],
)
def test_a_misspelt_field_names_the_nearest(write: Writer, name: str, nearest: str) -> None:
    expected = f" sets an unknown field {name}; did you mean {nearest}?"
    assert refused(write(SUBCLASS + f"    {name} = 1\n")) == expected
    assert refused(write(f"class Config:\n    def __init__(self): self.{name} = 1\n")) == expected


def test_a_field_near_none_lists_them_all(write: Writer) -> None:
    expected = f" sets an unknown field xyz; expected one of {', '.join(BEST)}"
    assert refused(write("class Config:\n    xyz = 1\n")) == expected


@pytest.mark.parametrize(
    ("name", "values", "expected"),
    [
        ("w_bit", ["True", "4.0", "'4'", "None", "[4]"], "an integer"),
        ("a_bit", ["True", "32.0", "None"], "an integer"),
        ("num_workers", ["False", "None"], "an integer"),
        ("first_last_bits", ["True", "8.0", "'8'"], "an integer or None"),
        ("lr", ["True", "'0.1'", "None", "1j", "lambda: 0.1"], "a number"),
        ("channel_wise", ["1", "0", "None", "'True'"], "True or False"),
        ("asymmetric", ["1", "None", "'False'"], "True or False"),
        ("zero_code", ["0.0", "None"], "True or False"),
        ("wide_gap", ["1", "None"], "True or False"),
        ("scale_search", ["'full'", "True", "None"], "one of none, grid, half_step"),
        ("scale_method", ["'log'", "None", "2", "''"], f"one of {', '.join(GRIDS)}"),
        ("search_method", ["'Tensor_wise'", "['tensor_wise']"], "one of tensor_wise, layer_wise, block_wise"),
        ("optim_metric", ["'hessian'", "0"], "one of hessian_perturb, mse, mae"),
        ("optim_mode", ["'drop'", "True"], "one of qinp, rinp, qdrop"),
    ],
)
def test_values_of_another_kind(write: Writer, name: str, values: list[str], expected: str) -> None:
    for value in values:
        message = refused(write(f"class Config:\n    {name} = {value}\n"))
        shown = "<bound method " if value.startswith("lambda") else value  # an address follows
        assert message.startswith(f": {name} must be {expected}; got {shown}")


def test_a_member_of_the_wrong_enum(write: Writer) -> None:
    text = "from logart.quantization.settings import ReconInput as R\nclass Config:\n    search_method = R.MIXED\n"
    assert ": search_method must be one of tensor_wise, layer_wise, block_wise; got " in refused(write(text))


def test_a_value_shown_over_lines_is_told_in_one(write: Writer) -> None:
    text = "import torch\nclass Config:\n    lr = torch.eye(2)\n"
    assert refused(write(text)) == ": lr must be a number; got tensor([[1., 0.], [0., 1.]])"
