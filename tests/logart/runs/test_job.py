"""The command that a row holds: what a shell would be told to get the run's figures again."""

import shlex

import pytest

import logart_cnn.command
import logart_vit.command
from logart.runs.flags import kept_flags
from logart.runs.job import command_line

LINES = {
    "cnn": [
        "--arch resnet18 --data_path /data/imagenet --n_bits_w 3 --scale_search --seed 5",
        "--arch timm:resnet10t --input-size 3 64 64 --model_kwargs num_classes=7 drop_rate=0.5 --damping auto --mirror",
        "--layer_bits 'layer1*=4' fc=8 --skip '*.conv2' --checkpoint '/home/me/my nets/a b.pth'",
        "--quiet --results /x/r.csv",
    ],
    "vit": ["--model deit_tiny --dataset /data/imagenet --w_bit 4", "--model vit_tiny --once --save /x/y"],
}


@pytest.mark.parametrize(("track", "line"), [(track, line) for track, lines in LINES.items() for line in lines])
def test_a_command_says_what_was_given_but_no_folder_and_no_output(track: str, line: str) -> None:
    parser = {"cnn": logart_cnn.command, "vit": logart_vit.command}[track].build_parser()
    given = parser.parse_args(shlex.split(line))
    program, *words = shlex.split(command_line(track, kept_flags(given)))
    assert program == parser.prog and not any("/" in word for word in words)
    again = vars(parser.parse_args(words))
    for name, value in vars(given).items():
        if name in ("data_path", "dataset", "checkpoint") and value is not None:
            value = value.rpartition("/")[2]
        elif name in ("quiet", "results", "once", "save"):
            value = again[name]
            assert f"--{name}" not in words
        assert again[name] == value, name
