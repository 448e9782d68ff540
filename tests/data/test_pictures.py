import io
import os
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from adq_train.data import pictures
from adq_train.data.pictures import UnreadableError, file_size, read_picture, shown

RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)
WIDE = RAMP.astype(np.uint16) * 257
PALETTE = Image.fromarray(RAMP).convert("RGB").quantize(4)


def chunk(name, content):
    check = zlib.crc32(name + content)
    return struct.pack(">I", len(content)) + name + content + struct.pack(">I", check)


def png(width, height, bits, kind, raw, more=b""):
    """A PNG file from the format's description."""
    head = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    parts = chunk(b"IHDR", head), more, chunk(b"IDAT", zlib.compress(raw)), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def saved(image, form="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def read(tmp_path, content, mode="L", resize=None):
    path = tmp_path / "x.png"
    path.write_bytes(content)
    return np.asarray(read_picture(str(path), mode, resize))


def rows(values):
    """PNG's rows, each after a zero for no filter."""
    return b"".join(b"\0" + row.astype(values.dtype.newbyteorder(">")).tobytes() for row in values)


def test_wide_values_are_scaled_by_their_range(tmp_path):
    same = {
        "16-bit PNG": saved(Image.fromarray(WIDE)),
        "16-bit TIFF": saved(Image.fromarray(WIDE), "TIFF"),
        "16-bit TIFF, white is zero": saved(
            Image.fromarray(65535 - WIDE), "TIFF", tiffinfo={262: 0}
        ),
        "big-endian TIFF": big_endian_tiff(WIDE),
        "16-bit PGM": b"P5 16 16 65535\n" + WIDE.astype(">u2").tobytes(),
        "float TIFF": saved(Image.fromarray(RAMP.astype(np.float32) / 255), "TIFF"),
        "8 bits": saved(Image.fromarray(RAMP)),
        "factor of 256": saved(Image.fromarray(RAMP.astype(np.uint16) << 8)),
        "16-bit colour": png(16, 16, 16, 2, rows(WIDE.repeat(3, axis=1))),
        "16-bit grey with alpha": png(
            16, 16, 16, 4, rows(np.stack([WIDE, WIDE * 0 + 65535], -1).reshape(16, -1))
        ),
    }
    for name, content in same.items():
        np.testing.assert_array_equal(read(tmp_path, content), RAMP, name)
        colour = read(tmp_path, content, "RGB")
        np.testing.assert_array_equal(colour, RAMP[..., None].repeat(3, -1), name)


def big_endian_tiff(values):
    """A TIFF of one strip of 16-bit values, most significant byte first."""
    height, width = values.shape
    tags = {256: width, 257: height, 258: 16, 259: 1, 262: 1, 273: 8, 277: 1, 278: height}
    tags[279] = values.nbytes
    entries = [struct.pack(">HHII", tag, 4, 1, value) for tag, value in sorted(tags.items())]
    folder = struct.pack(">H", len(entries)) + b"".join(entries) + bytes(4)
    start = struct.pack(">2sHI", b"MM", 42, 8 + values.nbytes)
    return start + values.astype(">u2").tobytes() + folder


def test_values_without_a_known_range_are_refused(tmp_path):
    for values, reason in (
        (RAMP.astype(np.float32), "floating-point values reach from 0 to 255"),
        (-RAMP.astype(np.float32) / 255, "reach from -1 to -0"),
        (np.full((2, 2), np.nan, np.float32), "reach from nan to nan"),
        (RAMP.astype(np.int32), "signed"),
    ):
        content = saved(Image.fromarray(values), "TIFF")
        with pytest.raises(UnreadableError, match=reason):
            read(tmp_path, content)
    unsigned = saved(Image.fromarray(RAMP.astype(np.int32)), "TIFF", tiffinfo={339: 1})
    with pytest.raises(UnreadableError, match=r"32 bits have no known range|signed"):
        read(tmp_path, unsigned)


def test_what_is_transparent_lies_on_white(tmp_path):
    black = np.zeros((16, 16), np.uint8)
    rgba = np.stack([black, black, black, RAMP], -1)
    drawn = 255 - RAMP
    for form in ("PNG", "TIFF", "WEBP"):
        options = {"lossless": True, "exact": True} if form == "WEBP" else {}
        content = saved(Image.fromarray(rgba), form, **options)
        np.testing.assert_allclose(read(tmp_path, content, "RGB"), drawn[..., None].repeat(3, -1))
    la = saved(Image.merge("LA", [Image.fromarray(black), Image.fromarray(RAMP)]))
    np.testing.assert_array_equal(read(tmp_path, la), drawn)
    flat = Image.new("P", (4, 4), 1)
    flat.putpalette([0, 0, 0, 10, 20, 30])
    for form in ("PNG", "GIF"):
        assert (read(tmp_path, saved(flat, form, transparency=1), "RGB") == 255).all()
        assert (read(tmp_path, saved(flat, form, transparency=0), "RGB") == (10, 20, 30)).all()
    half = saved(flat, transparency=bytes([255, 0]))
    assert (read(tmp_path, half, "RGB") == 255).all()
    key = png(
        2, 1, 16, 0, rows(np.array([[0x1234, 0x1235]], np.uint16)), chunk(b"tRNS", b"\x12\x34")
    )
    assert read(tmp_path, key).tolist() == [[255, 0x12]]


def test_other_modes(tmp_path):
    for mode, form in (
        ("1", "PNG"),
        ("CMYK", "TIFF"),
        ("CMYK", "JPEG"),
        ("P", "PNG"),
        ("L", "GIF"),
    ):
        image = PALETTE if mode == "P" else Image.fromarray(RAMP).convert("RGB").convert(mode)
        content = saved(image, form)
        expected = np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))
        np.testing.assert_array_equal(read(tmp_path, content, "RGB"), expected, mode)
        assert expected.std() > 50


def test_orientation_is_applied_to_every_format(tmp_path):
    image = Image.fromarray(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10)
    exif = Image.Exif()
    for value, turned in (
        (1, np.asarray(image)),
        (3, np.rot90(image, 2)),
        (6, np.rot90(image, -1)),
    ):
        exif[0x112] = value
        for form in ("PNG", "TIFF"):
            found = read(tmp_path, saved(image, form, exif=exif))
            np.testing.assert_array_equal(found, turned, f"{form} {value}")
    jpeg = saved(image, "JPEG", exif=exif)
    assert read(tmp_path, jpeg).shape == (6, 4)
    damaged = jpeg.replace(b"Exif\0\0MM", b"Exif\0\0XX").replace(b"Exif\0\0II", b"Exif\0\0XX")
    assert damaged != jpeg
    assert read(tmp_path, damaged).shape == (4, 6)


def test_a_postscript_file_starts_no_program(tmp_path, monkeypatch):
    marker, gs = tmp_path / "started", tmp_path / "gs"
    gs.write_text(f"#!/bin/sh\ntouch {marker}\n")
    gs.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr("PIL.EpsImagePlugin.gs_binary", None, raising=False)
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n"
    with pytest.raises(UnreadableError, match="its format is not one that is read"):
        read(tmp_path, eps)
    assert not marker.exists()
    Image.init()
    with pytest.raises(OSError, match=r"."), Image.open(io.BytesIO(eps)) as file:
        file.load()
    assert marker.exists()  # the attack would have worked


def test_sizes_are_checked_before_anything_is_decoded(tmp_path, monkeypatch):
    huge = png(40_000, 40_000, 8, 0, b"")
    with pytest.raises(UnreadableError, match="exceeds limit"):
        read(tmp_path, huge)
    monkeypatch.setattr(pictures, "MAX_PIXELS", 1000)
    monkeypatch.setattr(Image.Image, "load", None)  # nothing is decoded
    with pytest.raises(UnreadableError, match=r"40 × 30 pixels: 1,200 exceeds limit of 1,000"):
        read(tmp_path, png(40, 30, 8, 0, b""))
    with pytest.raises(UnreadableError, match=r"1 × 500 pixels: 2,000 once resized exceeds"):
        read(tmp_path, png(1, 500, 8, 0, b""), resize=2)


def test_what_is_no_file(tmp_path):
    for name in ("pipe", "folder", "empty", "dead", "loop"):
        path = tmp_path / f"{name}.png"
        make = {
            "pipe": lambda path: os.mkfifo(path),
            "folder": lambda path: path.mkdir(),
            "empty": lambda path: path.touch(),
            "dead": lambda path: path.symlink_to("/nowhere"),
            "loop": lambda path: path.symlink_to(path),
        }[name]
        make(path)
        with pytest.raises(UnreadableError, match=r"regular|empty|No such file|symbolic links"):
            file_size(str(path))
        with pytest.raises(UnreadableError):
            read_picture(str(path), "L")


def test_names_beyond_utf_8_can_be_shown():
    assert shown(os.fsdecode(b"caf\xe9/\xc3\xa9.png")) == "caf\\xe9/é.png"
