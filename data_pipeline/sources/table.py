"""A table of pictures with captions: CSV, TSV, JSON lines or Parquet, with paths or with the pictures inside."""

import hashlib
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from data_pipeline import storage
from data_pipeline.images import MAX_PIXELS
from data_pipeline.sources import Rejected, Sample
from data_pipeline.sources.columns import Columns, choose
from data_pipeline.sources.partners import partner
from data_pipeline.sources.pictures import make_sample, picture_bytes, row_key
from data_pipeline.sources.rows import Rows, open_table


@dataclass(frozen=True)
class TableConfig(Columns):
    """path: the table's file. folder: what paths in it are relative to; "" is the table's own folder.

    allow_remote: whether rows may name pictures far away (s3://...), which are fetched in your name. A table of
    web addresses is fetched first, with `ldm data fetch`.
    condition_column, mask_column: of a paired picture and of a mask (white where a pixel counts in the loss), each a
    path or the picture itself.
    """

    path: str = ""
    folder: str = ""
    max_pixels: int = MAX_PIXELS
    allow_remote: bool = False
    condition_column: str = ""
    mask_column: str = ""


class RowSource:
    """Pictures and captions by the rows of an open table. What the sources of tables have in common.

    Raises ValueError when there are no rows, no column of pictures or none of captions, or only web addresses.
    """

    def __init__(self, config: TableConfig, rows: Rows, fingerprint: str) -> None:
        self.config = config
        self.fingerprint = fingerprint
        self._rows = rows
        if not len(rows):
            raise ValueError(f"{config.path} has no rows")
        self._roles = choose(config, rows.columns, config.path)
        self._partners = {"condition": config.condition_column, "mask": config.mask_column}
        for column in self._partners.values():
            if column and column not in rows.columns:
                raise ValueError(f"{config.path} has no column {column!r}; it has {', '.join(rows.columns)}")
        columns = f"of: {', '.join(rows.columns)}"
        if not self._roles.image and not self._roles.path:
            if self._roles.url:
                raise _not_fetched(config.path, self._roles.url)
            raise ValueError(
                f"{config.path} has no column of pictures; say path_column=... or image_column=... {columns}"
            )
        if not self._roles.captions:
            raise ValueError(f"{config.path} has no column of captions; say caption_columns=[...] {columns}")
        first = self._first_path()
        if first.lower().startswith(("http://", "https://")):
            raise _not_fetched(config.path, self._roles.image or self._roles.path)
        self._folder = config.folder or storage.parent(config.path)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Sample:
        """Row `index`. Raises Rejected, IndexError."""
        row = self._rows[index]
        captions, meta = self._roles.describe(row)
        value = self._picture(row)
        data = self._bytes(value)
        if name := _path(value):
            meta["file"] = name
        key = row_key(row.get(self._roles.key), storage.stem(self.config.path), index)
        sample = make_sample(key, data, captions, meta, self.config.max_pixels)
        return replace(sample, condition=self._partner(row, "condition"), mask=self._partner(row, "mask"))

    def name(self, index: int) -> str:
        """The row's path, else its key, else its address; else the table's name and the row's number from 0."""
        try:
            row = self._rows[index]
        except Rejected:
            row = {}
        known = (_path(self._picture(row)), row.get(self._roles.key), row.get(self._roles.url))
        return str(next((k for k in known if k), f"{storage.basename(self.config.path)}#{index}"))

    def _bytes(self, value: Any) -> bytes:
        return picture_bytes(value, self._folder, allow_remote=self.config.allow_remote)

    def _partner(self, row: dict[str, Any], kind: str) -> Image.Image | None:
        """The paired picture or the mask of a row; None where the table has no such column. Raises Rejected."""
        column = self._partners[kind]
        if not column:
            return None
        if not row.get(column):
            raise Rejected(f"missing {kind}")
        return partner(kind, lambda: self._bytes(row[column]), self.config.max_pixels)

    def _picture(self, row: dict[str, Any]) -> Any:
        """Bytes, {bytes, path} or a path; a row without the picture itself may still have its path."""
        return row.get(self._roles.image) or row.get(self._roles.path)

    def _first_path(self) -> str:
        try:
            return _path(self._picture(self._rows[0]))
        except Rejected:
            return ""


class TableSource(RowSource):
    """The rows of one table. Raises ValueError as RowSource, and when the table cannot be read."""

    def __init__(self, config: TableConfig) -> None:
        if not config.path:
            raise ValueError("a table needs path=FILE")
        rows = open_table(config.path)
        # The pictures that paths lead to are not looked at: there may be millions.
        super().__init__(config, rows, hashlib.sha256(storage.info(config.path).version.encode()).hexdigest())


def _path(value: Any) -> str:
    path = value.get("path") if isinstance(value, dict) else value
    return path.encode("utf-8", "replace").decode() if isinstance(path, str) else ""


def _not_fetched(path: str, column: str) -> ValueError:
    return ValueError(
        f"{path} has addresses (column {column!r}), not pictures; first run: ldm data fetch {path} FOLDER"
    )
