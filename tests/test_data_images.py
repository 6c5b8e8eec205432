"""Single images: accepted formats, decoding, memory limits."""

import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from kvision.data import DataError
from kvision.data.images import open_image, read_image

pytestmark = pytest.mark.backend_free


def png(path, width, height):
    """Write a gray PNG of zeros, compressed a thousandfold, without holding its pixels in memory."""
    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(width + 1)))
    body = b"".join(rows) + packer.flush()

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


def test_a_png_with_more_pixels_than_its_size_allows_raises(tmp_path):
    path = png(tmp_path / "bomb.png", 9_000, 9_000)  # below Pillow's own limit
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"9000 x 9000 pixels; resize it first.*64 MiB"):
        read_image(path)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_large_photo_is_decoded_at_reduced_size(tmp_path, progressive):
    path = tmp_path / "photo.jpg"
    values = np.arange(8_000, dtype=np.uint8).repeat(3).reshape(1, -1, 3)
    Image.fromarray(np.broadcast_to(values, (6_000, 8_000, 3))).save(path, progressive=progressive, quality=5)
    if progressive:  # the decoder keeps all coefficients at any scale
        with pytest.raises(DataError, match="resize it first"):
            read_image(path)
    else:
        assert read_image(path).size == (4_000, 3_000)


def test_a_webp_counts_its_decoders_memory(tmp_path):
    Image.new("RGB", (2_100, 2_100)).save(tmp_path / "x.webp", method=0)
    with pytest.raises(DataError, match="resize it first"):
        read_image(tmp_path / "x.webp")
    Image.new("RGB", (2_000, 2_000)).save(tmp_path / "x.webp", method=0)
    assert read_image(tmp_path / "x.webp").size == (2_000, 2_000)


def test_an_ordinary_photo_is_decoded_at_full_size(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (374, 500, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=(lambda exif: (exif.__setitem__(0x0112, 6), exif)[1])(Image.Exif()))
    assert read_image(path).size == (374, 500)  # rotated by its EXIF tag
    with open_image(path) as image:
        assert image.size == (500, 374)


def test_16_bit_gray_keeps_its_high_byte(tmp_path):
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png", gray=True)).tolist() == [[0, 1, 255]]


def test_postscript_named_png_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n0 0 4 4 rectfill\nshowpage\n"
    )
    with pytest.raises(DataError, match="not one of PNG, JPEG"):
        read_image(tmp_path / "x.png")


def test_a_pipe_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_image(tmp_path / "x.png")


def test_escape_sequences_in_names_are_removed(tmp_path):
    path = tmp_path / "\x1b]0;owned\x07\u202e.png"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert str(caught.value).isprintable()
