"""Where captioned pictures come from: what every source gives, and what it says when it cannot."""

from dataclasses import dataclass
from typing import Any, Protocol

from PIL import Image


class Rejected(Exception):
    """One sample cannot be used. `reason` is a short stable phrase (it is counted), `detail` is free text."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.reason}: {self.detail}" if self.detail else self.reason


@dataclass(frozen=True)
class Sample:
    """One captioned picture.

    key: unique in its source, 1 to 80 of [0-9a-z_-] (webdataset splits names at the first dot).
    image: RGB, any size.      captions: at least one, none empty; the first is the main one.
    meta: what else is known, JSON-able. Names with a meaning: `sha256` of the encoded picture, `url`, `scores`
    (name -> number), `weight` of the sample, `weights` of its captions, `repeats` an epoch.
    condition: the paired picture, RGB. mask: mode L, 255 where a pixel counts fully in the loss. Both have the shape
    of the picture, if not its size; None where there is none. All samples of a source have them, or none has.
    """

    key: str
    image: Image.Image
    captions: tuple[str, ...]
    meta: dict[str, Any]
    condition: Image.Image | None = None
    mask: Image.Image | None = None


class Source(Protocol):
    """A numbered list of samples: deterministic, picklable, cheap to construct.

    A source made from a config dataclass keeps it as `config`; a source over files that may change also has a
    `fingerprint` string, so that a restarted build notices.
    """

    def __len__(self) -> int:
        """How many samples there are, the ones that will be rejected included."""
        ...

    def __getitem__(self, index: int) -> Sample:
        """Sample `index` of 0 .. len - 1. Raises Rejected."""
        ...

    def name(self, index: int) -> str:
        """What row `index` is called where it comes from (a path, an address, a key), whether usable or not."""
        ...
