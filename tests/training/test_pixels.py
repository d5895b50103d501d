"""What happens to the pixels of which encoding: the table of docs/training.md, row by row."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from classfair.training.pixels import read_image

RED = (200, 30, 60)
DEEP = [0, 255, 256, 32768, 65280, 65535]  # of 16 bits
GRAY = [round(v / 257) for v in DEEP]


def saved(image, kind, **options):
    box = io.BytesIO()
    image.save(box, kind, **options)
    return box.getvalue()


def flat(mode, color):
    return Image.new(mode, (8, 8), color)


def chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width, depth, color, row, *extra):
    """One row, of a depth and kind of colour that PIL does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, color, 0, 0, 0))
    return (
        b"\x89PNG\r\n\x1a\n"
        + header
        + b"".join(extra)
        + chunk(b"IDAT", zlib.compress(b"\0" + row))
        + chunk(b"IEND", b"")
    )


def tiff(width, bits, row, *, kind=1, photometric=1, samples=1, alpha=None, order="<"):
    """One row without compression; ``kind`` is 1 for unsigned, 2 for signed, 3 for floats."""
    tags = {256: [width], 257: [1], 258: [bits] * samples, 259: [1], 262: [photometric], 277: [samples], 278: [1]}
    tags |= {279: [len(row)], 339: [kind] * samples, **({} if alpha is None else {338: [alpha]})}
    long = {tag: struct.pack(f"{order}{len(v)}H", *v) for tag, v in tags.items() if len(v) > 2}
    place = 8 + 2 + 12 * (len(tags) + 1) + 4
    entries, tail = [], b""
    data_at = place + sum(map(len, long.values()))
    for tag in sorted([*tags, 273]):
        values = [data_at] if tag == 273 else tags[tag]
        entry = struct.pack(f"{order}HHI", tag, 4 if tag == 273 else 3, len(values))
        if tag == 273:
            entry += struct.pack(f"{order}I", data_at)
        elif tag in long:
            entry += struct.pack(f"{order}I", place + len(tail))
            tail += long[tag]
        else:
            entry += struct.pack(f"{order}{len(values)}H", *values).ljust(4, b"\0")
        entries.append(entry)
    head = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    return head + b"".join(entries) + b"\0\0\0\0" + tail + row


def pixels(content, tmp_path):
    path = tmp_path / "image.png"  # the content counts, not the name
    path.write_bytes(content)
    image = read_image(str(path))
    assert image.mode == "RGB"
    return np.asarray(image)


def gray(values):
    return [(v, v, v) for v in values]


u16 = struct.Struct(">6H").pack(*DEEP)
l16 = struct.Struct("<6H").pack(*DEEP)
PALETTE = flat("RGB", RED).convert("P", palette=Image.Palette.ADAPTIVE)
HALF = (200, 30, 60, 128)
ON_WHITE = tuple(round(c * 128 / 255 + 255 * 127 / 255) for c in RED)

#: Encoding -> file and its first pixels.
KEPT = {
    "bilevel PNG": (saved(flat("1", 1), "PNG"), gray([255])),
    "bilevel TIFF": (saved(flat("1", 1), "TIFF"), gray([255])),
    "gray PNG": (saved(flat("L", 77), "PNG"), gray([77])),
    "gray JPEG": (saved(flat("L", 77), "JPEG"), gray([77])),
    "gray PNG of 2 bits": (png(4, 2, 0, b"\x1b"), gray([0, 85, 170, 255])),
    "white-is-zero gray TIFF": (tiff(2, 8, b"\x00\x4d", photometric=0), gray([255, 178])),
    "PGM of 4 bits": (b"P5 2 1 15\n\x00\x0f", gray([0, 255])),
    "RGB PNG": (saved(flat("RGB", RED), "PNG"), [RED]),
    "RGB BMP": (saved(flat("RGB", RED), "BMP"), [RED]),
    "RGB PPM": (saved(flat("RGB", RED), "PPM"), [RED]),
    "RGB TIFF": (saved(flat("RGB", RED), "TIFF"), [RED]),
    "RGB WebP, lossless": (saved(flat("RGB", RED), "WEBP", lossless=True), [RED]),
    "palette PNG": (saved(PALETTE, "PNG"), [RED]),
    "palette GIF": (saved(PALETTE, "GIF"), [RED]),
    "RGB TIFF with a channel that is no alpha": (
        tiff(1, 8, bytes((*RED, 9)), photometric=2, samples=4, alpha=0),
        [RED],
    ),
    "opaque RGBA PNG": (saved(flat("RGBA", (*RED, 255)), "PNG"), [RED]),
}
SCALED = {
    "gray PNG of 16 bits": (png(6, 16, 0, u16), gray(GRAY)),
    "gray TIFF of 16 bits": (tiff(6, 16, l16), gray(GRAY)),
    "big-endian gray TIFF of 16 bits": (tiff(6, 16, u16, order=">"), gray(GRAY)),
    "white-is-zero gray TIFF of 16 bits": (tiff(6, 16, l16, photometric=0), gray([255 - g for g in GRAY])),
    "gray TIFF of 12 bits": (tiff(2, 12, b"\x12\x3f\xff"), gray([round(0x123 * 255 / 4095), 255])),
    "PGM of 16 bits": (b"P5 6 1 65535\n" + u16, gray(GRAY)),
    "PGM up to 1000": (b"P5 2 1 1000\n" + struct.pack(">2H", 500, 1000), gray([128, 255])),
    "RGB PNG of 16 bits": (png(2, 16, 2, u16), [(0, 0, 1), (128, 255, 255)]),
    "RGB TIFF of 16 bits": (tiff(2, 16, l16, photometric=2, samples=3), [(0, 0, 1), (128, 255, 255)]),
    "JPEG 2000 of 16 bits": (saved(Image.frombytes("I;16", (6, 1), l16), "JPEG2000"), gray(GRAY)),
}
COMPOSED = {
    "RGBA PNG": (saved(flat("RGBA", HALF), "PNG"), [ON_WHITE]),
    "RGBA TIFF": (saved(flat("RGBA", HALF), "TIFF"), [ON_WHITE]),
    "RGBA WebP": (saved(flat("RGBA", (*RED, 0)), "WEBP", lossless=True), [(255, 255, 255)]),
    "RGBA PNG of 16 bits": (png(1, 16, 6, struct.pack(">4H", 0, 0, 0, 0)), [(255, 255, 255)]),
    "gray and alpha PNG": (saved(flat("LA", (0, 0)), "PNG"), [(255, 255, 255)]),
    "premultiplied RGBA TIFF": (
        tiff(1, 8, bytes((*(round(c * 128 / 255) for c in RED), 128)), photometric=2, samples=4, alpha=1),
        [ON_WHITE],
    ),
    "premultiplied gray TIFF": (tiff(1, 8, bytes((50, 128)), samples=2, alpha=1), gray([50 + 127])),
    "palette PNG with a transparent colour": (
        saved(PALETTE, "PNG", transparency=PALETTE.getpixel((0, 0))),
        [(255,) * 3],
    ),
    "palette PNG with alpha": (saved(flat("RGBA", (*RED, 0)).quantize(4), "PNG"), [(255,) * 3]),
    "palette GIF with a transparent colour": (
        saved(PALETTE, "GIF", transparency=PALETTE.getpixel((0, 0))),
        [(255,) * 3],
    ),
    "gray PNG with a transparent level": (png(2, 8, 0, b"\x02\x03", chunk(b"tRNS", b"\0\2")), gray([255, 3])),
    "gray PNG of 2 bits with a transparent level": (
        png(4, 2, 0, b"\x1b", chunk(b"tRNS", b"\0\2")),
        gray([0, 85, 255, 255]),
    ),
    "gray PNG of 16 bits with a transparent level": (
        png(6, 16, 0, u16, chunk(b"tRNS", struct.pack(">H", 32768))),
        gray([*GRAY[:3], 255, *GRAY[4:]]),
    ),
    "RGB PNG with a transparent colour": (
        png(2, 8, 2, bytes((*RED, 1, 2, 3)), chunk(b"tRNS", b"\0\1\0\2\0\3")),
        [RED, (255,) * 3],
    ),
}
CONVERTED = {
    "CMYK TIFF": (saved(flat("CMYK", (0, 255, 255, 0)), "TIFF"), (255, 0, 0)),
    "CMYK JPEG": (saved(flat("CMYK", (0, 255, 255, 0)), "JPEG", quality=95), (255, 0, 0)),
    "YCbCr TIFF": (saved(flat("RGB", RED).convert("YCbCr"), "TIFF"), RED),
    "RGB JPEG": (saved(flat("RGB", RED), "JPEG", quality=95), RED),
}
REFUSED = {
    "float TIFF": (saved(flat("F", 0.5), "TIFF"), "pixels of 32 bits"),
    "float RGB TIFF": (tiff(1, 32, struct.pack("<3f", 0, 0.5, 1), kind=3, photometric=2, samples=3), "cannot identify"),
    "TIFF of 32 bits": (tiff(2, 32, struct.pack("<2I", 0, 70000)), "pixels of 32 bits"),
    "signed TIFF of 32 bits": (saved(flat("I", 70000), "TIFF"), "signed pixels"),
    "float PFM": (saved(flat("F", 0.5), "PPM"), "pixels of 32 bits"),
    "signed TIFF of 16 bits": (tiff(2, 16, struct.pack("<2h", -1, 1), kind=2), "signed pixels"),
    "signed TIFF of 8 bits": (tiff(2, 8, b"\xff\x01", kind=2), "signed pixels"),
    "RGB PNG of 16 bits with a transparent colour": (
        png(2, 16, 2, u16, chunk(b"tRNS", b"\0\1\0\2\0\3")),
        "cannot be composed",
    ),
    "truncated JPEG": (saved(Image.effect_noise((64, 64), 90), "JPEG")[:-400], "truncated"),
    "PostScript": (saved(flat("RGB", RED), "EPS"), "cannot identify"),
}


@pytest.mark.parametrize(
    ("content", "expected"), [*{**KEPT, **SCALED, **COMPOSED}.values()], ids=[*KEPT, *SCALED, *COMPOSED]
)
def test_exact_pixels(content, expected, tmp_path):
    found = pixels(content, tmp_path).reshape(-1, 3)[: len(expected)]
    # Composition rounds in whole numbers, and 16 bits are cut to the upper 8 where PIL reads colours.
    np.testing.assert_allclose(found.astype(int), expected, atol=1)


@pytest.mark.parametrize(("content", "expected"), CONVERTED.values(), ids=CONVERTED)
def test_converted_colours(content, expected, tmp_path):
    """Lossy encodings and other colour spaces, to a few levels."""
    np.testing.assert_allclose(pixels(content, tmp_path)[4, 4].astype(int), expected, atol=4)


def test_lab_colours(tmp_path):
    lab = ImageCms.profileToProfile(
        flat("RGB", RED), ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), outputMode="LAB"
    )
    np.testing.assert_allclose(pixels(saved(lab, "TIFF"), tmp_path)[0, 0].astype(int), RED, atol=4)


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_has_no_stated_range_is_refused_by_name(content, reason, tmp_path):
    with pytest.raises((ValueError, OSError), match=reason):
        pixels(content, tmp_path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_the_orientation_tag_turns_the_picture(kind, orientation, tmp_path):
    """The corner that is black in the upright picture is black in every turned one."""
    upright = Image.new("RGB", (32, 48), (255, 255, 255))
    upright.paste((0, 0, 0), (0, 0, 16, 16))
    back = [None, 0, 3, 1, 5, 2, 6, 4]  # how the picture lies in the file: the inverse of what the tag asks for
    stored = upright if orientation == 1 else upright.transpose(Image.Transpose(back[orientation - 1]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = pixels(saved(stored, kind, exif=exif), tmp_path)
    assert found.shape == (48, 32, 3)
    assert found[4, 4].max() < 40
    assert min(found[4, -4].min(), found[-4, 4].min(), found[-4, -4].min()) > 215


def test_the_first_picture_of_several(tmp_path):
    pages = [flat("RGB", (0, 0, 255))]
    assert pixels(saved(flat("RGB", RED), "TIFF", save_all=True, append_images=pages), tmp_path)[0, 0].tolist() == [
        *RED
    ]


def test_a_damaged_orientation_tag_says_nothing(tmp_path):
    content = saved(flat("RGB", RED), "PNG", exif=b"Exif\0\0no such thing")
    assert pixels(content, tmp_path)[0, 0].tolist() == [*RED]
