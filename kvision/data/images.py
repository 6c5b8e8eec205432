"""Untrusted image files, decoded by Pillow: accepted formats only, bounded memory."""

import os
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
from PIL import Image, ImageOps

from kvision.data.dataset import DataError
from kvision.data.preprocessing import center_offset, covering
from kvision.untrusted import Budget, open_regular

# Recognized by content, not suffix: Pillow supports more formats, and one of them (EPS) starts another program.
FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Bytes per pixel in Pillow's memory, including the conversion to RGB if that makes another image.
_PIXEL = {"1": 5, "L": 5, "P": 5, "RGB": 4, "I;16": 8, "I": 9, "F": 9}
_WEBP = 12  # additional bytes per pixel of its decoder: two canvases and the output
_ORIENTATION = 0x0112  # the EXIF tag of the camera's orientation
_UPRIGHT = {  # the transpose that turns the image upright, by the tag's value
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_LARGE = 4 << 20  # pixels; larger images are decoded one at a time, whatever the number of threads
_one_large = threading.Lock()


@contextmanager
def open_image(path: str | os.PathLike) -> Iterator[Image.Image]:
    """Open an image without decoding it: `with open_image(path) as image`.

    A JPEG that would need more memory than a file of its size may take (64 MiB plus 8 times the file) is decoded at a
    half, a quarter or an eighth of its height and width, so that a camera's photo always opens; `image.size` is then
    the reduced size.

    Raises:
        DataError: not a regular file, not one of `FORMATS`, more pixels than the file's size allows; or an error that
            Pillow raises within the block, since it decodes late.
    """
    try:
        with open_regular(path) as file, warnings.catch_warnings():
            # Pillow warns about very large images, and about transparency that the conversion to RGB drops.
            warnings.simplefilter("ignore")
            with Image.open(file, formats=FORMATS) as image:
                _fit(image, os.fstat(file.fileno()).st_size)
                yield image
    except DataError:
        raise
    except Image.UnidentifiedImageError:
        raise DataError(f"cannot read the image {os.fspath(path)}: it is not one of {', '.join(FORMATS)}") from None
    # Pillow's decoders raise many undocumented exceptions: SyntaxError, struct.error, IndexError ...
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"cannot read the image {os.fspath(path)}: {reason}") from None


def read_image(path: str | os.PathLike, gray: bool = False) -> Image.Image:
    """Decode an image, rotated upright by its EXIF tag, to 8-bit RGB (or one gray channel).

    Raises:
        DataError: as `open_image`, or it is damaged.
    """
    mode = "L" if gray else "RGB"
    with open_image(path) as file:
        file.load()
        image = ImageOps.exif_transpose(file) if _is_rotated(file) else file
        if image.mode.startswith("I"):
            image = Image.fromarray(_high_byte(np.asarray(image)))  # 16-bit gray, which Pillow would clip at 255
        return image if image.mode == mode else image.convert(mode)  # `convert` always copies


def read_fitted(path: str | os.PathLike, size: tuple[int, int], gray: bool = False) -> np.ndarray:
    """Decode an image to uint8 (*size, 3 or 1): upright, shorter side resized (bilinear, anti-aliased), center-cropped.

    Equals `kvision.data.preprocessing.Preprocessing.images` of the whole image at `crop` 1, except that a JPEG of more
    than eight times the height and width is decoded at a half, a quarter or an eighth of them, at least four times
    `size`. Images of more than 4 million pixels are decoded one at a time across threads.

    Args:
        size: (height, width) in pixels.
        gray: make one gray channel instead of RGB.

    Raises:
        DataError: as `read_image`.
    """
    mode = "L" if gray else "RGB"
    with open_image(path) as file:
        swapped = _is_rotated(file) and file.getexif().get(_ORIENTATION) in (5, 6, 7, 8)
        upright = slice(None, None, -1 if swapped else 1)
        if not file.decoderconfig:  # `open_image` has not reduced this JPEG yet
            file.draft(None, tuple(4 * side for side in covering(file.size[::-1][upright], size)[::-1][upright]))
        with _one_large if file.width * file.height > _LARGE else nullcontext():
            file.load()
            turn = _UPRIGHT.get(file.getexif().get(_ORIENTATION, 1)) if _is_rotated(file) else None
            image = file
            if image.mode.startswith("I"):
                image = Image.fromarray(_high_byte(np.asarray(image)))  # 16-bit gray, which Pillow would clip at 255
            if image.mode not in ("L", "RGB"):
                image = image.convert(mode)
            target = covering(image.size[::-1][upright], size)[upright]
            if target != image.size[::-1]:
                image = image.resize(target[::-1], Image.Resampling.BILINEAR)
        if turn is not None:
            image = image.transpose(turn)
        top, left = center_offset(image.size[::-1], size)
        image = image.crop((left, top, left + size[1], top + size[0])).convert(mode)
        return np.asarray(image).reshape(*size, 1 if gray else 3)


def read_size(path: str | os.PathLike) -> tuple[int, int]:
    """Return the upright (height, width) of an image, from its header alone.

    Raises:
        DataError: as `open_image`.
    """
    with open_image(path) as file:
        shape = file.size[::-1]
        return shape[::-1] if _is_rotated(file) and file.getexif().get(_ORIENTATION) in (5, 6, 7, 8) else shape


def _fit(image: Image.Image, size: int) -> None:
    """Check the memory for decoding against the file's `size` in bytes; reduce a JPEG until it fits."""
    width, height = full = image.size
    each = _PIXEL.get(image.mode, 8) * (2 if _is_rotated(image) else 1)
    each += _WEBP if image.format == "WEBP" else 0
    kept = 0
    if image.format in ("JPEG", "MPO") and image.info.get("progressive"):
        # Its coefficients, two bytes each, stay in memory until the last scan; chroma has mostly a quarter as many.
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


def _is_rotated(image: Image.Image) -> bool:
    """Return whether the EXIF tag says that the camera was not upright. A PNG's tag is read only if it precedes the
    pixels, because Pillow would decode the image to look for it."""
    return (image.format != "PNG" or "exif" in image.info) and image.getexif().get(_ORIENTATION, 1) != 1


def _high_byte(values: np.ndarray) -> np.ndarray:
    """Convert 16-bit gray to 8 bits; wider integers are clipped to 16 bits first."""
    return (values.clip(0, 65535) >> 8).astype(np.uint8)
