"""From a file to 8-bit RGB pixels: scaled, composed, turned, or refused; never something else in silence.

The table in docs/training.md has what happens to which encoding.
"""

from __future__ import annotations

from typing import Any

import numpy as np

#: Decoders that are used, whatever a file is called. (That of PostScript would start another program.)
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "PPM", "GIF", "JPEG2000")
BACKGROUND = (255, 255, 255)  # of transparent pixels
WITH_ALPHA = ("LA", "La", "PA", "RGBA", "RGBa")
BITS, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of TIFF
WHITE_IS_ZERO, SIGNED = 0, 2  # their values
#: Steps of a gray level where PNG packs pixels into bytes: Pillow does not scale the transparent level with the others.
PACKED = {"L;2": 85, "L;4": 17}


def read_image(path: str) -> Any:
    """The first picture of a file as PIL's RGB image; an exception of any kind for what cannot be read as one."""
    from PIL import Image

    with open(path, "rb") as file, Image.open(file, formats=FORMATS) as image:
        transparent = _transparent(image)
        tags = getattr(image, "tag_v2", {})
        if SIGNED in _tuple(tags.get(SAMPLE_FORMAT, 1)):
            raise ValueError("signed pixels have no stated range: convert it to 8 bits")
        kind = image.format
        _turn(image)
        if image.mode == "F" or (image.mode == "I" and kind != "PPM"):
            raise ValueError(f"pixels of 32 bits (mode {image.mode}) have no stated range: convert it to 8 bits")
        if image.mode.startswith("I"):
            levels = 2 ** _tuple(tags.get(BITS, 16))[0] - 1
            return _scaled(image, levels, transparent, inverted=tags.get(PHOTOMETRIC) == WHITE_IS_ZERO)
        if image.mode in WITH_ALPHA or transparent is not None:
            return _composed(image, transparent)
        return image.convert("RGB")


def _turn(image: Any) -> None:
    """Upright, as the orientation tag says."""
    from PIL import ImageOps

    image.load()
    try:
        ImageOps.exif_transpose(image, in_place=True)
    except Exception:  # of a damaged tag, which says nothing
        return


def _scaled(image: Any, levels: int, transparent: Any, *, inverted: bool) -> Any:
    """Gray of more than 8 bits, to 8."""
    from PIL import Image

    values = np.asarray(image).astype(np.float32)
    gray = np.rint(values * (255 / levels)).astype(np.uint8)
    if inverted:
        gray = 255 - gray
    if transparent is not None:
        gray[values == transparent] = BACKGROUND[0]
    return Image.fromarray(gray).convert("RGB")


def _composed(image: Any, transparent: Any) -> Any:
    """On the background, where it is transparent."""
    from PIL import Image

    if transparent is not None:
        image.info["transparency"] = transparent
    if image.mode == "La":  # which converts to nothing else
        image = image.convert("LA")
    image = image.convert("RGBA")
    return Image.alpha_composite(Image.new("RGBA", image.size, (*BACKGROUND, 255)), image).convert("RGB")


def _transparent(image: Any) -> Any:
    """The transparent colour, None without one."""
    transparent = image.info.get("transparency")
    raw = image.tile[0].args if image.format == "PNG" and image.tile else ""
    if transparent is not None and raw == "RGB;16B":
        raise ValueError("16 bits a colour with a transparent one cannot be composed: convert it to 8 bits")
    return transparent * PACKED[raw] if transparent is not None and raw in PACKED else transparent


def _tuple(value: Any) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,)
