"""Every network by name, with weights in every layout it accepts, against networks built here."""

import http.server
import json
import threading
import warnings
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image
from torch import nn
from torch.nn import functional as F

from logart import QuantConfig, load_packed, quantize_model, save_packed
from logart.errors import UserError
from logart.networks.data import Preprocessing, Split
from logart.networks.weights import file_sha256, state_sha256
from logart.quantization.blocks import find_blocks
from logart.quantization.survey import survey
from logart_cnn import models
from logart_cnn.models import ARCHS, load_network
from logart_cnn.networks import CifarBlock, CifarResNet, DigitsBlock, DigitsResNet

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
RELEASE = "https://github.com/yhhhli/BRECQ/releases/download/v1.0/"
# arch -> (the file's URL, the class of its blocks, how many of them, the same network from its library)
STOCK = {
    "resnet18": (RELEASE + "resnet18_imagenet.pth.tar", "BasicBlock", 8, torchvision.models.resnet18),
    "resnet50": (RELEASE + "resnet50_imagenet.pth.tar", "Bottleneck", 16, torchvision.models.resnet50),
    "mobilenetv2": (RELEASE + "mobilenetv2.pth.tar", "InvertedResidual", 17, torchvision.models.mobilenet_v2),
    "regnetx_600m": (
        RELEASE + "regnet_600m.pth.tar",
        "Bottleneck",
        16,
        lambda: timm.create_model("regnetx_006"),
    ),
    "regnetx_3200m": (
        RELEASE + "regnet_3200m.pth.tar",
        "Bottleneck",
        25,
        lambda: timm.create_model("regnetx_032"),
    ),
    "mnasnet": (
        RELEASE + "mnasnet.pth.tar",
        "_InvertedResidual",
        16,
        lambda: torchvision.models.MNASNet(2.0),
    ),
    "squeezenet1_1": (
        "https://download.pytorch.org/models/squeezenet1_1-b8a52dc0.pth",
        "Fire",
        8,
        torchvision.models.squeezenet1_1,
    ),
}


@pytest.fixture(autouse=True)
def one_thread():
    """More would not help networks this small, and waiting for a busy core costs seconds a forward."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained(model, seed=1):
    """Random weights and running statistics, so that no tensor can be mistaken for another."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            size = module.num_features
            for tensor, low in ((module.weight, 0.5), (module.running_var, 0.5), (module.bias, -0.5)):
                tensor.data = torch.rand(size, generator=generator) + low
            module.running_mean = torch.rand(size, generator=generator) - 0.5
        elif isinstance(module, nn.Conv2d | nn.Linear):
            fan_in = module.weight[0].numel()
            module.weight.data = torch.randn(module.weight.shape, generator=generator) * (2 / fan_in) ** 0.5
            if module.bias is not None:
                module.bias.data = torch.randn(module.bias.shape, generator=generator)
    return model.eval()


def assert_same_logits(network, reference, size=64):
    images = torch.randn(2, network.preprocessing.input_size[0], size, size, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        expected, seen = reference(images), network.model(images)
    assert expected.std() > 1e-3 and not torch.equal(expected[0], expected[1])
    # Two implementations may pool and add in another order; a tensor in the wrong place is off by far more.
    torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4 * expected.abs().max().item())


def fails(message, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        load_network(*args, **kwargs)
    assert message in str(caught.value), str(caught.value)
    assert "\n" not in str(caught.value)


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
    """Serves tmp_path/www on this machine in place of every URL; yields (folder, paths asked for)."""
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
        threading.Thread(target=lambda: running.serve_forever(0.01), daemon=True).start()
        url = f"http://127.0.0.1:{running.server_port}/"
        for arch, entry in models.ENTRIES.items():
            if entry.weights.startswith("http"):
                monkeypatch.setitem(models.ENTRIES, arch, replace(entry, weights=url + Path(entry.weights).name))
        yield folder, asked
        running.shutdown()


# The foreign layouts, as networks of their own


class FlatBlock(nn.Module):
    """MobileNetV2's block with one flat list of layers."""

    def __init__(self, inp, out, stride, expansion):
        super().__init__()
        mid = inp * expansion
        expand = [nn.Conv2d(inp, mid, 1, bias=False), nn.BatchNorm2d(mid), nn.ReLU6()] if expansion > 1 else []
        self.conv = nn.Sequential(
            *expand,
            nn.Conv2d(mid, mid, 3, stride, 1, groups=mid, bias=False),
            nn.BatchNorm2d(mid),
            nn.ReLU6(),
            nn.Conv2d(mid, out, 1, bias=False),
            nn.BatchNorm2d(out),
        )
        self.residual = stride == 1 and inp == out

    def forward(self, x):
        return x + self.conv(x) if self.residual else self.conv(x)


class FlatMobileNetV2(nn.Module):
    """MobileNetV2 as its early ports to PyTorch lay it out; the last convolution and the classifier vary."""

    def __init__(self, last_in_features, dropout):
        super().__init__()
        layers = [nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU6())]
        width = 32
        stages = (
            (1, 16, 1, 1),
            (6, 24, 2, 2),
            (6, 32, 3, 2),
            (6, 64, 4, 2),
            (6, 96, 3, 1),
            (6, 160, 3, 2),
            (6, 320, 1, 1),
        )
        for expansion, out, repeats, stride in stages:
            for index in range(repeats):
                layers.append(FlatBlock(width, out, stride if index == 0 else 1, expansion))
                width = out
        last = nn.Sequential(nn.Conv2d(320, 1280, 1, bias=False), nn.BatchNorm2d(1280), nn.ReLU6())
        if last_in_features:
            layers.append(last)
        else:
            self.conv = last
        self.features = nn.Sequential(*layers)
        head = nn.Linear(1280, 1000)
        self.classifier = nn.Sequential(nn.Dropout(), head) if dropout else head

    def forward(self, x):
        x = self.features(x)
        if hasattr(self, "conv"):
            x = self.conv(x)
        return self.classifier(x.mean(3).mean(2))


class PyclsTransform(nn.Module):
    def __init__(self, inp, out, stride, group):
        super().__init__()
        self.a, self.a_bn = nn.Conv2d(inp, out, 1, bias=False), nn.BatchNorm2d(out)
        self.b, self.b_bn = (
            nn.Conv2d(out, out, 3, stride, 1, groups=out // group, bias=False),
            nn.BatchNorm2d(out),
        )
        self.c, self.c_bn = nn.Conv2d(out, out, 1, bias=False), nn.BatchNorm2d(out)

    def forward(self, x):
        x = F.relu(self.a_bn(self.a(x)))
        return self.c_bn(self.c(F.relu(self.b_bn(self.b(x)))))


class PyclsBlock(nn.Module):
    def __init__(self, inp, out, stride, group):
        super().__init__()
        if stride > 1 or inp != out:
            self.proj, self.bn = nn.Conv2d(inp, out, 1, stride, bias=False), nn.BatchNorm2d(out)
        self.f = PyclsTransform(inp, out, stride, group)

    def forward(self, x):
        shortcut = self.bn(self.proj(x)) if hasattr(self, "proj") else x
        return F.relu(shortcut + self.f(x))


class PyclsRegNet(nn.Module):
    """RegNetX as pycls names its parts; widths, depths and group width are the published ones."""

    def __init__(self, widths, depths, group):
        super().__init__()
        self.stem = nn.Sequential(OrderedDict(conv=nn.Conv2d(3, 32, 3, 2, 1, bias=False), bn=nn.BatchNorm2d(32)))
        inp = 32
        for stage, (width, depth) in enumerate(zip(widths, depths, strict=True), 1):
            blocks = OrderedDict()
            for index in range(1, depth + 1):
                blocks[f"b{index}"] = PyclsBlock(inp, width, 2 if index == 1 else 1, group)
                inp = width
            setattr(self, f"s{stage}", nn.Sequential(blocks))
        self.head = nn.Sequential(OrderedDict(fc=nn.Linear(inp, 1000)))

    def forward(self, x):
        x = F.relu(self.stem(x))
        for stage in (self.s1, self.s2, self.s3, self.s4):
            x = stage(x)
        return self.head(x.mean((2, 3)))


@pytest.mark.parametrize(("last_in_features", "dropout"), [(True, True), (False, False), (False, True)])
def test_mobilenetv2_in_the_flat_layout(hub, server, last_in_features, dropout):
    reference = trained(FlatMobileNetV2(last_in_features, dropout))
    torch.save(reference.state_dict(), server[0] / "mobilenetv2.pth.tar")
    network = load_network("mobilenetv2")
    assert server[1] == ["/mobilenetv2.pth.tar"]
    assert network.source.endswith("/mobilenetv2.pth.tar")
    assert network.sha256 == file_sha256(server[0] / "mobilenetv2.pth.tar")
    assert_same_logits(network, reference)


@pytest.mark.parametrize(
    ("arch", "widths", "depths", "group"),
    [
        ("regnetx_600m", (48, 96, 240, 528), (1, 3, 5, 7), 24),
        ("regnetx_3200m", (96, 192, 432, 1008), (2, 6, 15, 2), 48),
    ],
)
def test_regnetx_in_pycls_layout(hub, server, arch, widths, depths, group):
    reference = trained(PyclsRegNet(widths, depths, group))
    torch.save({"model_state": reference.state_dict()}, server[0] / Path(STOCK[arch][0]).name)
    network = load_network(arch)
    assert len(server[1]) == 1
    assert_same_logits(network, reference)


# The usual layouts


def blocks_of(model, size):
    """The names of the blocks of two layers and more."""
    images = torch.rand(2, *size)
    layers = survey(model, images).layers
    return [block.name for block in find_blocks(model, layers, images) if len(block.layers) > 1]


@pytest.mark.parametrize("arch", STOCK)
def test_stock_networks_take_their_librarys_layout(hub, arch):
    url, block, blocks, build = STOCK[arch]
    reference = trained(build())
    state = {f"module.{key}": value for key, value in reference.state_dict().items()}
    torch.save({"state_dict": state}, hub / Path(url).name)
    network = load_network(arch)
    assert_same_logits(network, reference)
    assert (network.arch, network.source, network.num_classes) == (arch, url, 1000)
    assert network.preprocessing == Preprocessing((3, 224, 224), 0.875, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    found = blocks_of(network.model, (3, 64, 64))
    assert set(found) == {name for name, module in network.model.named_modules() if type(module).__name__ == block}
    assert len(found) == blocks
    assert not network.model.training and all(p.dtype == torch.float32 for p in network.model.parameters())


def test_mobilenetv2_downloads_torchvisions_layout_too(hub, server):
    reference = trained(torchvision.models.mobilenet_v2())
    torch.save(reference.state_dict(), server[0] / "mobilenetv2.pth.tar")
    assert_same_logits(load_network("mobilenetv2"), reference)
    assert server[1] == ["/mobilenetv2.pth.tar"]


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.3])
def test_mnasnet_is_as_wide_as_its_checkpoint(tmp_path, alpha):
    reference = trained(torchvision.models.MNASNet(alpha, num_classes=7))
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    assert_same_logits(load_network("mnasnet", tmp_path / "a.pth", num_classes=7), reference)


def test_mnasnet_with_the_unscaled_stem_of_torchvisions_first_version(tmp_path):
    reference = torchvision.models.MNASNet(2.0)
    first_version = OrderedDict()
    first_version._metadata = {"": {"version": 1}}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torchvision says that it rebuilds the stem
        reference.load_state_dict(first_version, strict=False)
    torch.save(dict(trained(reference).state_dict()), tmp_path / "a.pth")
    assert reference.layers[0].out_channels == 32
    assert_same_logits(load_network("mnasnet", tmp_path / "a.pth"), reference)


def test_a_failed_download_names_file_and_folder(hub, server):
    fails(f"put the file resnet18_imagenet.pth.tar into the folder {hub}", "resnet18")


def test_archs_are_all_tested():
    assert set(ARCHS) == {*STOCK, *(f"cifar_resnet{depth}" for depth in (20, 32, 44, 56)), "digits_resnet"}


# The networks written here


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269722), (32, 464154), (44, 658586), (56, 853018)])
def test_cifar_resnets(tmp_path, depth, parameters):
    reference = trained(CifarResNet(depth))
    assert sum(p.numel() for p in reference.parameters()) == parameters  # the sizes in the literature
    torch.save(reference.state_dict(), tmp_path / "a.th")
    network = load_network(f"cifar_resnet{depth}", tmp_path / "a.th")
    assert_same_logits(network, reference, size=32)
    assert network.preprocessing == Preprocessing((3, 32, 32), 1.0, "bilinear", IMAGENET_MEAN, IMAGENET_STD)
    assert (network.num_classes, network.source) == (10, "a.th")
    assert sum(type(module).__name__ == "CifarBlock" for module in network.model.modules()) == (depth - 2) // 2
    fails("--checkpoint: cifar_resnet", f"cifar_resnet{depth}")


def test_cifar_resnet_key_layout():
    parts = {key.rpartition(".")[0] for key in CifarResNet(20).state_dict()}
    block_parts = ("conv1", "bn1", "conv2", "bn2")
    blocks = {f"layer{i}.{j}.{part}" for i in (1, 2, 3) for j in range(3) for part in block_parts}
    assert parts == {"conv1", "bn1", "linear"} | blocks


def test_cifar_shortcut_takes_every_second_pixel_between_zero_channels():
    block = trained(CifarBlock(16, 32, stride=2))
    nn.init.zeros_(block.bn2.weight)
    nn.init.zeros_(block.bn2.bias)
    images = torch.rand(2, 16, 8, 8)
    with torch.no_grad():
        output = block(images)
    assert torch.equal(output[:, 8:24], images[:, :, ::2, ::2])
    assert not output[:, :8].any() and not output[:, 24:].any()


def test_cifar_resnet_by_the_formula():
    model = trained(CifarResNet(20))
    state, images = model.state_dict(), torch.randn(2, 3, 32, 32)

    def conv_norm(x, index, conv, norm, stride=1):
        x = F.conv2d(x, state[f"{index}{conv}.weight"], stride=stride, padding=1)
        mean, var, gain, bias = (
            state[f"{index}{norm}.{name}"].view(1, -1, 1, 1)
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * gain + bias

    x = conv_norm(images, "", "conv1", "bn1").relu()
    for stage in (1, 2, 3):
        for row in range(3):
            stride = 2 if stage > 1 and row == 0 else 1
            shortcut = x
            if stride == 2:
                zeros = torch.zeros_like(x[:, : x.shape[1] // 2, ::2, ::2])
                shortcut = torch.cat([zeros, x[:, :, ::2, ::2], zeros], 1)
            y = conv_norm(x, f"layer{stage}.{row}.", "conv1", "bn1", stride).relu()
            x = (conv_norm(y, f"layer{stage}.{row}.", "conv2", "bn2") + shortcut).relu()
    expected = F.linear(x.mean((2, 3)), state["linear.weight"], state["linear.bias"])
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=1e-4, atol=1e-3)


def test_digits_resnet(tmp_path):
    reference = trained(DigitsResNet())
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    network = load_network("digits_resnet", tmp_path / "a.pth")
    assert_same_logits(network, reference, size=8)
    assert network.num_classes == 10
    found = [type(network.model.get_submodule(name)).__name__ for name in blocks_of(network.model, (1, 8, 8))]
    assert set(found) == {"DigitsBlock"} and len(found) == sum(type(m) is DigitsBlock for m in network.model.modules())
    assert network.preprocessing == Preprocessing((1, 8, 8), 1.0, "bilinear", (0.3053,), (0.3761,))
    assert sum(p.numel() for p in reference.parameters()) * 4 < 400_000  # what may be shipped


def test_digits_resnet_widths_set_its_blocks():
    model = trained(DigitsResNet(widths=(8, 8, 12), num_classes=3))
    assert [block.conv2.out_channels for block in model.blocks] == [8, 8, 12]
    with torch.no_grad():
        assert model.blocks(torch.rand(1, 8, 8, 8)).shape == (1, 12, 4, 4)
        assert model(torch.rand(5, 1, 8, 8)).shape == (5, 3)


def test_packaged_weights(tmp_path, monkeypatch):
    (tmp_path / "weights").mkdir()
    reference = trained(DigitsResNet())
    torch.save(reference.state_dict(), tmp_path / "weights" / "digits.pth")
    monkeypatch.setattr(models.resources, "files", lambda package: tmp_path)
    entry = replace(models.ENTRIES["digits_resnet"], weights="weights/digits.pth")
    monkeypatch.setitem(models.ENTRIES, "digits_resnet", entry)
    network = load_network("digits_resnet")
    assert (network.source, network.sha256) == ("digits.pth", file_sha256(tmp_path / "weights/digits.pth"))
    assert_same_logits(network, reference, size=8)


# timm


def test_timm_with_a_checkpoint(tmp_path):
    kwargs = {"in_chans": 1, "num_classes": 7, "stem_width": 16}
    reference = trained(timm.create_model("resnet10t", **kwargs))
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    network = load_network(
        "timm:resnet10t",
        tmp_path / "a.pth",
        model_kwargs=kwargs,
        input_size=48,
        crop_pct=1.0,
        mean=[0.5],
        std=[0.25],
        interpolation="bilinear",
    )
    assert_same_logits(network, reference)
    assert network.preprocessing == Preprocessing((1, 48, 48), 1.0, "bilinear", (0.5,), (0.25,))
    assert (network.num_classes, network.source) == (7, "a.pth")
    assert network.sha256 == file_sha256(tmp_path / "a.pth")


def test_timm_takes_the_data_settings_of_its_own_config(tmp_path):
    torch.save(timm.create_model("resnet10t", num_classes=7).state_dict(), tmp_path / "a.pth")
    network = load_network("timm:resnet10t.c3_in1k", tmp_path / "a.pth", num_classes=7)
    assert network.preprocessing == Preprocessing((3, 176, 176), 0.875, "bicubic", IMAGENET_MEAN, IMAGENET_STD)


def test_timms_pretrained_weights(tmp_path):
    reference = trained(timm.create_model("lcnet_035"))
    torch.save(reference.state_dict(), tmp_path / "a.pth")
    kwargs = {"pretrained_cfg_overlay": {"file": str(tmp_path / "a.pth")}}
    network = load_network("timm:lcnet_035", model_kwargs=kwargs)
    assert_same_logits(network, reference)
    assert network.source == "timm:lcnet_035.untrained"
    assert network.sha256 == state_sha256(reference.state_dict())
    fails(
        "--num_classes: 7 asked for, but timm's weights for lcnet_035 have 1000",
        "timm:lcnet_035",
        model_kwargs=kwargs,
        num_classes=7,
    )
    kwargs = {"pretrained_cfg_overlay": {"file": str(tmp_path / "lost.pth")}}
    fails("--arch: no pretrained weights for timm:lcnet_035", "timm:lcnet_035", model_kwargs=kwargs)


# Overrides and mistakes


@pytest.fixture
def digits_file(tmp_path):
    torch.save(DigitsResNet().state_dict(), tmp_path / "digits.pth")
    return tmp_path / "digits.pth"


def test_overrides(tmp_path):
    torch.save(CifarResNet(20, num_classes=100).state_dict(), tmp_path / "a.pth")
    network = load_network(
        "cifar_resnet20",
        tmp_path / "a.pth",
        num_classes=100,
        input_size=40,
        crop_pct=0.9,
        mean=[0.5],
        std=[0.1, 0.2, 0.3],
        interpolation="bicubic",
    )
    assert network.num_classes == 100
    assert network.preprocessing == Preprocessing((3, 40, 40), 0.9, "bicubic", (0.5,) * 3, (0.1, 0.2, 0.3))


def test_mistakes_about_settings(digits_file):
    for message, kwargs in (
        ("--model_kwargs: only for --arch timm:NAME", {"model_kwargs": {"drop_rate": 0.1}}),
        ("--num_classes: 0; expected at least 1", {"num_classes": 0}),
        ("--input_size: 0; expected at least 1", {"input_size": 0}),
        ("--crop_pct: 0.0; expected more than 0", {"crop_pct": 0.0}),
        ("--crop_pct: 1.5; expected more than 0 and at most 1", {"crop_pct": 1.5}),
        ("--mean: 3 values; expected 1 or 1", {"mean": [0.1, 0.2, 0.3]}),
        ("--std: 0 values; expected 1", {"std": []}),
        ("--std: 0.0; expected positive values", {"std": [0.0]}),
        ("--interpolation: 'cubic'; expected nearest, bilinear, bicubic", {"interpolation": "cubic"}),
        (
            "--checkpoint: digits.pth has 10 classes (linear.weight), but the network was built for 9; "
            "expected --num_classes 10",
            {"num_classes": 9},
        ),
    ):
        fails(message, "digits_resnet", digits_file, **kwargs)


def test_mistakes_about_names(digits_file):
    fails("--arch: no network 'resnet19'; did you mean resnet18?", "resnet19")
    fails("--arch: no network '???'; expected one of resnet18, resnet50", "???")
    fails("--arch: timm has no model 'resnt50'; did you mean timm:resnet50", "timm:resnt50")
    fails("--arch: timm has no model ''", "timm:")
    fails("--arch: timm cannot build resnet10t.lost", "timm:resnet10t.lost", digits_file)
    fails(
        "--model_kwargs: timm cannot build resnet10t",
        "timm:resnet10t",
        digits_file,
        model_kwargs={"bogus": 1},
    )
    fails(
        "--num_classes: 7, but --model_kwargs has num_classes=8",
        "timm:resnet10t",
        digits_file,
        num_classes=7,
        model_kwargs={"num_classes": 8},
    )
    torch.save(timm.create_model("lcnet_035", in_chans=2).state_dict(), digits_file)
    fails(
        "--mean: 3 values; expected 1 or 2, one per input channel",
        "timm:lcnet_035",
        digits_file,
        model_kwargs={"in_chans": 2},
    )


def test_mistakes_about_checkpoints(tmp_path, digits_file):
    fails(
        "--checkpoint: the keys of digits.pth do not fit the network: missing layer1.0.conv1.weight",
        "resnet18",
        digits_file,
    )
    fails("missing layer1.0.conv1.weight", "cifar_resnet20", digits_file)
    fails("--checkpoint: the keys of digits.pth do not fit the network", "mnasnet", digits_file)
    fails("--checkpoint: the keys of digits.pth do not fit the network", "timm:resnet10t", digits_file)
    fails(f"--checkpoint: {tmp_path / 'lost.pth'} does not exist", "digits_resnet", tmp_path / "lost.pth")
    fails(f"--checkpoint: {tmp_path / 'lost.pth'} does not exist", "timm:resnet10t", tmp_path / "lost.pth")


@pytest.mark.parametrize(("height", "width"), [(64, 48), (48, 64), (32, 96)])
def test_images_need_not_be_square(tmp_path, height, width):
    model = timm.create_model("test_vit", img_size=(height, width), num_classes=3).eval()
    torch.save(model.state_dict(), tmp_path / "a.pth")
    network = load_network("timm:test_vit", tmp_path / "a.pth", input_size=(height, width), channels=3, num_classes=3)
    assert network.preprocessing.input_size == (3, height, width)
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (70, 90, 3), np.uint8))
    x = Split(["image"], [0], lambda name: image, network.preprocessing)[0][0][None]
    assert x.shape == (1, 3, height, width) and torch.equal(network.model(x), model(x))
    quantized, _ = quantize_model(network.model, QuantConfig(rounding="nearest"), torch.cat([x, x]))
    quantized.packed_info["network"] = json.loads(json.dumps(network.recipe))
    save_packed(quantized, tmp_path / "net.safetensors")
    assert torch.equal(load_packed(tmp_path / "net.safetensors")(x), quantized(x))
