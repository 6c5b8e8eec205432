"""Folders of images by class."""

import os

import numpy as np
import pytest
from PIL import Image, ImageFile

from kvision.data import DataError, folder, load, read_image_folder
from kvision.data.images import read_fitted, read_image
from kvision.data.preprocessing import Preprocessing

pytestmark = pytest.mark.backend_free


def write(path, value, size=(6, 4), mode="RGB"):
    """An image of one color; `size` is (width, height), as in Pillow."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


@pytest.fixture
def splits(tmp_path):
    """train and test folders of two classes; the red value is 10 x the image's number, the blue one the class."""
    root = tmp_path / "pets"
    for split, count in (("train", 3), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            for i in range(count):
                write(root / split / name / f"{i}.png", (10 * i, 0, label))
    return root


def test_train_and_test_folders(splits):
    dataset = load("cifar10", splits)
    assert (dataset.name, dataset.classes, dataset.input_shape) == ("pets", ("cat", "dog"), (4, 6, 3))
    assert dataset.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert dataset.y_test.tolist() == [0, 0, 1, 1]
    assert dataset.x_train[:, 0, 0, 0].tolist() == [0, 10, 20] * 2
    np.testing.assert_array_equal(dataset.x_test[..., 2], np.broadcast_to(dataset.y_test[:, None, None], (4, 4, 6)))


def test_a_val_folder_is_the_test_split(splits):
    (splits / "test").rename(splits / "val")
    assert len(load("cifar10", splits).y_test) == 4


def test_a_folder_with_a_single_subfolder(splits):
    assert load("cifar10", splits.parent).name == "pets"


@pytest.mark.parametrize("inside", ["", "train"])
def test_without_a_test_folder_a_fifth_of_each_class_is_sampled(tmp_path, inside):
    root = tmp_path / "pets"
    for name, count in (("cat", 10), ("dog", 5), ("eel", 2)):
        for i in range(count):
            write(root / inside / name / f"{i:02}.png", (i, 0, 0))
    one, same, other = (read_image_folder(root, seed=seed) for seed in (1, 1, 2))
    assert np.bincount(one.y_test).tolist() == [2, 1, 1]
    assert np.bincount(one.y_train).tolist() == [8, 4, 1]
    for label, count in enumerate((10, 5, 2)):
        parts = [x[y == label][:, 0, 0, 0] for x, y in ((one.x_train, one.y_train), (one.x_test, one.y_test))]
        assert sorted(np.concatenate(parts)) == list(range(count))
    np.testing.assert_array_equal(one.x_test, same.x_test)
    assert not np.array_equal(one.x_test, other.x_test)


@pytest.mark.parametrize(
    ("mode", "value", "rgb", "gray"),
    [
        ("L", 100, (100, 100, 100), 100),
        ("RGBA", (10, 20, 30, 40), (10, 20, 30), 18),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0), 0),
        ("1", 1, (255, 255, 255), 255),
        ("I;16", 0x8012, (128, 128, 128), 128),
        ("P", 3, None, None),
    ],
)
def test_every_mode_becomes_rgb_or_gray(tmp_path, mode, value, rgb, gray):
    suffix = "tif" if mode == "CMYK" else "png"
    for name in "ab":
        for i in range(2):
            write(tmp_path / "x" / name / f"{i}.{suffix}", value, mode=mode)
    color = load("cifar10", tmp_path / "x")
    black = load("mnist", tmp_path / "x")
    assert (color.input_shape, black.input_shape) == ((4, 6, 3), (4, 6, 1))
    if rgb:
        assert tuple(color.x_train[0, 0, 0]) == rgb
        assert black.x_train[0, 0, 0].item() == gray


def test_images_of_several_sizes_require_a_size(splits):
    """The first image's size is never used silently."""
    write(splits / "train" / "cat" / "9.jpg", (200, 0, 0), size=(50, 20))
    with pytest.raises(
        DataError, match=r"images of several sizes, such as 0\.png of 4x6 and 9\.jpg of 20x50; give the"
    ):
        load("cifar10", splits)
    dataset = load("cifar10", splits, size=(4, 6))
    assert dataset.input_shape == (4, 6, 3)
    assert dataset.x_train[3, 2, 3, 0] > 190
    assert load("cifar10", splits, size=(8, 3)).input_shape == (8, 3, 3)


def noise(height, width, seed=0):
    """A smooth random image, so that a JPEG of it is close to it."""
    small = np.random.default_rng(seed).integers(0, 256, (max(2, height // 20), max(2, width // 20), 3), np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


@pytest.mark.parametrize("shape", [(40, 60), (61, 40), (40, 40), (8, 9), (300, 400)])
@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_read_fitted_equals_preprocessing(tmp_path, shape, suffix, orientation):
    """The shorter side resized, the center cut out, upright: training sees what `Preprocessing.images` shows later. A
    JPEG that is decoded at a part of its size differs a little."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{suffix}"
    noise(*shape).save(path, exif=exif, quality=95)
    upright = np.asarray(read_image(path))
    assert (upright.shape[0] == shape[1]) is (orientation == 6 or orientation == 8) or shape[0] == shape[1]
    expected = Preprocessing(size=(16, 24), scale=1.0).images([upright])[0]
    found = read_fitted(path, (16, 24))
    assert found.dtype == np.uint8 and np.abs(found - expected).mean() < (2 if suffix == "jpg" else 0.3)
    gray = read_fitted(path, (16, 24), gray=True)
    assert gray.shape == (16, 24, 1)
    assert np.abs(gray[..., 0] - expected @ [0.299, 0.587, 0.114]).mean() < 2


def test_a_large_jpeg_is_decoded_at_reduced_size(tmp_path):
    noise(1200, 1600).save(tmp_path / "a.jpg", quality=95)
    sizes, load_ = [], ImageFile.ImageFile.load
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ImageFile.ImageFile, "load", lambda self: sizes.append(self.size) or load_(self))
        read_fitted(tmp_path / "a.jpg", (32, 32))
    assert sizes[0] == (200, 150)


def test_memory_is_logged_before_decoding_and_limited(splits, monkeypatch):
    told = []
    load("cifar10", splits, size=(64, 64), log=told.append)
    assert told == [f"decoding {splits}: 10 images of 64x64 pixels take 0 MiB of memory"]
    monkeypatch.setattr(folder, "read_fitted", lambda *arguments, **options: pytest.fail("an image was read"))
    with pytest.raises(
        DataError, match=r"10 images of 64x64 pixels take .*--image-size 57\).*: 8 in all.*--data-memory"
    ):
        load("cifar10", splits, size=(64, 64), memory=100_000)


def test_a_limit_reads_only_the_images_of_the_subset(splits):
    whole, part = load("cifar10", splits), load("cifar10", splits, limit=(4, 3))
    expected = whole.subset(train=4, test=3, seed=0)
    for name in ("x_train", "y_train", "x_test", "y_test", "classes", "source", "name"):
        np.testing.assert_array_equal(getattr(part, name), getattr(expected, name))
    for path in (splits / "train").rglob("*.png"):
        if int(path.stem) * 10 not in {int(image[0, 0, 0]) for image in part.x_train}:
            path.write_bytes(b"broken")
    load("cifar10", splits, limit=(4, 3))


@pytest.mark.parametrize("name", [b"d\xe9j\xe0", b"two\nlines", b"\x1b[2J", b"tab\there", "line\u2028".encode()])
@pytest.mark.skipif(os.name == "nt", reason="such names there are none")
def test_unprintable_class_names_raise_on_reading(splits, name, monkeypatch):
    """Not only after the training, when they are written."""
    try:
        os.rename(os.fsencode(splits / "train" / "dog"), os.path.join(os.fsencode(splits), b"train", name))
    except OSError:
        pytest.skip("this file system takes no such name")
    (splits / "test" / "dog").rename(splits / "dog")
    monkeypatch.setattr(folder, "read_fitted", lambda *arguments, **options: pytest.fail("an image was read"))
    with pytest.raises(
        DataError, match=r"class name .* is (empty|not UTF-8, or contains control characters); rename it"
    ) as caught:
        load("cifar10", splits, size=(4, 4))
    assert str(caught.value).isprintable()


def test_class_names_may_be_of_any_script(splits):
    for split in ("train", "test"):
        (splits / split / "dog").rename(splits / split / "собака 犬 \U0001f415")
    assert load("cifar10", splits).classes[1] == "собака 犬 \U0001f415"


def test_a_non_unicode_folder_name_becomes_printable(splits):
    root = os.path.join(os.fsencode(splits.parent), b"p\xe9ts")
    try:
        os.rename(splits, root)
    except OSError:
        pytest.skip("this file system takes no such name")
    dataset = load("cifar10", os.fsdecode(root))
    assert dataset.name == "p?ts" and dataset.source.encode().endswith(b"p?ts")


def test_other_files_are_skipped(splits):
    (splits / "train" / "cat" / "notes.txt").write_text("x")
    (splits / "train" / "cat" / ".hidden.png").write_text("x")
    (splits / "train" / "empty").mkdir()
    (splits / "train" / ".cache" / "a").mkdir(parents=True)
    assert load("cifar10", splits).classes == ("cat", "dog")


def test_a_folder_called_cifar10_is_not_cifar10(splits):
    root = splits.rename(splits.with_name("CIFAR-10"))
    assert load("cifar10", root).name == "CIFAR-10_folder"


def broken(folder):
    (folder / "train" / "dog" / "1.png").write_bytes((folder / "train" / "dog" / "1.png").read_bytes()[:50])


def bomb(folder):
    # Only a header, which claims 60,000 x 60,000 pixels.
    path = folder / "train" / "dog" / "1.png"
    content = path.read_bytes()
    side = (60_000).to_bytes(4, "big")
    import zlib

    chunk = b"IHDR" + side * 2 + content[24:29]
    path.write_bytes(content[:12] + chunk + zlib.crc32(chunk).to_bytes(4, "big") + content[33:])


def remove(*parts):
    def fault(folder):
        import shutil

        for part in parts:
            shutil.rmtree(folder / part)

    return fault


FAULTS = {
    "a broken image": (broken, r"cannot read the image .*dog/1\.png"),
    "text as image": (lambda f: (f / "test" / "cat" / "0.png").write_text("x"), r"image .*test/cat/0\.png"),
    "a pixel bomb": (bomb, r"cannot read the image .*dog/1\.png.*bomb"),
    "one class": (remove("train/dog", "test/dog"), "one class only, 'cat'"),
    "an unknown test class": (lambda f: write(f / "test" / "eel" / "0.png", 0), "lacks: eel"),
    "one image of a class": (
        lambda f: (remove("test")(f), write(f / "train" / "eel" / "0.png", 0)),
        "class 'eel' has one image",
    ),
    "no images": (remove("train/cat", "train/dog", "test"), "no images by class"),
    "nothing": (remove("train", "test"), "no images by class, but nothing; expected"),
}


@pytest.mark.parametrize(("fault", "message"), FAULTS.values(), ids=FAULTS.keys())
def test_an_invalid_folder_raises_with_what_was_expected(splits, fault, message):
    fault(splits)
    with pytest.raises(DataError, match=message) as caught:
        load("cifar10", splits)
    assert "\n" not in str(caught.value)


def test_too_many_pixels_raise_before_decoding(splits):
    with pytest.raises(DataError, match="take 286,102 MiB of memory, more than the limit of 384 MiB"):
        read_image_folder(splits, size=(100_000, 100_000))
    with pytest.raises(DataError, match="expected at least 1x1"):
        read_image_folder(splits, size=(0, 4))
