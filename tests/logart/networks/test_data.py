"""Images: a network's view of a file, the choice of calibration images, streaming, every user's mistake."""

import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from logart.errors import UserError
from logart.networks.calibration import calibration_images, load_names, save_names
from logart.networks.data import Preprocessing, open_images
from logart.networks.loader import validation_batches

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
COLOUR = Preprocessing((3, 32, 32), 1.0, "bilinear", MEAN, STD)
GREY = Preprocessing((1, 8, 8), 1.0, "bilinear", (0.25,), (0.5,))
CLASSES = ("ant", "bee")


def write_images(root, counts=(("train", 5), ("val", 3)), size=(32, 32)):
    rng = np.random.default_rng(7)
    for part, count in counts:
        for name in CLASSES:
            folder = root / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{index}.png")
    return root


@pytest.fixture
def folder(tmp_path):
    return write_images(tmp_path / "insects")


@pytest.fixture(scope="module")
def digits():
    return open_images("digits", GREY, 10)


def expected_tensor(image, mean=MEAN, std=STD):
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1) / 255
    return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)


def global_state():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


# Preprocessing


def test_images_of_the_right_size_are_only_normalized(folder):
    source = open_images(str(folder), COLOUR, 2)
    assert (source.name, source.class_names) == ("insects", CLASSES)
    assert source.train.names[6] == "train/bee/1.png"
    image, label = source.train[6]
    assert label == 1 and image.dtype == torch.float32
    assert torch.equal(image, expected_tensor(Image.open(folder / "train/bee/1.png")))


def test_other_images_are_resized_by_the_short_side_and_cropped_in_the_centre(tmp_path):
    write_images(tmp_path, size=(60, 40))
    view = Preprocessing((3, 16, 16), 0.5, "bicubic", MEAN, STD)
    image, _ = open_images(str(tmp_path), view, 2).val[0]
    resized = Image.open(tmp_path / "val/ant/0.png").resize((48, 32), Image.Resampling.BICUBIC)
    assert torch.equal(image, expected_tensor(resized.crop((16, 8, 32, 24))))


def test_one_channel_reads_colour_images_as_grey(folder):
    view = Preprocessing((1, 32, 32), 1.0, "bilinear", (0.0,), (1.0,))
    image, _ = open_images(str(folder), view, 2).val[0]
    grey = np.array(Image.open(folder / "val/ant/0.png").convert("L"))
    assert torch.equal(image, torch.from_numpy(grey)[None] / 255)


# The digits


def test_digits_are_split_for_good(digits):
    assert (digits.name, digits.class_names) == ("digits", tuple("0123456789"))
    numbers = [[int(name.rpartition("/")[2]) for name in split.names] for split in (digits.train, digits.val)]
    assert [len(part) for part in numbers] == [1297, 500]
    assert sorted(numbers[0] + numbers[1]) == list(range(1797))
    assert digits.train.names[:3] == ["digits/train/0", "digits/train/2", "digits/train/3"]
    assert digits.val.names[:3] == ["digits/val/1", "digits/val/8", "digits/val/10"]
    target = load_digits().target
    assert np.abs(np.bincount(target[numbers[1]]) - np.bincount(target) * 500 / 1797).max() < 1


def test_a_digit_is_its_pixels_normalized(digits):
    raw = load_digits()
    for split, row in ((digits.train, 100), (digits.val, 17)):
        index = int(split.names[row].rpartition("/")[2])
        image, label = split[row]
        assert label == raw.target[index]
        assert torch.equal(image, (torch.from_numpy(raw.images[index]).float()[None] / 16 - 0.25) / 0.5)


# Calibration images


def test_the_seed_alone_chooses(digits):
    before = global_state()
    images, names = calibration_images(digits, 4, 0, quiet=True)
    assert names == [f"digits/train/{index}" for index in (916, 656, 1001, 340)]  # the same on every machine
    assert global_state() == before
    rows = [digits.train.names.index(name) for name in names]
    assert torch.equal(images, torch.stack([digits.train[row][0] for row in rows]))
    more, more_names = calibration_images(digits, 1297, 0, quiet=True)
    assert more_names[:4] == names and torch.equal(more[:4], images)
    assert sorted(more_names) == sorted(digits.train.names)  # without replacement
    assert calibration_images(digits, 4, 1, quiet=True)[1] != names


def test_augmentation_is_seeded_and_leaves_the_global_generators(folder):
    source = open_images(str(folder), COLOUR, 2)
    before = global_state()
    images, names = calibration_images(source, 6, 3, augment=True, quiet=True)
    assert global_state() == before
    torch.rand(5)
    again, again_names = calibration_images(source, 6, 3, augment=True, quiet=True)
    assert names == again_names and torch.equal(images, again)
    plain, plain_names = calibration_images(source, 6, 3, quiet=True)
    assert plain_names == names and images.shape == plain.shape == (6, 3, 32, 32)
    assert all(not torch.equal(a, b) for a, b in zip(images, plain, strict=True))
    other, _ = calibration_images(source, 6, 4, augment=True, names=names, quiet=True)
    assert not torch.equal(other, images)


def test_augmentation_flips_about_half(tmp_path):
    write_images(tmp_path)
    ramp = np.repeat(np.linspace(0, 255, 32, dtype=np.uint8)[None, :, None], 32, 0).repeat(3, 2)
    for path in tmp_path.glob("train/*/*.png"):
        Image.fromarray(ramp).save(path)
    source = open_images(str(tmp_path), COLOUR, 2)
    drops = [
        (x[0, 0, 0] > x[0, 0, -1]).item()
        for seed in range(4)
        for x in calibration_images(source, 10, seed, augment=True, quiet=True)[0]
    ]
    assert 10 <= sum(drops) <= 30


def test_digits_can_be_augmented(digits):
    images, _ = calibration_images(digits, 8, 0, augment=True, quiet=True)
    assert images.shape == (8, 1, 8, 8) and -0.5 <= images.min() < images.max() <= 1.5


def test_a_saved_list_gives_the_same_images(folder, tmp_path):
    (folder / "train/ant/0.png").rename(folder / "train/ant/naïve été 0.png")
    source = open_images(str(folder), COLOUR, 2)
    images, names = calibration_images(source, 10, 5, quiet=True)
    save_names(tmp_path / "list.txt", names)
    assert load_names(tmp_path / "list.txt") == names
    again, again_names = calibration_images(source, 10, 99, names=load_names(tmp_path / "list.txt"), quiet=True)
    assert again_names == names and torch.equal(again, images)
    first, first_names = calibration_images(source, 3, 99, names=names, quiet=True)
    assert first_names == names[:3] and torch.equal(first, images[:3])


def fails(message, call, *args, **kwargs):
    with pytest.raises(UserError) as caught:
        call(*args, **kwargs)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_crops_are_other_windows_of_the_resized_image(tmp_path):
    """Each behind its own image; every one is a window of the image as it is before the centre is cut out."""
    root = write_images(tmp_path / "wide", size=(40, 32))
    source = open_images(root, replace(COLOUR, crop_pct=0.8, input_size=(3, 16, 16)), len(CLASSES))
    whole = open_images(root, replace(COLOUR, crop_pct=1.0, input_size=(3, 20, 20)), len(CLASSES))  # the same resizing
    before = global_state()
    images, names = calibration_images(source, 4, 0, crops=2, quiet=True)
    assert global_state() == before and images.shape == (12, 3, 16, 16) and len(names) == 4
    plain, plain_names = calibration_images(source, 4, 0, quiet=True)
    assert torch.equal(images[::3], plain) and names == plain_names
    assert torch.equal(images, calibration_images(source, 4, 0, crops=2, quiet=True)[0])
    resize = whole.train._transform.transforms[0]
    places = set()
    for row, image in enumerate(images):
        with Image.open(root / names[row // 3]) as opened:
            resized = expected_tensor(resize(opened.convert("RGB")))
        assert resized.shape == (3, 20, 25)
        windows = resized.unfold(1, 16, 1).unfold(2, 16, 1)  # [3, 5, 10, 16, 16]
        off = (windows - image[:, None, None]).abs().amax((0, 3, 4))
        assert float(off.min()) < 1e-5
        places.add(int(off.argmin()))
    assert len(places) > 4  # not always the centre


def test_crops_of_images_that_are_not_cut_are_refused(digits):
    fails("--crops: the images are resized to 8×8, which is all", calibration_images, digits, 2, 0, crops=1, quiet=True)


def test_mistakes_about_calibration_images(folder, tmp_path):
    source = open_images(str(folder), COLOUR, 2)
    fails("--calib_samples: 11 images asked for; expected 1 to 10", calibration_images, source, 11, 0)
    fails("--search_samples: 0 images", calibration_images, source, 0, 0, flag="--search_samples")
    names = ["train/ant/1.png", "train/ant/lost.png", "train/bee/lost.png"]
    fails(
        "--calib_list: 'train/ant/lost.png' is not a training image of insects",
        calibration_images,
        source,
        1,
        0,
        names=names,
    )
    fails("'train/ant/1.png' is listed twice", calibration_images, source, 1, 0, names=names[:1] * 2)
    fails("expected 1 to 1, the size of the saved list", calibration_images, source, 2, 0, names=names[:1])
    fails("--calib_list: cannot read", load_names, tmp_path / "absent.txt")
    fails("--calib_list: cannot read", load_names, tmp_path)
    fails("--save_calib_list: cannot write", save_names, tmp_path / "absent" / "list.txt", names)


# The validation stream


def test_validation_batches_come_in_order(folder):
    source = open_images(str(folder), COLOUR, 2)
    before = global_state()
    for workers in (0, 2):
        batches = list(validation_batches(source, 4, workers))
        assert [len(labels) for _, labels in batches] == [4, 2]
        assert torch.cat([labels for _, labels in batches]).tolist() == [0, 0, 0, 1, 1, 1]
        assert torch.equal(
            torch.cat([images for images, _ in batches]),
            torch.stack([source.val[row][0] for row in range(6)]),
        )
    assert global_state() == before


def test_validation_streams(digits, monkeypatch):
    read = []
    load = digits.val._load
    monkeypatch.setattr(digits.val, "_load", lambda name: read.append(name) or load(name))
    batches = iter(validation_batches(digits, 16, 0))
    assert read == []
    next(batches)
    assert read == digits.val.names[:16]


# Mistakes about the data


def test_folders_that_are_no_data_set(folder, tmp_path):
    fails(
        f"--data_path: no folder {tmp_path / 'absent'}; expected ImageNet layout",
        open_images,
        str(tmp_path / "absent"),
        COLOUR,
        2,
    )
    fails("--data: no folder", open_images, str(folder / "train/ant/0.png"), COLOUR, 2, flag="--data")
    fails("no folder 'train' under", open_images, str(tmp_path), COLOUR, 2)
    fails("has 2 classes, but the network has 1000", open_images, str(folder), COLOUR, 1000)
    fails(
        "1 or 3 channels, not 4",
        open_images,
        str(folder),
        Preprocessing((4, 8, 8), 1.0, "bilinear", MEAN, STD),
        2,
    )
    for path in folder.glob("val/*/*.png"):
        path.unlink()
    fails("no images in the class folders under", open_images, str(folder), COLOUR, 2)
    shutil.rmtree(folder / "val/ant")
    shutil.rmtree(folder / "val/bee")
    fails("no class folders under", open_images, str(folder), COLOUR, 2)
    shutil.rmtree(folder / "val")
    fails("no folder 'val' under", open_images, str(folder), COLOUR, 2)


def test_digits_need_a_network_for_ten_grey_classes():
    fails("digits has 10 classes, but the network has 7", open_images, "digits", GREY, 7)
    fails("'digits' has 1 channel, the network 3", open_images, "digits", COLOUR, 10)


def break_image(path, how):
    content = path.read_bytes()
    path.write_bytes({"empty": b"", "text": b"no image\n", "truncated": content[: len(content) // 2]}[how])


@pytest.mark.parametrize("how", ["empty", "text", "truncated"])
def test_an_unreadable_image_is_named(folder, how):
    Image.open(folder / "train/bee/2.png").save(folder / "train/bee/2.jpg")
    break_image(folder / "train/bee/2.jpg", how)
    break_image(folder / "val/ant/1.png", how)
    source = open_images(str(folder), COLOUR, 2)
    for augment in (False, True):
        fails(
            f"--data_path: cannot read the image {folder / 'train/bee/2.jpg'}",
            calibration_images,
            source,
            11,
            0,
            augment=augment,
            quiet=True,
        )
    for workers in (0, 2):
        fails(
            f"--data_path: cannot read the image {folder / 'val/ant/1.png'}",
            list,
            validation_batches(source, 4, workers),
        )


def test_some_images_are_of_every_class_as_many(folder):
    val = open_images(str(folder), COLOUR, 2).val
    some = val.balanced(2)
    assert len(some) == 2 and len({some[0][1], some[1][1]}) == 2 and set(some.names) <= set(val.names)
    assert torch.equal(some[0][0], val[val.names.index(some.names[0])][0])
