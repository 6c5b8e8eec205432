"""Image files from strangers: decoded by Pillow, in the formats that are meant, within a bound on memory."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageOps

from kvision.data.dataset import DataError
from kvision.data.preprocessing import centred, covering
from kvision.untrusted import Budget, open_regular

# By content, not by suffix: Pillow knows more formats, and one of them (EPS) starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Bytes that a pixel takes in Pillow's memory, with its conversion to RGB where that makes another image.
_PIXEL = {"1": 5, "L": 5, "P": 5, "RGB": 4, "I;16": 8, "I": 9, "F": 9}
_WEBP = 12  # more, which its decoder takes: two canvases, and what it hands over
_ORIENTATION = 0x0112  # the EXIF tag that says how a camera was held
_UPRIGHT = {  # by its value, what brings the image upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGE = 4 << 20  # pixels; of images with more only one is in memory at a time, however many threads decode
_one_large = threading.Lock()


@contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """An image that is opened and not yet decoded: `with open_image(path) as image`.

    A JPEG that would take more memory than a file of its size may (64 MiB and 8 times the file) is decoded at a half,
    a quarter or an eighth of its height and width, so that a camera's photo always opens; the `size` of the image is
    then that.

    Raises:
        DataError: no regular file, none of `FORMATS`, or more pixels than its size explains; and what Pillow raises
            within the block, for it decodes late.
    """
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            # Pillow warns of images with more pixels than a camera's, and of transparency that RGB drops.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                _fit(image, os.fstat(file.fileno()).st_size)
                yield image
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"cannot read the image {os.fspath(path)}: it is none of {', '.join(FORMATS)}") from None
    # Pillow's decoders raise much more than they document: SyntaxError, struct.error, IndexError ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot read the image {os.fspath(path)}: {reason}") from None


def read_image(path: str | os.PathLike, grey: bool = False) -> Image.Image:
    """An image decoded, turned as its camera was held, in RGB (or in one grey channel), 8 bits each.

    Raises:
        DataError: as `open_image`, or it is damaged.
    """
    mode = "L" if grey else "RGB"
    with open_image(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file) if _turned(file) else file
        if image.mode.startswith("I"):
            image = Image.fromarray(_high_byte(np.asarray(image)))  # 16-bit grey, which Pillow would clip at 255
        return image if image.mode == mode else image.convert(mode)  # not always: it makes a copy


def read_fitted(path: str | os.PathLike, size: tuple[int, int], grey: bool = False) -> np.ndarray:
    """An image as uint8, (*size, 3 or 1): upright, its shorter side resized (bilinear, anti-aliased), its centre cut.

    What `kvision.data.preprocessing.Preprocessing.images` makes of the whole image at `crop` 1, but that a JPEG of more
    than eight times the height and width is decoded at a half, a quarter or an eighth of them, at least four times what
    is wanted. Of images of more than 4 million pixels threads have one at a time in memory.

    Args:
        size: (height, width) in pixels.
        grey: whether to make one grey channel instead of RGB.

    Raises:
        DataError: as `read_image`.
    """
    mode = "L" if grey else "RGB"
    with open_image(path) as file:
        turned = _turned(file) and file.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        upright = slice(None, None, -1 if turned else 1)
        if not file.decoderconfig:  # a JPEG is reduced once
            file.draft(None, tuple(4 * side for side in covering(file.size[::-1][upright], size)[::-1][upright]))
        with _one_large if file.width * file.height > _LARGE else nullcontext():
            file.load()
            turn = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 1)) if _turned(file) else None
            image = file
            if image.mode.startswith("I"):
                image = Image.fromarray(_high_byte(np.asarray(image)))  # 16-bit grey, which Pillow would clip at 255
            if image.mode not in ("L", "RGB"):
                image = image.convert(mode)
            target = covering(image.size[::-1][upright], size)[upright]
            if target != image.size[::-1]:
                image = image.resize(target[::-1], Image.Resampling.BILINEAR)
        if turn is not None:
            image = image.transpose(turn)
        top, left = centred(image.size[::-1], size)
        image = image.crop((left, top, left + size[1], top + size[0])).convert(mode)
        return np.asarray(image).reshape(*size, 1 if grey else 3)


def size_of(path: str | os.PathLike) -> tuple[int, int]:
    """(height, width) of an image as its camera was held, from its header alone.

    Raises:
        DataError: as `open_image`.
    """
    with open_image(path) as file:
        shape = file.size[::-1]
        return shape[::-1] if _turned(file) and file.getexif().get(_ORIENTATION) in (5, 6, 7, 8) else shape


def _fit(image: Image.Image, size: int) -> None:
    """Check an image's pixels against the bytes of its file; a JPEG is reduced until they fit."""
    width, height = full = image.size
    each = _PIXEL.get(image.mode, 8) * (2 if _turned(image) else 1)
    each += _WEBP if image.format == "WEBP" else 0
    kept = 0
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        # Its coefficients, two bytes each, are kept until its last scan; of the colors mostly a quarter as many.
        samples = [across * down for _, across, down, _ in image.layer]
        kept = 2 * width * height * sum(samples) // max(samples)
    limit = Budget(size).limit
    for scale in (2, 4, 8):
        if kept + each * image.width * image.height <= limit or image.format not in ("JPEG", "MPO"):
            break
        image.draft(None, (full[0] // scale, full[1] // scale))
    Budget(size).take(
        kept + each * image.width * image.height, f"decoding its {full[0]} x {full[1]} pixels; resize it first, which"
    )


def _turned(image: Image.Image) -> bool:
    """Whether the camera was not held upright. Of a PNG only what stands before its pixels is asked, which Pillow would
    decode for it."""
    return (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_ORIENTATION, 1) != 1


def _high_byte(values: np.ndarray) -> np.ndarray:
    """16-bit grey as 8 bits; a wider integer is clipped at what 16 bits hold."""
    return (values.clip(0, 65535) >> 8).astype(np.uint8)
