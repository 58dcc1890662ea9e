"""Picture files of every kind, good, damaged and hostile, built in code; and what reading one costs.

Run as a program (hand-made | mutated COUNT | limit) it reads them and prints, as JSON, what that costs.
"""

import ctypes
import io
import json
import random
import struct
import sys
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from functools import cache
from math import isqrt
from typing import Any

import numpy as np
from PIL import Image, ImageCms

from data_pipeline.image_files import MAX_PARTS
from data_pipeline.images import MAX_PIXELS, read_image
from data_pipeline.sources import Rejected

EXIF = b"Exif\0\0"


def encode(image: Image.Image, image_format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def noise(height: int = 12, width: int = 9, channels: int = 3) -> Image.Image:
    values = np.random.default_rng(0).integers(0, 256, (height, width, channels), dtype=np.uint8)
    return Image.fromarray(values)


def chunk(kind: bytes, data: bytes = b"") -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(width: int, height: int, depth: int, colour: int, rows: bytes, *more: bytes, interlace: int = 0) -> bytes:
    """A PNG of raw scan lines (each with its filter byte); `more` chunks stand between header and pixels."""
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)
    body = [chunk(b"IHDR", header), *more, chunk(b"IDAT", zlib.compress(rows)), chunk(b"IEND")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def png16(values: np.ndarray, *more: bytes) -> bytes:
    """[H, W, channels] of 0..65535 -> 16-bit PNG: gray, gray + alpha, RGB or RGBA."""
    height, width, channels = values.shape
    lines = values.astype(">u2").reshape(height, -1)
    return png(
        width, height, 16, {1: 0, 2: 4, 3: 2, 4: 6}[channels], b"".join(b"\0" + r.tobytes() for r in lines), *more
    )


def adam7(image: np.ndarray) -> bytes:
    """[H, W, 3] -> interlaced PNG: seven sparse pictures, coarse to fine (PNG specification, 8.2)."""
    passes = [(0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4), (2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)]
    parts = [image[top::down, left::right] for top, left, down, right in passes]
    rows = b"".join(b"\0" + row.tobytes() for part in parts if part.size for row in part)
    return png(image.shape[1], image.shape[0], 8, 2, rows, interlace=1)


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def with_segments(jpeg: bytes, *segments: bytes) -> bytes:
    return jpeg[:2] + b"".join(segments) + jpeg[2:]


def tiff_directory(entries: list[tuple[int, int, int, int]], tail: bytes = b"") -> bytes:
    packed = b"".join(struct.pack("<HHII", *entry) for entry in entries)
    return b"II*\0" + struct.pack("<IH", 8, len(entries)) + packed + bytes(4) + tail


def profile(swap: bool = True, linear: bool = False, gray: bool = False) -> bytes:
    """An sRGB profile with red and green exchanged, or with linear light, or for linear gray."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    tags = {}
    for i in range(struct.unpack_from(">I", data, 128)[0]):
        name, offset, size = struct.unpack_from(">4sII", data, 132 + 12 * i)
        tags[name] = (132 + 12 * i, offset, size)
    if swap and not gray:
        (_, red, size), (_, green, _) = tags[b"rXYZ"], tags[b"gXYZ"]
        data[red : red + size], data[green : green + size] = data[green : green + size], data[red : red + size]
    if linear or gray:
        _, curve, _ = tags[b"rTRC"]
        data[curve : curve + 12] = b"curv" + bytes(8)  # a curve of no points is the identity (ICC.1, 10.6)
    if gray:
        data[16:20] = b"GRAY"
        data[tags[b"rTRC"][0] : tags[b"rTRC"][0] + 4] = b"kTRC"
    return bytes(data)


def cmyk_profile() -> bytes:
    """A CMYK profile in which only black ink counts: without it all is Lab (50, 0, 0), sRGB 119 (ICC.1, lut8Type)."""
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0])
    table += struct.pack(">9i", *(65536 if i % 4 == 0 else 0 for i in range(9)))
    table += ramp * 4 + bytes([128, 128, 128, 0, 128, 128]) * 8 + ramp * 3  # L = 100 / 255 * 128, a = b = 128 - 128
    white = b"XYZ " + bytes(4) + struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    start = 128 + 4 + 12 * 2
    tags = struct.pack(">I", 2) + struct.pack(">4sII", b"wtpt", start, len(white))
    tags += struct.pack(">4sII", b"A2B0", start + len(white), len(table))
    header = bytearray(128)
    header[0:4] = struct.pack(">I", start + len(white) + len(table))
    header[8:12], header[12:24], header[36:40] = b"\2\x10\0\0", b"prtrCMYKLab ", b"acsp"
    header[68:80] = struct.pack(">III", 0xF6D6, 0x10000, 0xD32D)
    return bytes(header) + tags + white + table


@cache
def good() -> dict[str, bytes]:
    """Files that must be read."""
    rgb, frames = noise(), [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    values = np.random.default_rng(1).integers(0, 65536, (5, 4, 4))
    several = {"save_all": True, "append_images": frames[1:]}
    return {
        "png": encode(rgb),
        "jpeg": encode(rgb, "JPEG"),
        "progressive jpeg": encode(noise(40, 40), "JPEG", progressive=True),
        "webp": encode(rgb, "WEBP"),
        "lossless webp": encode(noise(channels=4), "WEBP", lossless=True),
        "gif": encode(rgb, "GIF"),
        "bmp": encode(rgb, "BMP"),
        "32-bit bmp": encode(noise(channels=4), "BMP"),
        "1-bit png": encode(rgb.convert("1")),
        "palette png": encode(rgb.convert("P"), transparency=bytes(range(256))),
        "gray + alpha png": encode(noise(channels=2)),
        "rgba png": encode(noise(channels=4)),
        "interlaced png": adam7(np.asarray(rgb)),
        "16-bit gray": png16(values[..., :1]),
        "16-bit gray + alpha": png16(values[..., :2]),
        "16-bit rgb": png16(values[..., :3]),
        "16-bit rgba": png16(values),
        "16-bit gray, one clear": png16(values[..., :1], chunk(b"tRNS", b"\0\1")),
        "2-bit gray, one clear": png(4, 1, 2, 0, b"\0\x1b", chunk(b"tRNS", b"\0\1")),
        "cmyk jpeg": encode(rgb.convert("CMYK"), "JPEG"),
        "exif jpeg": encode(rgb, "JPEG", exif=EXIF + tiff_directory([(0x0112, 3, 1, 6)])),
        "animated gif": encode(frames[0], "GIF", **several),
        "animated webp": encode(frames[0], "WEBP", **several),
        "animated png": encode(frames[0], "PNG", **several),
        "several jpegs in one": encode(frames[0], "MPO", **several),
        "1 x 1": encode(noise(1, 1)),
        "1 x 20000": encode(noise(20000, 1)),
        "wide gamut": encode(rgb, icc_profile=profile()),
        "broken profile": encode(rgb, icc_profile=b"not a profile" * 20),
        "broken exif": encode(rgb, "JPEG", exif=EXIF + b"II*\0\xff\xff\xff\xff"),
        "bytes between segments": (jpeg := encode(rgb, "JPEG"))[:20] + b"\0\0\xff\0\xff\xff" + jpeg[20:],
    }


@cache
def refused() -> dict[str, tuple[bytes, str]]:
    """Files that must not be read, and the reason."""
    rgb = noise(200, 200)
    whole = {kind: encode(rgb, kind) for kind in ("PNG", "JPEG", "WEBP", "GIF", "BMP")}
    huge = {
        f"{side} x {side}": (png(side, side, 8, 2, b""), "too many pixels") for side in (9450, 13000, 30000, 2**31 - 1)
    }
    webp_canvas = b"VP8X" + struct.pack("<I", 10) + b"\x02\0\0\0" + b"\x7f\x3e\0" * 2  # 16000 x 16000, animated
    webp_bomb = b"RIFF" + struct.pack("<I", 22) + b"WEBP" + webp_canvas
    run_length = bytearray(encode(Image.new("P", (8, 8)), "BMP"))
    run_length[30:34] = struct.pack("<I", 1)
    return {
        "nothing": (b"", "unreadable image"),
        "zeros": (bytes(100), "unreadable image"),
        "text": (b"this is text", "unreadable image"),
        "web page": (b"<!DOCTYPE html><html><body>404</body></html>", "unreadable image"),
        "svg": (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', "unsupported image format"),
        "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "unsupported image format"),
        "psd": (b"8BPS\0\1" + bytes(40), "unsupported image format"),
        "tiff": (encode(rgb, "TIFF"), "unsupported image format"),
        "avif": (b"\0\0\0\x20ftypavif" + bytes(40), "unsupported image format"),
        "ppm": (encode(rgb, "PPM"), "unreadable image"),
        "header of a jpeg": (b"\xff\xd8\xff\xe0", "truncated image"),
        **{f"cut {kind}": (data[: len(data) // 2], "truncated image") for kind, data in whole.items()},
        "png without pixels": (png(100, 100, 8, 2, b""), "truncated image"),
        "png of no size": (png(0, 5, 8, 2, b""), "unreadable image"),
        "wrong checksum": (whole["PNG"][:29] + b"abcd" + whole["PNG"][33:], "unreadable image"),
        "gif canvas": (b"GIF89a\xff\xff\xff\xff" + whole["GIF"][10:], "too many pixels"),
        "webp canvas": (webp_bomb, "too many pixels"),
        "run-length coded bmp": (bytes(run_length), "unsupported image format"),
        "16-bit rgb, one clear": (
            png16(np.zeros((2, 2, 3)), chunk(b"tRNS", bytes(6))),
            "unsupported pixel format",
        ),
        **huge,
    }


def hostile() -> dict[str, tuple[bytes, str | None]]:
    """Files made to cost time or memory; the reason, or None where the picture is good once the trap is left out."""
    jpeg, one = encode(noise(40, 40), "JPEG"), encode(noise(1, 1))
    text = zlib.compress(bytes(10**6))
    aimed = tiff_directory([(1000 + i, 7, 64_000, 8) for i in range(5000)])
    photoshop = b"Photoshop 3.0\0" + b"8BIM\0\1\0\0\0\0\0\0" * 5000
    empty_scan = b"\xff\xda\0\x0c\x03\1\0\2\x11\3\x11\0\x3f\0"
    header = b"\x89PNG\r\n\x1a\n" + one[8:33]
    return {
        "exif that points at itself": (with_segments(jpeg, segment(0xE1, EXIF + aimed + bytes(4000))), None),
        "exif in 900 pieces": (with_segments(jpeg, *[segment(0xE1, EXIF + bytes(60_000))] * 900), None),
        "photoshop resources": (with_segments(jpeg, *[segment(0xED, photoshop)] * 900), None),
        "a million comments": (with_segments(jpeg, *[segment(0xFE, b"")] * 10**6), "too many parts"),
        "5000 scans": (jpeg[:-2] + empty_scan * 5000 + b"\xff\xd9", "too many parts"),
        "exif of a png": (one[:33] + chunk(b"eXIf", aimed + bytes(10**6)) + one[33:], None),
        "text that unfolds": (one[:33] + chunk(b"zTXt", b"k\0\0" + text) * 500 + one[33:], None),
        "profiles that unfold": (one[:33] + chunk(b"iCCP", b"k\0\0" + text) * 5000 + one[33:], None),
        "a million text chunks": (one[:33] + chunk(b"tEXt", b"k\0v") * 10**6 + one[33:], "too many parts"),
        "a million empty data chunks": (header + chunk(b"IDAT") * 10**6 + one[33:], "too many parts"),
        "most data chunks": (header + chunk(b"IDAT") * (MAX_PARTS - 3) + one[33:], None),
        "gif comments": (gif_comments(1000), None),
        "a million gif comments": (gif_comments(10**6), "too many parts"),
    }


def at_the_limit() -> Iterator[tuple[str, bytes]]:
    """The largest pictures that are read, of the kinds that take most memory; made one at a time."""
    side = isqrt(MAX_PIXELS)
    turned = EXIF + tiff_directory([(0x0112, 3, 1, 6)])
    yield "jpeg", encode(Image.new("RGB", (side, side), "red"), "JPEG", exif=turned, icc_profile=profile())
    yield "cmyk jpeg", encode(Image.new("CMYK", (side, side)), "JPEG", exif=turned)
    yield "rgba png", encode(Image.new("RGBA", (side, side), (1, 2, 3, 4)), exif=turned, compress_level=1)
    yield "16-bit gray png", encode(Image.new("I;16", (side, side), 9), exif=turned, compress_level=1)
    yield "bmp", encode(Image.new("L", (side, side)), "BMP")
    yield "gif", encode(Image.new("L", (side, side)), "GIF")
    side = isqrt(MAX_PIXELS // 2)
    yield "webp", encode(Image.new("RGBA", (side, side), (1, 2, 3, 4)), "WEBP", lossless=True, method=0, exif=turned)


def gif_comments(count: int) -> bytes:
    gif = encode(noise(), "GIF")
    start = gif.index(b"\x2c", 13 + 3 * 2 ** ((gif[10] & 7) + 1))  # the image descriptor, after the palette
    return gif[:start] + b"\x21\xfe" + b"\1c" * count + b"\0" + gif[start:]


def mutate(chance: random.Random, wholes: list[bytes]) -> bytes:
    """One of `wholes` with bytes changed, cut out, doubled, zeroed, or its end missing."""
    data = bytearray(chance.choice(wholes))
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(data)) if data else 0
        span = chance.randint(1, 40)
        match chance.randrange(8):
            case 0:
                del data[at : at + span]
            case 1:
                data[at:at] = data[at : at + span]
            case 2:
                data[at : at + span] = bytes(len(data[at : at + span]))
            case 3 if chance.random() < 0.3:
                del data[at:]
            case 4:
                data[at : at + 4] = chance.choice([b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", bytes(4)])
            case _ if data:
                data[chance.randrange(len(data))] = chance.randrange(256)
    return bytes(data)


def measure(data: bytes) -> tuple[str, float, float]:
    """-> (reason or "read", seconds, MB that reading takes, the file's own bytes included)."""
    ctypes.CDLL(None).malloc_trim(0)  # what was freed before is not there to be used again uncounted
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the peak begins anew (Linux, proc(5))
    before = _kilobytes("VmRSS")
    began = time.perf_counter()
    try:
        image = read_image(data).image
        outcome = "read" if image.mode == "RGB" else f"mode {image.mode}"
    except Rejected as rejected:
        outcome = rejected.reason
    seconds = time.perf_counter() - began
    return outcome, seconds, (_kilobytes("VmHWM") - before) / 1024 + len(data) / 2**20


def _kilobytes(name: str) -> int:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name))


def mutated(count: int, seed: int) -> dict[str, Any]:
    """Read `count` mutated files: how often each outcome, the slowest, the hungriest."""
    chance, wholes = random.Random(seed), list(good().values())
    costs = [measure(mutate(chance, wholes)) for _ in range(count)]
    outcomes = Counter(outcome for outcome, _, _ in costs)
    return {"outcomes": outcomes, "slowest_s": max(c[1] for c in costs), "most_mb": max(c[2] for c in costs)}


def hand_made() -> dict[str, tuple[str, float, float]]:
    """Read each hand-made file: name -> (outcome, seconds, MB)."""
    files = {**good(), **{k: d for k, (d, _) in {**refused(), **hostile()}.items()}}
    return {name: measure(data) for name, data in files.items()}


def run(what: str, count: int = 0) -> Any:
    """What a child process is asked for: "mutated", "hand-made", or "limit"."""
    if what == "limit":
        return {name: measure(data) for name, data in at_the_limit()}
    return mutated(count, seed=0) if what == "mutated" else hand_made()


if __name__ == "__main__":
    sys.stdout.write(json.dumps(run(sys.argv[1], *map(int, sys.argv[2:]))))
