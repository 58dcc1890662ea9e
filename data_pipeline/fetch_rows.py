"""The rows of a table of URLs, as far as they matter to a fetch."""

from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from data_pipeline.addresses import MAX_URL
from data_pipeline.shards import file_sha256, to_json
from data_pipeline.sources import Rejected
from data_pipeline.sources.columns import Columns, choose, plain
from data_pipeline.sources.pictures import row_key
from data_pipeline.sources.rows import open_table


@dataclass(frozen=True)
class Row:
    """Row `number` (from 0) of a table. `rejected`: why nothing is fetched for it, and then only `name` is known.

    name: the URL as text fit for a ledger, cut where no URL is that long, or "row 7" without one.
    key, captions, meta: as in a Sample.
    """

    number: int
    name: str
    url: str = ""
    key: str = ""
    captions: tuple[str, ...] = ()
    meta: dict[str, Any] | None = None
    rejected: Rejected | None = None


class UrlTable:
    """The rows of a CSV, TSV, JSON lines or Parquet file. `columns` as for any table, see there.

    `fingerprint`: hash of the file's content and of what its columns are taken for. Raises ValueError for a file that
    is no table, and without a column of URLs or captions.
    """

    def __init__(self, path: str, columns: Columns) -> None:
        self.path = path
        self._rows = open_table(path)
        self._roles = choose(columns, self._rows.columns, path)
        for what, found in (("url", self._roles.url), ("caption", self._roles.captions)):
            if not found:
                known = ", ".join(self._rows.columns)
                raise ValueError(f"{path} has no {what} column; name it with {what}_column(s)=...; it has {known}")
        if not len(self):
            raise ValueError(f"{path} has no rows")
        self.fingerprint = f"{file_sha256(path)} {self._roles}"

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> Row:
        """Row `index`; one that cannot be read is a Row with `rejected`."""
        name = f"row {index}"
        try:
            found = self._rows[index]
            url = found.get(self._roles.url)
            if not isinstance(url, str) or not url.strip():
                raise Rejected("no url")
            url = str(plain(url.strip()))
            name = url[:MAX_URL]
            captions, meta = self._roles.describe(found)
            meta.pop("url", None)  # kept beside it, and as text that can be written
            try:
                to_json(meta)
            except ValueError as error:
                raise Rejected("row is not UTF-8") from error
        except Rejected as rejected:
            return Row(index, name, rejected=rejected)
        key = row_key(found.get(self._roles.key), PurePath(self.path).stem, index)
        return Row(index, name, url, key, captions, meta)

    def part(self, number: int, size: int) -> list[Row]:
        """Rows `number * size` up to the next part, or the end."""
        return [self[index] for index in range(number * size, min((number + 1) * size, len(self)))]
