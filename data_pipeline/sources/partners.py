"""What belongs to a picture beside its caption: a paired picture, and a mask of how much each pixel counts.

A mask is white (or opaque) where a model shall learn, black (or clear) where it shall not.
"""

import hashlib
from collections.abc import Callable

from PIL import Image

from data_pipeline import storage
from data_pipeline.images import MAX_PIXELS, SUFFIXES, read_image
from data_pipeline.sources import Rejected
from data_pipeline.sources.pictures import read_picture

ALPHA = "alpha"
_BLACK = (0, 0, 0)


class Partners:
    """The pictures of a folder, by their relative paths without the suffix. kind: "condition" or "mask".

    Raises ValueError for a folder without pictures, and for two that would belong to one picture.
    """

    def __init__(self, folder: str, kind: str, max_pixels: int = MAX_PIXELS) -> None:
        if not storage.is_folder(folder):
            raise ValueError(f"there is no folder {folder!r} of {kind}s")
        self._folder, self._kind, self._max_pixels = folder, kind, max_pixels
        self._names: dict[str, str] = {}
        digest = hashlib.sha256()
        for file in storage.list_files(folder):
            stem, _, suffix = file.name.rpartition(".")
            if f".{suffix.lower()}" not in SUFFIXES:
                continue
            if stem in self._names:
                raise ValueError(f"{folder}: {self._names[stem]} and {file.name} would be {kind}s of the same picture")
            self._names[stem] = file.name
            digest.update(f"{file.name}\0{file.version}\n".encode("utf-8", "surrogateescape"))
        if not self._names:
            raise ValueError(f"{folder!r}, the folder of {kind}s, has no pictures ({', '.join(SUFFIXES)})")
        self.fingerprint = digest.hexdigest()

    def read(self, name: str) -> Image.Image:
        """The partner of the picture `name`. Raises Rejected; OSError when a disk or service fails."""
        stem = name.rpartition(".")[0]
        if stem not in self._names:
            raise Rejected(f"missing {self._kind}")
        path = storage.join(self._folder, self._names[stem])
        return partner(self._kind, lambda: read_picture(path), self._max_pixels)


def partner(kind: str, load: Callable[[], bytes], max_pixels: int) -> Image.Image:
    """What `load` gives, as a "condition": RGB, or as a "mask": mode L, black where it is clear. Raises Rejected."""
    try:
        if kind == "mask":
            return read_image(load(), max_pixels, _BLACK).image.convert("L")
        return read_image(load(), max_pixels).image
    except Rejected as rejected:
        raise Rejected(f"unusable {kind}", str(rejected)) from rejected
