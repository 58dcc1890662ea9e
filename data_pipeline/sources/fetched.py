"""The folder that a fetch made, as a source: every row of its table, the ones that were not fetched with the reason."""

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.fetch import FORMAT, VERSION
from data_pipeline.images import MAX_PIXELS
from data_pipeline.shards import INDEX, sha256, unseal
from data_pipeline.sources import Rejected, Sample
from data_pipeline.sources.pictures import make_sample


@dataclass(frozen=True)
class FetchedConfig:
    """path: the folder. max_pixels: larger pictures are rejected."""

    path: str = ""
    max_pixels: int = MAX_PIXELS


class FetchedSource:
    """The rows of a fetched table, in order. `ValueError` when the fetch has not been through all of it.

    What damages the folder later raises RuntimeError when it is read.
    """

    def __init__(self, config: FetchedConfig) -> None:
        self.config = config
        self._folder = Path(config.path)
        path = self._folder / INDEX
        if not path.exists():
            raise ValueError(f"{self._folder} holds no finished fetch; run: ldm data fetch TABLE {self._folder}")
        index = unseal(path)
        if (index.get("format"), index.get("version")) != (FORMAT, VERSION):
            raise ValueError(f"{path} is not {FORMAT} version {VERSION}")
        self._rows: int = index["rows"]
        self._rows_per_part: int = index["rows_per_part"]
        self._ledgers: list[str] = index["parts"]
        self.fingerprint = sha256(path.read_bytes())
        self._open: tuple[int, dict[int, dict[str, Any]], list[str]] = (-1, {}, [])  # one part: rows, names of tars

    def __len__(self) -> int:
        return self._rows

    def name(self, index: int) -> str:
        """The URL of row `index`."""
        return str(self._row(index)[0]["name"])

    def __getitem__(self, index: int) -> Sample:
        """Row `index`. Raises Rejected; RuntimeError when the folder is damaged."""
        row, tars = self._row(index)
        if "reason" in row:
            raise Rejected(row["reason"], row["detail"])
        path = self._folder / tars[row["tar"]]
        members = {extension: _read(path, place) for extension, place in row["members"].items()}
        about = json.loads(members.pop("json"))
        (data,) = members.values()
        meta = {**about["meta"], "url": about["url"]}
        return make_sample(about["key"], data, tuple(about["captions"]), meta, self.config.max_pixels)

    def _row(self, index: int) -> tuple[dict[str, Any], list[str]]:
        """What the ledger says of a row, and the names of the part's tars."""
        if not 0 <= index < self._rows:
            raise IndexError(f"row {index} of {self._rows}")
        number = index // self._rows_per_part
        if self._open[0] != number:
            path = self._folder / f"{number:05d}.json"
            data = path.read_bytes() if path.exists() else b""
            if sha256(data) != self._ledgers[number]:
                raise RuntimeError(f"{path} is missing or not as the fetch left it; run the same ldm data fetch again")
            ledger = json.loads(data)
            rows = {row["row"]: row for row in (*ledger["samples"], *ledger["rejected"])}
            self._open = (number, rows, [tar["file"] for tar in ledger["tars"]])
        return self._open[1][index], self._open[2]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_open": (-1, {}, [])}


def _read(path: Path, place: list[Any]) -> bytes:
    offset, size, digest = place
    try:
        with path.open("rb") as file:
            data = os.pread(file.fileno(), size, offset)
    except FileNotFoundError:
        data = b""
    if sha256(data) != digest:
        raise RuntimeError(f"{path} is missing or damaged; delete it and run the same ldm data fetch again")
    return data
