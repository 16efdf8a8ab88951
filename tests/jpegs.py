"""Images for tests, made on the spot: photographs, files of many kinds, and damage.

Everything is a pure function of its seed:

    jpegs.jpeg("progressive", 7)            # 500 x 375, about 80 KB
    jpegs.jpeg("baseline", 7, 64, 48)       # about 3 KB, for fast tests
    jpegs.damage("zeroed_tail", data, 7)    # never equal to data
"""

import io
import struct
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

WIDTH = 500
HEIGHT = 375
QUALITY = 90

SOI = b"\xff\xd8"
EOI = b"\xff\xd9"
SOS = 0xDA
COM = 0xFE

HEADER_BYTES = 700  # they hold the tables and sizes of most JPEGs

Kind = Callable[[int, int, int, int], bytes]  # of seed, width, height and quality
Change = Callable[[bytes, np.random.Generator], bytes]


# ---------------------------------------------------------------- photographs


def photograph(seed: int, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Draws an RGB image with the statistics of a photograph.

    Gradients, a dozen soft-coloured shapes, and noise whose amplitude falls with its
    frequency, so that a JPEG of it at quality 90 has about 0.4 bytes a pixel.
    """
    generator = np.random.default_rng(seed)
    image = _gradient(generator, width, height)
    draw = ImageDraw.Draw(image)
    for _ in range(12):
        _draw_shape(draw, generator, width, height)
    pixels = np.asarray(image, np.float32) + _texture(generator, width, height)
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))


def _gradient(generator: np.random.Generator, width: int, height: int) -> Image.Image:
    corners = generator.integers(30, 226, (3, 3, 3), np.uint8)
    return Image.fromarray(corners).resize((width, height), Image.Resampling.BICUBIC)


def _draw_shape(
    draw: ImageDraw.ImageDraw, generator: np.random.Generator, width: int, height: int
) -> None:
    red, green, blue = (int(value) for value in generator.integers(0, 256, 3))
    x, y = generator.uniform(-0.1, 0.9, 2) * (width, height)
    right, bottom = (x, y) + generator.uniform(0.1, 0.5, 2) * (width, height)
    if generator.random() < 0.5:
        draw.ellipse((x, y, right, bottom), fill=(red, green, blue))
    else:
        corners = [(x, bottom), ((x + right) / 2, y), (right, (y + bottom) / 2)]
        draw.polygon(corners, fill=(red, green, blue))


def _texture(generator: np.random.Generator, width: int, height: int) -> np.ndarray:
    """Returns the sum of grids of noise: mostly of brightness, a little of colour."""
    texture = np.zeros((height, width, 3), np.float32)
    for cell, amplitude in ((64, 18.0), (16, 12.0), (6, 9.0), (3, 8.0), (1, 5.0)):
        shape = (-(-height // cell), -(-width // cell))
        brightness = generator.normal(0, amplitude, (*shape, 1))
        colour = generator.normal(0, amplitude / 4, (*shape, 3))
        grid = np.clip(128 + brightness + colour, 0, 255).astype(np.uint8)
        layer = Image.fromarray(grid).resize((width, height), Image.Resampling.BICUBIC)
        texture += np.asarray(layer, np.float32) - 128
    return texture


# ---------------------------------------------------------------- kinds of images


def jpeg(
    kind: str,
    seed: int,
    width: int = WIDTH,
    height: int = HEIGHT,
    quality: int = QUALITY,
) -> bytes:
    """Encodes the photograph of a seed as the JPEG, or PNG, that `KINDS` names.

    The size is ignored by the kinds that are named after theirs.
    """
    return KINDS[kind](seed, *FIXED_SIZES.get(kind, (width, height)), quality)


def _save(image: Image.Image, file_format: str = "JPEG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return file.getvalue()


def _kind(mode: str = "RGB", file_format: str = "JPEG", **options: Any) -> Kind:
    """Makes a kind of Pillow's options of writing a file."""

    def encode(seed: int, width: int, height: int, quality: int) -> bytes:
        image = photograph(seed, width, height).convert(mode)
        return _save(image, file_format, quality=quality, **options)

    return encode


def _changed(change: Change) -> Kind:
    """Makes a kind by changing baseline JPEGs."""

    def encode(seed: int, width: int, height: int, quality: int) -> bytes:
        data = jpeg("baseline", seed, width, height, quality)
        return change(data, np.random.default_rng(seed))

    return encode


def _add_comments(data: bytes, generator: np.random.Generator) -> bytes:
    """Adds a comment of the greatest length, 65,533 bytes, and one of 2,000."""
    comments = b"".join(
        struct.pack(">BBH", 0xFF, COM, size + 2) + generator.bytes(size - 2) + EOI
        for size in (65_533, 2_000)
    )
    return SOI + comments + data[2:]


def _add_fill(data: bytes, _generator: np.random.Generator) -> bytes:
    """Puts `FF FF` before every marker of the header and before the end marker."""
    segments = list(header_segments(data))
    scan = data[2 + sum(map(len, segments)) : -2]
    fill = b"\xff\xff"
    return SOI + b"".join(fill + s for s in segments) + scan + fill + EOI


_NOISE = np.random.default_rng(0).bytes(1000)
_PROFILE = _NOISE + 200 * (SOI + EOI + b"\xff\xda\x00\x0c") + _NOISE + EOI
_THUMBNAIL = _save(photograph(0, 160, 120), quality=75)

FIXED_SIZES = {"1x1": (1, 1), "3x17": (3, 17)}

KINDS: dict[str, Kind] = {
    "baseline": _kind(),
    "progressive": _kind(progressive=True),
    "grey": _kind("L"),
    "grey_progressive": _kind("L", progressive=True),
    "cmyk": _kind("CMYK"),
    "cmyk_progressive": _kind("CMYK", progressive=True),
    "restart_markers": _kind(restart_marker_blocks=5),
    "restart_progressive": _kind(restart_marker_rows=1, progressive=True),
    "444": _kind(subsampling="4:4:4"),
    "422": _kind(subsampling="4:2:2"),
    "rgb_kept": _kind(keep_rgb=True),
    "optimized": _kind(optimize=True),
    "exif_thumbnail": _kind(exif=b"Exif\x00\x00" + _THUMBNAIL),
    "icc_with_markers": _kind(icc_profile=_PROFILE),
    "long_comments": _changed(_add_comments),
    "fill_bytes": _changed(_add_fill),
    "trailing_bytes": _changed(lambda data, generator: data + generator.bytes(500)),
    "trailing_image": _changed(lambda data, _: data + _THUMBNAIL),
    "png": _kind(file_format="PNG"),
    **dict.fromkeys(FIXED_SIZES, _kind()),
}
"""Kinds of images by name; all are undamaged, and all but `png` are JPEGs."""


def header_segments(data: bytes) -> Iterator[bytes]:
    """Yields the marker segments of a JPEG, after `FF D8` up to the first scan's.

    Fit for JPEGs without fill bytes in their header.
    """
    position, marker = 2, 0
    while marker != SOS:
        marker = data[position + 1]
        end = position + 2 + int.from_bytes(data[position + 2 : position + 4], "big")
        yield data[position:end]
        position = end


# ---------------------------------------------------------------- damage


def damage(kind: str, data: bytes, seed: int) -> bytes:
    """Damages an image in the way that `DAMAGE` names; the result differs from it."""
    generator = np.random.default_rng(seed)
    for _ in range(100):
        damaged = DAMAGE[kind](data, generator)
        if damaged != data:
            return damaged
    raise ValueError(f"{kind} changes nothing in these {len(data):,} bytes")


def _below(generator: np.random.Generator, limit: int) -> int:
    return int(generator.integers(0, max(limit, 1)))


def _header(data: bytes) -> int:
    return min(HEADER_BYTES, len(data) - 2)


def _cut(limit: Callable[[bytes], int]) -> Change:
    return lambda data, generator: data[: _below(generator, limit(data))]


def _flip_bit(limit: Callable[[bytes], int]) -> Change:
    def flip(data: bytes, generator: np.random.Generator) -> bytes:
        position = _below(generator, limit(data))
        flipped = data[position] ^ (1 << _below(generator, 8))
        return data[:position] + bytes([flipped]) + data[position + 1 :]

    return flip


def _overwrite(
    new: Callable[[np.random.Generator, int], bytes],
    size: int,
    limit: Callable[[bytes], int] = len,
    times: int = 1,
) -> Change:
    """Puts something in the place of so many bytes, or of half of a smaller image."""

    def overwrite(data: bytes, generator: np.random.Generator) -> bytes:
        for _ in range(times):
            num_bytes = min(size, len(data) // 2)
            start = _below(generator, limit(data) - num_bytes)
            content = new(generator, num_bytes)
            data = data[:start] + content + data[start + num_bytes :]
        return data

    return overwrite


def _zeros(_generator: np.random.Generator, size: int) -> bytes:
    return bytes(size)


def _nothing(_generator: np.random.Generator, _size: int) -> bytes:
    return b""


def _zeroed_tail(data: bytes, generator: np.random.Generator) -> bytes:
    start = _below(generator, len(data))
    return data[:start] + bytes(len(data) - start)


def _other_tail(data: bytes, generator: np.random.Generator) -> bytes:
    kind = ("baseline", "progressive", "grey", "restart_markers")[_below(generator, 4)]
    other = jpeg(kind, 1_000_000, 200, 150)
    return data[: _below(generator, len(data))] + other[_below(generator, len(other)) :]


DAMAGE: dict[str, Change] = {
    "truncated": _cut(len),
    "truncated_header": _cut(_header),
    "last_two_bytes_cut": lambda data, _: data[:-2],
    "bit_flipped": _flip_bit(len),
    "header_bit": _flip_bit(_header),
    "header_byte": _overwrite(np.random.Generator.bytes, 1, _header),
    "header_bytes": _overwrite(np.random.Generator.bytes, 1, _header, times=8),
    "header_zeroed": _overwrite(_zeros, 12, _header),
    "header_deleted": _overwrite(_nothing, 12, _header),
    "zeroed_4096": _overwrite(_zeros, 4096),
    "zeroed_tail": _zeroed_tail,
    "noise_64": _overwrite(np.random.Generator.bytes, 64),
    "noise_4096": _overwrite(np.random.Generator.bytes, 4096),
    "deleted_4096": _overwrite(_nothing, 4096),
    "other_tail": _other_tail,
    "appended": lambda data, generator: (
        data + generator.bytes(1 + _below(generator, 1000))
    ),
}
"""Kinds of damage by name; `header_...` strikes in the first 700 bytes."""
