"""Checkpoints: every accepted container, safe reading, the hub's folder, one clear line for every misfit."""

import argparse
import hashlib
import http.server
import pickle
import threading
from collections import OrderedDict

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from logart.errors import UserError
from logart.networks.weights import (
    fetch_state_dict,
    file_sha256,
    load_state_dict,
    read_checkpoint,
    read_state_dict,
    state_sha256,
)


def small_network(width=4, classes=3):
    torch.manual_seed(0)
    return nn.Sequential(
        OrderedDict(conv=nn.Conv2d(1, width, 3), bn=nn.BatchNorm2d(width), fc=nn.Linear(width, classes))
    )


def assert_same(state, expected):
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], expected[key]) for key in expected)


def fails(message, call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# Reading


@pytest.mark.parametrize(
    "wrap",
    [lambda s: s, lambda s: {"state_dict": s, "epoch": 3, "best": 0.5}, lambda s: {"model": s, "epoch": 3}],
)
@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("name", ["a.pth", "a.pth.tar"])
def test_accepted_containers(tmp_path, wrap, prefix, name):
    state = small_network().state_dict()
    torch.save(wrap({prefix + key: value for key, value in state.items()}), tmp_path / name)
    assert_same(read_state_dict(tmp_path / name), state)


@pytest.mark.parametrize("suffix", ["pt", "th", "bin"])
def test_old_serialization(tmp_path, suffix):
    state = small_network().state_dict()
    torch.save(state, tmp_path / f"a.{suffix}", _use_new_zipfile_serialization=False)
    assert_same(read_state_dict(str(tmp_path / f"a.{suffix}")), state)


def test_safetensors(tmp_path):
    state = small_network().state_dict()
    save_file({f"module.{key}": value for key, value in state.items()}, tmp_path / "a.safetensors")
    assert_same(dict(sorted(read_state_dict(tmp_path / "a.safetensors").items())), dict(sorted(state.items())))


def prefixed(state, prefix):
    return {prefix + key: value for key, value in state.items()}


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "model.", "net.module.",
                                    "network.model._orig_mod."])  # fmt: skip
@pytest.mark.parametrize("entry", [None, "state_dict", "net"])
def test_prefixes_in_any_nesting_are_taken_off(tmp_path, prefix, entry):
    state = small_network().state_dict()
    content = prefixed(state, prefix)
    torch.save(content if entry is None else {entry: content, "pytorch-lightning_version": "2"}, tmp_path / "a.pth")
    assert_same(read_state_dict(tmp_path / "a.pth"), state)


def test_what_compiled_parts_and_counters_add_is_taken_off(tmp_path):
    state = small_network().state_dict()
    first, *others = state
    compiled = {first.replace(".", "._orig_mod."): state[first], **{key: state[key] for key in others}}
    extras = {"n_averaged": torch.tensor(3), "conv.total_ops": torch.zeros(1), "total_params": torch.zeros(1)}
    torch.save({**extras, **compiled}, tmp_path / "a.pth")
    assert_same(read_state_dict(tmp_path / "a.pth"), state)


@pytest.mark.parametrize(
    ("wrap", "entry"),
    [
        (lambda s: {"net": s, "acc": 91.2}, "net"),
        (lambda s: {"state_dict": {"model": s}}, "state_dict.model"),
        (lambda s: {"optimizer": {"state": {0: {"m": torch.ones(1)}}, "sums": {"m": torch.ones(1)}}, "my": s}, "my"),
        (lambda s: {"params": s, "args": argparse.Namespace(lr=0.1), "best": np.float64(91.2)}, "params"),
        (lambda s: {"teacher": prefixed(s, "a."), "model_state_dict": s}, "model_state_dict"),
        (lambda s: s, ""),
    ],
)
def test_the_entry_that_was_taken_is_said(tmp_path, wrap, entry, capsys):
    state = small_network().state_dict()
    torch.save(wrap(state), tmp_path / "a.pth")
    read = read_checkpoint(tmp_path / "a.pth")
    assert_same(read.state, state)
    assert (read.source, read.others) == (f"a.pth:{entry}".rstrip(":"), ()) and capsys.readouterr().err == ""
    assert read.sha256 == file_sha256(tmp_path / "a.pth")


@pytest.mark.parametrize(
    ("wrap", "plain", "averaged"),
    [
        (lambda s, e: {"epoch": 3, "state_dict": s, "state_dict_ema": e}, "state_dict", "state_dict_ema"),
        (lambda s, e: {"model_ema": prefixed(e, "module.") | {"n_averaged": torch.tensor(3)}, "model": s},
         "model", "model_ema"),
        (lambda s, e: {"net": s, "ema": {"shadow": e, "decay": 0.9}}, "net", "ema.shadow"),
        (lambda s, e: {"swa_state": e, "weights": s}, "weights", "swa_state"),
    ],
)  # fmt: skip
def test_averaged_weights_are_named_and_taken_on_request(tmp_path, wrap, plain, averaged, capsys):
    state = small_network().state_dict()
    mean = {key: value + 1 for key, value in state.items()}
    path = tmp_path / "a.pth"
    torch.save(wrap(state, mean), path)
    read = read_checkpoint(path)
    assert_same(read.state, state)
    assert (read.source, read.others) == (f"a.pth:{plain}", (averaged,))
    line = f"--checkpoint: {path}: took the entry '{plain}'; averaged weights are in '{averaged}': --checkpoint_key "
    assert capsys.readouterr().err == f"{line}{averaged} takes them\n"
    asked = read_checkpoint(path, averaged)
    assert_same(asked.state, mean)
    assert asked.source == f"a.pth:{averaged}" and capsys.readouterr().err == ""
    torch.save({averaged.partition(".")[0]: mean}, path)
    assert_same(read_state_dict(path), mean)  # where there is nothing else


@pytest.mark.parametrize("other", ["loss.weight", "ema.conv.weight", "x"])
def test_a_part_of_the_keys_can_be_taken(tmp_path, other):
    state = small_network().state_dict()
    torch.save({"state_dict": prefixed(state, "body.") | {other: torch.ones(1)}}, tmp_path / "a.pth")
    for key in ("state_dict.body", "state_dict.body."):
        assert_same(read_state_dict(tmp_path / "a.pth", key), state)
    whole = read_state_dict(tmp_path / "a.pth")
    hint = "; --checkpoint_key body takes those that fit"
    assert fails("do not fit", load_state_dict, small_network(), whole, flag="--checkpoint", source="a").endswith(hint)


@pytest.mark.parametrize(("key", "hint"), [("stat_dict", "did you mean state_dict?"), ("xyz", "expected one of state"),
                                           ("state_dict.xyz", "did you mean state_dict?")])  # fmt: skip
def test_an_entry_that_is_not_there(tmp_path, key, hint):
    torch.save({"state_dict": small_network().state_dict()}, tmp_path / "a.pth")
    fails(f"has no entry {key!r}; {hint}", read_state_dict, tmp_path / "a.pth", key)


def test_several_entries_of_which_none_is_likelier(tmp_path):
    state = small_network().state_dict()
    torch.save({"generator": state, "critic": state}, tmp_path / "a.pth")
    fails("has several entries of tensors: generator, critic; expected --checkpoint_key", read_state_dict,
          tmp_path / "a.pth")  # fmt: skip
    assert_same(read_state_dict(tmp_path / "a.pth", "critic"), state)


def test_a_prefix_that_not_all_keys_have_stays(tmp_path):
    state = {"module.a": torch.ones(1), "b": torch.ones(1)}
    torch.save(state, tmp_path / "a.pth")
    assert_same(read_state_dict(tmp_path / "a.pth"), state)


class Trap:
    """Unpickled without weights_only, it leaves a file behind."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


def test_no_code_of_a_checkpoint_runs(tmp_path):
    torch.save({"state_dict": {}, "trap": Trap(tmp_path / "sprung")}, tmp_path / "a.pth")
    fails("only tensors are read (weights_only=True)", read_state_dict, tmp_path / "a.pth")
    assert not (tmp_path / "sprung").exists()


def write_bad(path, kind):
    state = small_network().state_dict()
    torch.save(state, path)
    if kind == "bytes":
        path.write_bytes(torch.arange(3000, dtype=torch.int64).mul(2654435761).numpy().tobytes())
    elif kind == "empty file":
        path.write_bytes(b"")
    elif kind == "page":
        path.write_text("<!DOCTYPE html><title>404</title>")
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:1000])
    elif kind == "pickle":
        path.write_bytes(pickle.dumps({"a": [1, 2]}))
    else:
        content = {
            "module": small_network(),
            "list": [1, 2],
            "tensor": torch.ones(2),
            "empty dict": {},
            "empty state": {"model": {}},
            "numbers": {"epoch": 3, "accuracy": 0.5},
            "mixed": {**state, "epoch": 3},
        }[kind]
        torch.save(content, path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("bytes", "is not a checkpoint, or is damaged"),
        ("empty file", "is not a checkpoint, or is damaged"),
        ("page", "is not a checkpoint, or is damaged"),
        ("truncated", "is not a checkpoint, or is damaged"),
        ("pickle", "is not a checkpoint, or is damaged"),
        ("module", "holds a torch.nn.modules.container.Sequential; only tensors are read"),
        ("list", "holds a list; expected a dict of tensors"),
        ("tensor", "holds a Tensor; expected a dict of tensors"),
        ("empty dict", "holds an empty dict; expected a dict of tensors"),
        ("empty state", "holds entries that are no tensors: model; expected a dict of tensors"),
        ("numbers", "holds entries that are no tensors: epoch, accuracy; expected a dict of tensors"),
        ("mixed", "holds entries that are no tensors: epoch; expected a dict of tensors"),
    ],
)
def test_files_that_are_no_checkpoint(tmp_path, kind, message):
    path = tmp_path / "a.pth"
    write_bad(path, kind)
    fails(f"--weights: {path} {message}", read_state_dict, path, flag="--weights")


def test_paths_that_are_no_checkpoint(tmp_path):
    fails(f"--checkpoint: {tmp_path / 'a.pth'} does not exist", read_state_dict, tmp_path / "a.pth")
    fails(f"--checkpoint: {tmp_path} is a folder", read_state_dict, tmp_path)
    (tmp_path / "a.safetensors").write_bytes(b"\xff" * 100)
    fails("a.safetensors is not a checkpoint, or is damaged", read_state_dict, tmp_path / "a.safetensors")


# Loading


def load(model, state):
    load_state_dict(model, state, flag="--checkpoint", source="a.pth")


def test_loading_copies_every_tensor():
    model, trained = small_network(), small_network()
    for tensor in trained.state_dict().values():
        tensor.add_(1)
    load(model, dict(reversed(trained.state_dict().items())))
    assert_same(model.state_dict(), trained.state_dict())


def test_half_precision_weights_become_the_networks_dtype():
    model = small_network()
    load(model, {key: value.half() for key, value in small_network().state_dict().items()})
    assert model.fc.weight.dtype == torch.float32
    assert torch.equal(model.fc.weight, small_network().fc.weight.half().float())


def test_only_step_counters_may_be_missing():
    state = small_network().state_dict()
    del state["bn.num_batches_tracked"]
    load(small_network(), state)
    del state["bn.running_var"]
    fails("the keys of a.pth do not fit the network: missing bn.running_var", load, small_network(), state)


def test_differing_keys_are_named():
    state = {f"features.{key}": value for key, value in small_network().state_dict().items()}
    message = fails("--checkpoint: the keys of a.pth do not fit the network", load, small_network(), state)
    assert "missing conv.weight, conv.bias, bn.weight and 5 more" in message
    assert "unexpected features.conv.weight, features.conv.bias, features.bn.weight and 6 more" in message


def test_differing_shapes_are_named():
    message = fails(
        "a.pth does not fit the network: conv.weight has shape [5, 1, 3, 3], expected [4, 1, 3, 3]",
        load,
        small_network(),
        small_network(width=5).state_dict(),
    )
    assert "(7 tensors differ in shape)" in message
    state = small_network().state_dict()
    state["fc.weight"] = torch.zeros(5, 9)
    fails("fc.weight has shape [5, 9], expected [3, 4]", load, small_network(), state)


def test_a_wrong_class_count_says_the_right_one():
    fails(
        "a.pth has 7 classes (fc.weight), but the network was built for 3; expected --num_classes 7",
        load,
        small_network(),
        small_network(classes=7).state_dict(),
    )


def test_a_misfit_changes_nothing():
    model = small_network()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value + 1 for key, value in small_network(classes=7).state_dict().items()}
    fails("7 classes", load, model, state)
    assert_same(model.state_dict(), before)


# Fetching


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """The hub's checkpoint folder, empty."""
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


@pytest.fixture
def server(tmp_path, monkeypatch):
    """Serves tmp_path/www on this machine; yields (folder, URL, the paths that were asked for)."""
    folder = tmp_path / "www"
    folder.mkdir()
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(folder))

        def log_message(self, *args):
            asked.append(self.path)

    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield folder, f"http://127.0.0.1:{running.server_port}/", asked
        running.shutdown()


def test_a_checkpoint_is_downloaded_once(hub, server):
    folder, url, asked = server
    state = small_network().state_dict()
    torch.save({"state_dict": {f"module.{key}": value for key, value in state.items()}}, folder / "net.pth.tar")
    for _ in range(2):
        fetched, sha256 = fetch_state_dict(url + "net.pth.tar")
        assert_same(fetched, state)
        assert sha256 == hashlib.sha256((folder / "net.pth.tar").read_bytes()).hexdigest()
    assert asked == ["/net.pth.tar"] and [path.name for path in hub.iterdir()] == ["net.pth.tar"]


def test_a_file_put_into_the_hubs_folder_by_hand_is_used(hub, server):
    _, url, asked = server
    torch.save(small_network().state_dict(), hub / "net.pth.tar")
    assert_same(fetch_state_dict(url + "net.pth.tar")[0], small_network().state_dict())
    assert asked == []


def test_a_failed_download_says_which_file_goes_where(hub, server):
    message = fails("could not download", fetch_state_dict, server[1] + "lost/net.pth.tar")
    assert f"put the file net.pth.tar into the folder {hub}" in message and "404" in message
    fails("--weights: could not download", fetch_state_dict, "http://127.0.0.1:9/net.pth.tar", flag="--weights")
    assert list(hub.iterdir()) == []


def test_a_damaged_file_in_the_hubs_folder_is_named(hub, server):
    for kind, problem in (("truncated", "damaged"), ("module", "only tensors are read")):
        write_bad(hub / "net.pth", kind)
        message = fails(f"--checkpoint: {hub / 'net.pth'}", fetch_state_dict, server[1] + "net.pth")
        assert problem in message and "delete it" in message
    assert server[2] == []


# Hashes


def test_file_hash(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    assert file_sha256(tmp_path / "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    (tmp_path / "big").write_bytes(bytes(range(256)) * 10000)
    assert file_sha256(tmp_path / "big") == hashlib.sha256(bytes(range(256)) * 10000).hexdigest()


def test_state_hash_is_of_keys_and_bytes_in_the_order_of_keys():
    state = {"b": torch.tensor([1.0, 2.0]), "a": torch.tensor(3, dtype=torch.int64)}
    expected = hashlib.sha256(b"a" + b"\x03" + bytes(7) + b"b" + b"\x00\x00\x80\x3f\x00\x00\x00\x40").hexdigest()
    assert state_sha256(state) == state_sha256(dict(reversed(state.items()))) == expected
    assert state_sha256({"b": torch.ones(2, dtype=torch.bfloat16)}) != expected
