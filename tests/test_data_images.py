"""Single images: what opens, how, and within how much memory."""

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
    """A gray PNG of zeros, packed a thousandfold, written without its pixels ever being in memory."""
    packer, rows = zlib.compressobj(9), []
    for _ in range(height):
        rows.append(packer.compress(bytes(width + 1)))
    body = b"".join(rows) + packer.flush()

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))
    return path


def test_a_png_of_more_pixels_than_its_bytes_explain_is_refused(tmp_path):
    path = png(tmp_path / "bomb.png", 9_000, 9_000)  # below Pillow's own limit
    assert path.stat().st_size < 100_000
    with pytest.raises(DataError, match=r"9000 x 9000 pixels; resize it first.*64 MiB"):
        read_image(path)


@pytest.mark.parametrize("progressive", [False, True])
def test_a_photo_of_a_large_camera_opens_reduced(tmp_path, progressive):
    path = tmp_path / "photo.jpg"
    values = np.arange(8_000, dtype=np.uint8).repeat(3).reshape(1, -1, 3)
    Image.fromarray(np.broadcast_to(values, (6_000, 8_000, 3))).save(path, progressive=progressive, quality=5)
    if progressive:  # its coefficients are kept whole, at any scale
        with pytest.raises(DataError, match="resize it first"):
            read_image(path)
    else:
        assert read_image(path).size == (4_000, 3_000)


def test_a_webp_counts_what_its_decoder_takes(tmp_path):
    Image.new("RGB", (2_100, 2_100)).save(tmp_path / "x.webp", method=0)
    with pytest.raises(DataError, match="resize it first"):
        read_image(tmp_path / "x.webp")
    Image.new("RGB", (2_000, 2_000)).save(tmp_path / "x.webp", method=0)
    assert read_image(tmp_path / "x.webp").size == (2_000, 2_000)


def test_an_ordinary_photo_opens_whole(tmp_path):
    path = tmp_path / "photo.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (374, 500, 3), np.uint8)
    Image.fromarray(pixels).save(path, exif=(lambda exif: (exif.__setitem__(0x0112, 6), exif)[1])(Image.Exif()))
    assert read_image(path).size == (374, 500)  # turned by its orientation
    with open_image(path) as image:
        assert image.size == (500, 374)


def test_sixteen_bits_of_gray_keep_their_high_byte(tmp_path):
    Image.fromarray(np.array([[0, 256, 65535]], np.uint16)).save(tmp_path / "x.png")
    assert np.asarray(read_image(tmp_path / "x.png", grey=True)).tolist() == [[0, 1, 255]]


def test_postscript_by_the_name_of_a_png_starts_no_program(tmp_path, monkeypatch):
    monkeypatch.setattr("subprocess.Popen", lambda *a, **k: pytest.fail("a program was started"))
    monkeypatch.setattr("subprocess.check_call", lambda *a, **k: pytest.fail("a program was started"))
    (tmp_path / "x.png").write_bytes(
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 4 4\n%%EndComments\n0 0 4 4 rectfill\nshowpage\n"
    )
    with pytest.raises(DataError, match="none of PNG, JPEG"):
        read_image(tmp_path / "x.png")


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.png")
    with pytest.raises(DataError, match="not a regular file"):
        read_image(tmp_path / "x.png")


def test_no_escape_sequence_of_a_name_reaches_the_terminal(tmp_path):
    path = tmp_path / "\x1b]0;owned\x07\u202e.png"
    path.write_bytes(b"nothing")
    with pytest.raises(DataError) as caught:
        read_image(path)
    assert str(caught.value).isprintable()
