"""Every emoji of a colour font with its Unicode CLDR name and keywords: about 3,600 real captioned pictures.

Glyphs are read from the font's own bitmap and ligature tables, so that nothing but the two files decides the
pixels: no text layout library, whose absence or version would change what a family or a flag looks like.
"""

import hashlib
import io
import re
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from data_pipeline.images import on_white
from data_pipeline.sources import Rejected, Sample

if TYPE_CHECKING:
    from fontTools.ttLib import TTFont

SPLITS = ("train", "heldout", "all")
TONES = {
    0x1F3FB: "light",
    0x1F3FC: "medium-light",
    0x1F3FD: "medium",
    0x1F3FE: "medium-dark",
    0x1F3FF: "dark",
}
HELD_OUT = 0.1  # of the skin-toned emoji
_JOINER, _KEYCAP, _FLAGS = 0x200D, 0x20E3, {0x1F3F3, 0x1F3F4}
_INSTALL = "get it with: apt-get install fonts-noto-color-emoji unicode-cldr-core, or give font=PATH cldr=PATH"


@dataclass(frozen=True)
class EmojiConfig:
    """font: a colour font with PNG bitmaps (CBDT). cldr: folder with annotations/ and annotationsDerived/.

    language: of the captions, as CLDR names it (en, de, pt_PT, ...). size: pixels a side of the drawn square.
    split: "heldout" is a fixed tenth of the skin-toned emoji, "train" all the rest, "all" both.
    """

    font: str = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
    cldr: str = "/usr/share/unicode/cldr/common"
    language: str = "en"
    split: str = "train"
    size: int = 136


@dataclass(frozen=True)
class Emoji:
    """A character sequence (without U+FE0F) with its CLDR name and keywords."""

    text: str
    name: str
    keywords: tuple[str, ...]

    @property
    def tones(self) -> tuple[str, ...]:
        """Skin tones, in order; a tone swatch on its own counts as having none."""
        return tuple(TONES[ord(c)] for c in self.text if ord(c) in TONES) if len(self.text) > 1 else ()

    @property
    def base(self) -> str:
        """The sequence without skin tones."""
        return "".join(c for c in self.text if ord(c) not in TONES) or self.text

    @property
    def kind(self) -> str:
        """flag | keycap | toned | joined (by U+200D, not toned) | plain."""
        codes = [ord(c) for c in self.text]
        if any(0x1F1E6 <= c <= 0x1F1FF for c in codes) or _FLAGS.intersection(codes[:-1]):
            return "flag"
        if self.tones:
            return "toned"
        return "keycap" if _KEYCAP in codes else "joined" if _JOINER in codes else "plain"

    @property
    def captions(self) -> tuple[str, ...]:
        """The name; the name with the keywords it does not hold; the keywords alone."""
        more = [k for k in self.keywords if k not in self.name]
        return self.name, ", ".join([self.name, *more]), ", ".join(self.keywords)


class EmojiSource:
    """The emoji of one split, in a fixed mixed order, so that the first n are a fair sample.

    Named characters that the font does not draw as one picture are rejected one by one ("not one glyph").
    Raises ValueError when font or CLDR are missing, and says how to get them.
    """

    def __init__(self, config: EmojiConfig) -> None:
        if config.split not in SPLITS:
            raise ValueError(f"split={config.split!r}: allowed are {', '.join(SPLITS)}")
        if not 1 <= config.size <= 4096:
            raise ValueError(f"size={config.size}: allowed are 1 to 4096 pixels")
        if not Path(config.font).is_file():
            raise ValueError(f"no emoji font at {config.font}; {_INSTALL}")
        named = read_names(Path(config.cldr), config.language)
        held = held_out(named)
        chosen = [e for e in named if config.split == "all" or (e in held) == (config.split == "heldout")]
        self.config = config
        self.emoji = sorted(chosen, key=lambda e: _hash(e.text))
        with open(config.font, "rb") as file:
            font = hashlib.file_digest(file, "sha256").hexdigest()
        self.fingerprint = f"{font} {hashlib.sha256(repr(self.emoji).encode()).hexdigest()}"
        self._glyphs: Glyphs | None = None

    def __len__(self) -> int:
        return len(self.emoji)

    def __getitem__(self, index: int) -> Sample:
        """Emoji `index`. Raises Rejected, or ValueError when the font is not of the right kind."""
        if self._glyphs is None:
            self._glyphs = Glyphs(Path(self.config.font))
        emoji = self.emoji[index]
        image = self._glyphs.draw(emoji.text)
        if image is None:
            raise Rejected("not one glyph", f"{emoji.text} {emoji.name}")
        size = self.config.size
        if image.width != size:
            image = image.resize((size, size), Image.Resampling.LANCZOS)
        key = "-".join(f"{ord(c):x}" for c in emoji.text)
        meta: dict[str, Any] = {
            "emoji": emoji.text,
            "codepoints": [f"U+{ord(c):04X}" for c in emoji.text],
            "name": emoji.name,
            "keywords": list(emoji.keywords),
            "kind": emoji.kind,
            "base": emoji.base,
            "tones": list(emoji.tones),
        }
        return Sample(key, image, tuple(c for c in emoji.captions if c), meta)

    def name(self, index: int) -> str:
        """The characters and their CLDR name."""
        return f"{self.emoji[index].text} {self.emoji[index].name}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_glyphs": None}  # an open font does not travel to another process


class Glyphs:
    """The pictures of a CBDT colour font. Raises ValueError when the font has none."""

    def __init__(self, path: Path) -> None:
        try:
            from fontTools.ttLib import TTFont, TTLibError
        except ImportError as error:
            raise ValueError("emoji need fontTools; get it with: pip install fonttools") from error
        try:
            font = TTFont(path, lazy=True)
        except TTLibError as error:
            raise ValueError(f"{path} is not a font: {error}") from error
        if "CBDT" not in font:
            raise ValueError(f"{path} has no PNG bitmaps (CBDT table); {_INSTALL}")
        strikes = zip(font["CBLC"].strikes, font["CBDT"].strikeData, strict=True)
        self._bitmaps = max(strikes, key=lambda s: s[0].bitmapSizeTable.ppemY)[1]
        self._characters = font.getBestCmap()
        self._ligatures = _ligatures(font)

    def draw(self, text: str) -> Image.Image | None:
        """One emoji on a white square, as large as the font has it; None if it is not one picture."""
        names = tuple(self._characters.get(ord(c)) for c in text)
        glyph = names[0] if len(names) == 1 else self._ligatures.get(names)
        if glyph is None or glyph not in self._bitmaps:
            return None
        image = Image.open(io.BytesIO(self._bitmaps[glyph].imageData), formats=["PNG"]).convert("RGBA")
        side = max(image.size)
        square = Image.new("RGBA", (side, side))
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        return on_white(square)


def _ligatures(font: "TTFont") -> dict[tuple[str, ...], str]:
    """Glyph sequence -> the one glyph that stands for it (GSUB lookups of type 4; 7 wraps another type)."""
    found: dict[tuple[str, ...], str] = {}
    lookups = font["GSUB"].table.LookupList.Lookup if "GSUB" in font else []
    for table in (table for lookup in lookups for table in lookup.SubTable):
        table = table.ExtSubTable if table.LookupType == 7 else table
        if table.LookupType == 4:
            for first, ligatures in table.ligatures.items():
                for ligature in ligatures:
                    found.setdefault((first, *ligature.Component), ligature.LigGlyph)
    return found


def read_names(cldr: Path, language: str) -> list[Emoji]:
    """All characters that CLDR names in `language`, in CLDR order. Raises ValueError.

    A region's file (de_CH) only holds what differs from its language's (de).
    """
    folders = [cldr / "annotations", cldr / "annotationsDerived"]
    if not all(folder.is_dir() for folder in folders):
        raise ValueError(f"no CLDR annotations in {cldr}; {_INSTALL}")
    known = sorted(path.stem for path in folders[0].glob("*.xml"))
    if language not in known:
        raise ValueError(f"language={language!r}: CLDR has {', '.join(known)}")
    parent = re.sub(r"_([A-Z]{2}|\d{3})$", "", language)
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    for path in (folder / f"{tag}.xml" for folder in folders for tag in dict.fromkeys((parent, language))):
        for item in ElementTree.parse(path).iter("annotation") if path.exists() else ():
            if item.text and item.text != "↑↑↑":  # CLDR's mark for "as in the parent"
                texts[item.attrib["cp"]][item.get("type", "keywords")] = item.text
    return [
        Emoji(text, found["tts"], tuple(k.strip() for k in found.get("keywords", "").split("|") if k.strip()))
        for text, found in texts.items()
        if "tts" in found
    ]


def held_out(named: list[Emoji]) -> set[Emoji]:
    """A tenth of the skin-toned emoji, chosen by hash, never all variants of one base.

    So every base and every tone is seen in training, and the pairs held out test whether they compose.
    """
    variants: dict[str, list[Emoji]] = defaultdict(list)
    for emoji in named:
        if emoji.tones:
            variants[emoji.base].append(emoji)
    held: set[Emoji] = set()
    for base, toned in variants.items():
        share = len(toned) * HELD_OUT + _hash(base) / 2**64  # a random rounding, so that the shares average out
        count = min(int(share), len(toned) - 1)
        held.update(sorted(toned, key=lambda e: _hash(e.text))[:count])
    return held


def _hash(text: str) -> int:
    """64 bits that depend on the text only, unlike hash()."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")
