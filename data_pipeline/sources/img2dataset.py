"""What img2dataset leaves behind: tars, and beside each a table of all its rows, the failed ones too.

    DIR/00000.tar, 00000.parquet, 00000_stats.json

It writes a tar under its final name, and _stats.json when the shard is done: a tar without that is half written.
"""

import hashlib
import json
from dataclasses import dataclass

from data_pipeline import storage
from data_pipeline.sources import Rejected
from data_pipeline.sources.pictures import row_key
from data_pipeline.sources.rows import ParquetRows
from data_pipeline.sources.shard_scan import Entry
from data_pipeline.sources.webdataset import WebDatasetConfig, WebDatasetSource

STATS, TABLE, TAR = "_stats.json", ".parquet", ".tar"


@dataclass(frozen=True)
class Img2datasetConfig(WebDatasetConfig):
    """path: the output folder. The columns are those of the tables, or of each sample's .json where there is none."""


class Img2datasetSource(WebDatasetSource):
    """The rows of img2dataset's tables in their order, then what else the tars hold.

    Rejected: rows that failed (reason: their status, detail: their error_message), all of an unfinished shard, rows
    that are not in the tar, and one row for those that img2dataset dropped without an entry. A shard without a table
    is read by its tar alone.
    """

    def __init__(self, config: Img2datasetConfig) -> None:
        super().__init__(config)
        files = sorted((name, version) for name, version in self._files.items() if not name.endswith(TAR))
        listed = self.fingerprint + "".join(f"{name}\0{version}\n" for name, version in files)
        self.fingerprint = hashlib.sha256(listed.encode("utf-8", "surrogateescape")).hexdigest()

    def name(self, index: int) -> str:
        """The address, where the table has it; else tar and key."""
        _, entry = self._locate(index)
        return str((entry.row or {}).get("url") or super().name(index))

    def _find(self) -> list[tuple[str, str]]:
        path = self.config.path
        if not path or not storage.is_folder(path):
            raise ValueError(f"no folder {path!r}")
        kinds = (STATS, TABLE, TAR)
        self._files = {f.name: f.version for f in storage.list_files(path) if f.name.endswith(kinds)}
        stems = sorted({name.removesuffix(kind) for name in self._files for kind in kinds if name.endswith(kind)})
        if not any(stem + STATS in self._files for stem in stems):
            raise ValueError(f"{path} has no NNNNN{STATS}: not finished, or not of img2dataset; try webdataset:{path}")
        return [(stem + TAR, self._files.get(stem + TAR, "")) for stem in stems]

    def _rows_of(self, number: int) -> list[Entry]:
        name, version = self._shards[number]
        stem = name.removesuffix(TAR)
        in_tar = super()._rows_of(number) if version else []
        if stem + STATS not in self._files:
            for entry in in_tar:
                entry.reject("unfinished shard", f"no {storage.basename(stem)}{STATS}")
            return in_tar or [Entry("", reason="unfinished shard", detail=f"no {storage.basename(stem)}{STATS}")]
        if stem + TABLE not in self._files:
            return in_tar or [Entry("", reason="missing tar", detail=name)]
        listed = self._listed(stem, in_tar)
        met = {id(entry) for entry in listed}
        return listed + self._dropped(stem, len(listed)) + [entry for entry in in_tar if id(entry) not in met]

    def _listed(self, stem: str, in_tar: list[Entry]) -> list[Entry]:
        """One entry a row of the table: the tar's, or a rejected one."""
        table = ParquetRows([storage.join(self.config.path, stem + TABLE)])
        by_key: dict[str, Entry] = {}
        for entry in in_tar:
            by_key.setdefault(entry.key.rpartition("/")[2], entry)
        entries: list[Entry] = []
        for index in range(len(table)):
            try:
                row = table[index]
            except Rejected as rejected:
                entries.append(Entry(f"#{index}", reason=rejected.reason, detail=rejected.detail))
                continue
            key, status = str(row.get("key", f"#{index}")), row.get("status") or "success"
            if status != "success":
                entry = Entry(key, reason=str(status).replace("_", " "), detail=str(row.get("error_message") or ""))
            else:
                entry = by_key.pop(key) if key in by_key else Entry(key, reason="missing in tar")
            entry.row = row
            entries.append(entry)
        return entries

    def _dropped(self, stem: str, listed: int) -> list[Entry]:
        """A row for those that are missing in the table: img2dataset drops a row when its own code fails."""
        try:
            count = int(json.loads(storage.read(storage.join(self.config.path, stem + STATS)))["count"])
        except (ValueError, KeyError, TypeError) as error:
            return [Entry("", reason="unreadable metadata", detail=f"{stem}{STATS}: {error}")]
        if count <= listed:
            return []
        return [Entry("", reason="dropped by img2dataset", detail=f"{count - listed} of {count} rows have no entry")]

    def _key(self, number: int, entry: Entry) -> str:
        name = self._shards[number][0]
        folder = name.rpartition("/")[0]  # every run of img2dataset numbers its shards and keys from 0
        return row_key(f"{folder}/{entry.key}" if folder else entry.key, name, number)
