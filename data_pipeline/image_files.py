"""What a picture file says before its pixels: its kind, its parts, which way is up. Parsed with bounds, in our code.

Pillow reads metadata while it opens a file, some of it in loops whose cost grows faster than the file (EXIF entries
that all point at the same bytes, pieces appended one by one). So PNG, JPEG and GIF files are walked here first,
and Pillow is handed only the parts that make the pixels.
"""

import struct
from dataclasses import dataclass

import numpy as np

from data_pipeline.sources import Rejected

SIGNATURES = {
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"\xff\xd8\xff": "JPEG",
    b"GIF87a": "GIF",
    b"GIF89a": "GIF",
    b"BM": "BMP",
}
# Named, so that a table of addresses shows what it holds; see FORMATS in images.py for why they are not read.
UNSUPPORTED = {
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"8BPS": "PSD",
    b"%!PS": "EPS",
    b"%PDF": "PDF",
    b"\0\0\1\0": "ICO",
    b"\xff\x0a": "JPEG XL",
    b"\0\0\0\x0cJXL ": "JPEG XL",
    b"\0\0\0\x0cjP  ": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
    b"<svg": "SVG",
}
MAX_PARTS = 50_000  # PNG chunks; JPEG segments before the first scan; GIF blocks before the first picture
MAX_SCANS = 100  # of a progressive JPEG: 10 is usual; one of 60 bytes can cost a pass over all pixels
ORIENTATION = 0x0112  # EXIF tag; values 1 to 8

_PNG_PARTS = {b"IHDR", b"PLTE", b"tRNS", b"iCCP", b"IDAT", b"IEND"}
_JPEG_ALONE = {0x01, 0xD8, *range(0xD0, 0xD8)}  # markers that no length follows
_SOS, _EOI, _APP0, _APP1, _APP2, _APP14, _APP15, _COM = 0xDA, 0xD9, 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE


@dataclass(frozen=True)
class PictureFile:
    """A file of `format`: `data` with the parts that make the pixels, and the EXIF block (b"" without one)."""

    format: str
    data: bytes
    exif: bytes = b""


def examine(data: bytes) -> PictureFile:
    """Tell the format by the content and leave out what does not make pixels. Raises Rejected."""
    match kind := _kind(data):
        case "PNG":
            return _png(data)
        case "JPEG":
            return _jpeg(data)
        case "GIF":
            return _gif(data)
        case "WEBP" if 8 + int.from_bytes(data[4:8], "little") > len(data):  # the size in the RIFF header
            raise Rejected("truncated image", f"WebP of {len(data)} bytes without its end")
    return PictureFile(kind, data)


def _kind(data: bytes) -> str:
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        raise Rejected("unsupported image format", "AVIF" if data[8:12] in (b"avif", b"avis") else "HEIF or video")
    for signature, name in SIGNATURES.items():
        if data.startswith(signature):
            return name
    for signature, name in UNSUPPORTED.items():
        if data.startswith(signature):
            raise Rejected("unsupported image format", name)
    raise Rejected("unreadable image", "no picture format known here begins so" if data else "empty file")


def _png(data: bytes) -> PictureFile:
    """Chunk = length, name, data, CRC (PNG specification, third edition, 5.3)."""
    view, exif, at = memoryview(data), b"", 8
    pieces, seen = [view[:8]], set()
    for _ in range(MAX_PARTS):
        name = data[at + 4 : at + 8]
        end = at + 12 + int.from_bytes(data[at : at + 4], "big")
        if len(name) < 4 or end > len(data):
            raise Rejected("truncated image", f"PNG of {len(data)} bytes without its end")
        if name == b"eXIf":
            exif = data[at + 8 : end - 4]
        elif name in _PNG_PARTS and not (name == b"iCCP" and name in seen):
            pieces.append(view[at:end])
        seen.add(name)
        at = end
        if name == b"IEND":
            return PictureFile("PNG", _join(data, pieces), exif)
    raise Rejected("too many parts", f"more than {MAX_PARTS} PNG chunks")


def _jpeg(data: bytes) -> PictureFile:
    """Segment = 0xFF, marker, length (of itself and what follows), data (ITU-T T.81, B.1.1), up to the first scan.

    Kept are the tables and frame headers, JFIF, the colour profile and Adobe's note on the colour space.
    """
    view, exif, at = memoryview(data), b"", 2
    pieces = [view[:2]]
    for _ in range(MAX_PARTS):
        at = data.find(b"\xff", at)
        if at < 0 or at + 4 > len(data):
            raise Rejected("truncated image", f"JPEG of {len(data)} bytes without its first scan")
        marker = data[at + 1]
        if marker in (0x00, 0xFF) or marker in _JPEG_ALONE:  # stray bytes, fill bytes
            at += 1 if marker == 0xFF else 2
            continue
        if marker == _EOI:
            raise Rejected("unreadable image", "JPEG without a scan")
        if marker == _SOS:
            scans = _count_scans(data, at)
            if scans > MAX_SCANS:
                raise Rejected("too many parts", f"{scans} JPEG scans, at most {MAX_SCANS}")
            return PictureFile("JPEG", _join(data, [*pieces, view[at:]]), exif)
        end = at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        body = data[at + 4 : end]
        if marker == _APP1 and body.startswith(b"Exif\0\0"):
            exif = exif or body
        elif _keeps(marker, body):
            pieces.append(view[at:end])
        at = end
    raise Rejected("too many parts", f"more than {MAX_PARTS} JPEG segments")


def _count_scans(data: bytes, start: int) -> int:
    """Markers of scans; inside a scan 0xFF is followed by 0. Several times faster than bytes.count of the two."""
    codes = np.frombuffer(data, np.uint8, offset=start)
    return int(np.count_nonzero(codes[np.flatnonzero(codes[:-1] == 0xFF) + 1] == _SOS))


def _gif(data: bytes) -> PictureFile:
    """Header, palette, then blocks: 0x21 extensions in sub-blocks of up to 255 bytes, 0x2C pictures (GIF89a, 18-24).

    Of what stands before the first picture only its graphic control (transparency) is kept.
    """
    start = at = 13 + (3 * 2 ** ((data[10] & 7) + 1) if len(data) > 10 and data[10] & 0x80 else 0)
    control = b""
    block = at
    for _ in range(MAX_PARTS):
        if at + 2 > len(data):
            raise Rejected("truncated image", f"GIF of {len(data)} bytes without a picture")
        if at == block and data[at] == 0x2C:
            return PictureFile("GIF", data[:start] + control + data[at:])
        if at == block and data[at] == 0x3B:
            raise Rejected("unreadable image", "GIF without a picture")
        if at == block and data[at] != 0x21:  # stray byte
            at = block = at + 1
        elif at == block:
            at += 2
        elif data[at]:
            at += 1 + data[at]
        else:
            at += 1
            control = data[block:at] if data[block + 1] == 0xF9 else control
            block = at
    raise Rejected("too many parts", f"more than {MAX_PARTS} GIF blocks before the first picture")


def _join(data: bytes, pieces: list[memoryview]) -> bytes:
    """The pieces one after the other; `data` itself, not a copy, when they are all of it."""
    return data if sum(map(len, pieces)) == len(data) else b"".join(pieces)


def _keeps(marker: int, body: bytes) -> bool:
    if marker == _APP2:
        return body.startswith(b"ICC_PROFILE\0")
    return marker in (_APP0, _APP14) or not (_APP0 <= marker <= _APP15 or marker == _COM)


def orientation(exif: bytes) -> int:
    """The way a picture is stored, 1 (upright) to 8, from an EXIF block; 1 where it does not say.

    Reads the first directory only (TIFF 6.0, section 2). Raises ValueError when the block is broken.
    """
    tiff = exif.removeprefix(b"Exif\0\0")
    orders = {b"II*\0": "little", b"MM\0*": "big"}
    if tiff[:4] not in orders or len(tiff) < 8:
        raise ValueError("no TIFF header")
    little = orders[tiff[:4]] == "little"
    start = int.from_bytes(tiff[4:8], "little" if little else "big")
    if start + 2 > len(tiff):
        raise ValueError("the directory lies outside the block")
    count = int.from_bytes(tiff[start : start + 2], "little" if little else "big")
    directory = tiff[start + 2 : start + 2 + 12 * count]
    if len(directory) < 12 * count:
        raise ValueError("the directory is cut short")
    for tag, kind, number, value in struct.iter_unpack("<HHI4s" if little else ">HHI4s", directory):
        if tag == ORIENTATION and number == 1 and kind in (3, 4):  # SHORT, LONG
            found = int.from_bytes(value[:2] if kind == 3 else value, "little" if little else "big")
            return found if 1 <= found <= 8 else 1
    return 1
