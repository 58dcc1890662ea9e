"""Which column of a table says what: the picture, captions, key, address, weights and scores."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Any

from data_pipeline.captions import clean_caption, clean_captions
from data_pipeline.sources import Rejected
from data_pipeline.sources.rows import usual

PATHS = ("file_name", "path", "image_path", "file_path", "filepath", "filename", "file")
IMAGES = ("image", "img", "jpg", "jpeg", "png", "webp", "image_bytes", "bytes")
CAPTIONS = ("caption", "captions", "text", "texts", "prompt")
KEYS = ("key", "__key__")
URLS = ("url", "image_url")
WEIGHTS = ("weight", "sample_weight")
SCORES = {
    "aesthetic": ("aesthetic", "aesthetic_score", "aesthetics"),
    "unsafe": ("unsafe", "punsafe"),
    "watermark": ("watermark", "pwatermark"),
    "similarity": ("similarity", "clip_similarity"),
}
_LEFT_OUT = ("exif",)  # holds where a picture was taken


@dataclass(frozen=True, kw_only=True)
class Columns:
    """Names of columns; without one, the first of the usual names (above) that is there, in any case of letters.

    path_column: a file, relative to the table or absolute. image_column: the picture's bytes, or {bytes, path}.
    caption_columns: each a text or a list of texts. caption_weight_columns: as many, each a number or a list of
    numbers. weight_column: of the sample. The four others are scores, kept for filters.
    """

    path_column: str = ""
    image_column: str = ""
    caption_columns: tuple[str, ...] = ()
    caption_weight_columns: tuple[str, ...] = ()
    weight_column: str = ""
    key_column: str = ""
    url_column: str = ""
    aesthetic_column: str = ""
    unsafe_column: str = ""
    watermark_column: str = ""
    similarity_column: str = ""


@dataclass(frozen=True)
class Roles:
    """The columns of one table that are there for something; "" and () where there is none."""

    path: str
    image: str
    captions: tuple[str, ...]
    caption_weights: tuple[str, ...]
    weight: str
    key: str
    url: str
    scores: dict[str, str]

    def describe(self, row: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
        """The cleaned captions of a row, and its meta: those of `about`, and the captions' `weights` if it has any.

        Raises Rejected for no caption, and for numbers that are none.
        """
        weighted, meta = self.weighted(row), self.about(row)
        captions = clean_captions(weighted)
        if self.caption_weights:
            meta["weights"] = [weighted[c] for c in captions]
        return captions, meta

    def about(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """What a row says besides: `scores`, `weight`, `url`, and all other `columns`. Raises Rejected."""
        meta: dict[str, Any] = {}
        scores = {name: number(row.get(column), column) for name, column in self.scores.items()}
        if known := {name: score for name, score in scores.items() if score is not None}:
            meta["scores"] = known
        if (weight := number(row.get(self.weight), self.weight)) is not None:
            meta["weight"] = _not_negative(weight, self.weight)
        if row.get(self.url):
            meta["url"] = plain(str(row[self.url]))
        used = self._used()
        try:
            rest = {plain(k): plain(v) for k, v in row.items() if k not in used and k.lower() not in _LEFT_OUT}
        except RecursionError as error:
            raise Rejected("bad row", "nested too deep") from error
        if told := {name: value for name, value in rest.items() if value is not None}:
            meta["columns"] = told
        return meta

    def weighted(self, row: Mapping[str, Any]) -> dict[str, float]:
        """Cleaned caption -> its weight (1 where none is given); equal captions are one. Raises Rejected."""
        texts = [(column, t) for column in self.captions for t in _listed(row.get(column))]
        for column, text in texts:
            if not isinstance(text, str):
                raise Rejected("caption is not text", f"{column}: {type(text).__name__}")
        weights = [(c, number(w, c)) for c in self.caption_weights for w in _listed(row.get(c))]
        if not self.caption_weights:
            weights = [("", 1.0)] * len(texts)
        if len(weights) != len(texts):
            raise Rejected("weights do not match captions", f"{len(weights)} weights, {len(texts)} captions")
        total: dict[str, float] = {}
        for (_, text), (column, weight) in zip(texts, weights, strict=True):
            if cleaned := clean_caption(text):
                total[cleaned] = total.get(cleaned, 0.0) + _not_negative(weight or 0.0, column)
        return total

    def _used(self) -> set[str]:
        lists = (*self.captions, *self.caption_weights, *self.scores.values())
        return {self.path, self.image, self.weight, self.key, self.url, *lists}


def choose(names: Columns, columns: Sequence[str], table: str) -> Roles:
    """The roles of a table's columns. Raises ValueError for a column that was named and is not there."""

    def one(asked: str, known: Sequence[str]) -> str:
        if asked and asked not in columns:
            raise ValueError(f"{table} has no column {asked!r}; it has {', '.join(columns)}")
        return asked or usual(columns, known)

    weights = tuple(one(c, ()) for c in names.caption_weight_columns)
    captions = tuple(one(c, ()) for c in names.caption_columns)
    if not names.caption_columns and (first := usual(columns, CAPTIONS)):
        captions = (first,)
    if weights and len(weights) != len(captions):
        raise ValueError(f"{table}: {len(weights)} caption_weight_columns for {len(captions)} caption columns")
    asked = {name: getattr(names, f"{name}_column") for name in SCORES}
    scores = {name: one(asked[name], known) for name, known in SCORES.items()}
    # A picture that was asked for by one column is not looked for in another.
    return Roles(
        path="" if names.image_column and not names.path_column else one(names.path_column, PATHS),
        image="" if names.path_column and not names.image_column else one(names.image_column, IMAGES),
        captions=captions,
        caption_weights=weights,
        weight=one(names.weight_column, WEIGHTS),
        key=one(names.key_column, KEYS),
        url=one(names.url_column, URLS),
        scores={name: column for name, column in scores.items() if column},
    )


def number(value: Any, column: str) -> float | None:
    """A finite number, also from its text; None for nothing at all. Raises Rejected."""
    if value is None or value == "":
        return None
    try:
        found = float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if isinstance(value, float) and math.isnan(value):
        return None  # how pandas writes a missing number
    if not math.isfinite(found):
        raise Rejected("not a number", f"{column}={str(value)[:40]!r}")
    return found


def plain(value: Any) -> Any:
    """What JSON can hold of a value: bytes are left out (None), and so is what is not a finite number."""
    if value is None or isinstance(value, bool | int | str):
        return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {plain(str(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if isinstance(value, date):
        return value.isoformat()
    return None if isinstance(value, bytes) else str(value)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return list(value) if isinstance(value, list | tuple) else [value]


def _not_negative(value: float, column: str) -> float:
    if value < 0:
        raise Rejected("negative weight", f"{column}={value}")
    return value
