"""Tables as numbered rows, looked up one at a time: CSV, TSV, JSON lines, Parquet and Arrow files.

Ten million rows are never ten million Python objects: a text table keeps where each row begins (8 bytes a row), a
Parquet table the sizes of its row groups and one group, an Arrow table is mapped into memory.
"""

import bisect
import csv
import io
import itertools
import json
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any, BinaryIO, Protocol

import numpy as np
from numpy.typing import NDArray

from data_pipeline import storage
from data_pipeline.sources import Rejected

DELIMITERS = {".csv": ",", ".tsv": "\t"}
JSON_LINES = (".jsonl", ".ndjson")
TABLES = (*DELIMITERS, *JSON_LINES, ".parquet")
_BLOCK = 16 << 20
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_NEWLINE, _RETURN, _QUOTE = 10, 13, 34


class Rows(Protocol):
    """A table. `columns`: its names, in order (of JSON lines, those of the first rows)."""

    columns: tuple[str, ...]

    def __len__(self) -> int:
        """How many rows there are."""
        ...

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index` of 0 .. len - 1 as column -> value. Raises Rejected when the row cannot be read."""
        ...

    def place(self, index: int) -> str:
        """Where a person finds row `index`: "line 7", or "row 7" (from 1) of what has no lines."""
        ...


def open_table(path: str) -> Rows:
    """The table in one file, of the kind its name says. Raises ValueError."""
    suffix = path[path.rfind(".") :].lower()
    if suffix not in TABLES:
        raise ValueError(f"{path!r} is not a table: {', '.join(TABLES)}")
    if not storage.exists(path) or storage.is_folder(path):
        raise ValueError(f"no table {path!r}")
    return ParquetRows([path]) if suffix == ".parquet" else TextRows(path, DELIMITERS.get(suffix))


class TextRows:
    """CSV (with a delimiter; first the names, quoted as in RFC 4180), or JSON lines (without); UTF-8.

    Raises ValueError for a table without rows and for quotes that leave open where a row ends.
    """

    def __init__(self, path: str, delimiter: str | None) -> None:
        self.path = path
        self._delimiter = delimiter
        self._file: BinaryIO | None = None
        with storage.open_read(path) as file:
            self._starts, self._end = _row_starts(path, file, delimiter)
        try:
            if delimiter:
                header = self._parse(0)
                self._starts = self._starts[1:]
                self.columns = tuple(header)
                if len(set(header)) < len(header) or not all(header):
                    raise ValueError(f"{path}: column names are empty or repeat: {', '.join(header)}")
            else:
                self.columns = self._first_names()
        except (Rejected, IndexError) as error:
            raise ValueError(f"{path} is not a table: {error}") from error
        if not len(self):
            raise ValueError(f"{path} has no rows")

    def __len__(self) -> int:
        return len(self._starts)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`. Raises IndexError, Rejected."""
        row = self._parse(index)
        if self._delimiter is None:
            return dict(row)
        if len(row) != len(self.columns):
            raise Rejected("bad row", f"{len(row)} values for {len(self.columns)} columns")
        return dict(zip(self.columns, row, strict=True))

    def place(self, index: int) -> str:
        """The line that row `index` begins on, from 1."""
        with storage.open_read(self.path) as file:
            before = file.read(int(self._starts[index]))
        return f"line {before.count(_NEWLINE) + 1}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_file": None}

    def _first_names(self) -> tuple[str, ...]:
        names: dict[str, None] = {}
        for index in range(min(len(self), 100)):
            with suppress(Rejected):
                names |= dict.fromkeys(self[index])
        return tuple(names)

    def _parse(self, index: int) -> Any:
        if not 0 <= index < len(self._starts):
            raise IndexError(f"row {index} of {len(self._starts)}")
        begin = int(self._starts[index])
        end = int(self._starts[index + 1]) if index + 1 < len(self._starts) else self._end
        if self._file is None:
            self._file = storage.open_read(self.path)
        self._file.seek(begin)
        try:
            text = self._file.read(end - begin).decode("utf-8")
            if self._delimiter is None:
                found = json.loads(text)
                if not isinstance(found, dict):
                    raise Rejected("bad row", f"{type(found).__name__}, not an object")
                return found
            reader = csv.reader(io.StringIO(text, newline=""), delimiter=self._delimiter, strict=True)
            (values,) = (row for row in reader if row)
            return values
        except UnicodeDecodeError as error:
            raise Rejected("row is not UTF-8", f"byte {begin + error.start}") from error
        except (ValueError, RecursionError, csv.Error) as error:
            raise Rejected("bad row", f"at byte {begin}: {error}") from error


def _row_starts(path: str, file: BinaryIO, delimiter: str | None) -> tuple[NDArray[np.int64], int]:
    """Where rows begin, blank lines left out, and where the file ends.

    A newline between quotes ends no row: one with an odd number of quotes before it (RFC 4180 doubles a quote
    inside quotes, which keeps the count even). So a lone quote in a bare field would join two rows: it is refused.
    """
    starts: list[NDArray[np.int64]] = []
    at = len(_BYTE_ORDER_MARK) if file.read(len(_BYTE_ORDER_MARK)) == _BYTE_ORDER_MARK else 0
    file.seek(at)
    fresh, open_quote, last = True, 0, _NEWLINE  # at a row's start; between quotes; the byte before the block
    may_precede = [ord(delimiter), _NEWLINE, _RETURN, _QUOTE] if delimiter else []
    while block := file.read(_BLOCK):
        data = np.frombuffer(block, np.uint8)
        newlines = np.flatnonzero(data == _NEWLINE)
        if delimiter:
            quotes = np.flatnonzero(data == _QUOTE)
            opening = quotes[(np.arange(len(quotes)) + open_quote) % 2 == 0]
            before = np.where(opening > 0, data[opening - 1], last)
            stray = opening[~np.isin(before, may_precede)]
            if len(stray):
                raise ValueError(
                    f"{path}: a quote within a bare field at byte {at + int(stray[0])}: put the field in quotes, "
                    "with the quote doubled"
                )
            newlines = newlines[(np.searchsorted(quotes, newlines) + open_quote) % 2 == 0]
            open_quote = (open_quote + len(quotes)) % 2
        begins = np.concatenate([np.zeros(int(fresh), np.int64), newlines + 1])
        fresh = bool(len(begins)) and int(begins[-1]) == len(data)
        begins = begins[begins < len(data)]
        starts.append(begins[~np.isin(data[begins], [_NEWLINE, _RETURN])] + at)
        at += len(block)
        last = block[-1]
    if open_quote:
        raise ValueError(f"{path}: a quote is opened and never closed")
    return np.concatenate([np.zeros(0, np.int64), *starts]), at


class ParquetRows:
    """Parquet files one after the other. ValueError names a file that is none; damage further in rejects its rows."""

    def __init__(self, paths: Sequence[str]) -> None:
        _pyarrow()
        self.paths = tuple(paths)
        self._groups: list[tuple[int, int]] = []  # (file, row group within it)
        sizes: list[int] = []
        names: list[str] = []
        for number, path in enumerate(self.paths):
            with _readable(path), self._open(number) as file:
                names += file.schema_arrow.names
                groups = range(file.metadata.num_row_groups)
                sizes += [file.metadata.row_group(g).num_rows for g in groups]
                self._groups += [(number, g) for g in groups]
        self.columns = tuple(dict.fromkeys(names))
        self._ends = list(itertools.accumulate(sizes))
        self._held: tuple[int, Any] = (-1, None)

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`. Raises IndexError, Rejected."""
        number, row = _locate(self._ends, index)
        if self._held[0] != number:
            file, group = self._groups[number]
            try:
                with self._open(file) as opened:
                    self._held = number, opened.read_row_group(group, use_threads=False)
            except (OSError, ValueError) as error:  # pyarrow's errors of damaged data are both
                raise Rejected("damaged table", f"{self.paths[file]}, row group {group}: {error}") from error
        return _row(self._held[1], row)

    def place(self, index: int) -> str:
        """The number of the row, from 1."""
        return f"row {index + 1}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_held": (-1, None)}

    def _open(self, number: int) -> Any:
        from pyarrow import parquet

        return parquet.ParquetFile(storage.open_read(self.paths[number]))


class ArrowRows:
    """Arrow files (streams, as `datasets` saves them, or random-access ones) one after the other."""

    def __init__(self, paths: Sequence[str]) -> None:
        _pyarrow()
        self.paths = tuple(paths)
        self._tables: dict[int, Any] = {}
        names: list[str] = []
        sizes: list[int] = []
        for number, path in enumerate(self.paths):
            with _readable(path):
                table = self._table(number)
            names += table.column_names
            sizes.append(table.num_rows)
        self.columns = tuple(dict.fromkeys(names))
        self._ends = list(itertools.accumulate(sizes))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Row `index`. Raises IndexError, Rejected."""
        number, row = _locate(self._ends, index)
        return _row(self._table(number), row)

    def place(self, index: int) -> str:
        """The number of the row, from 1."""
        return f"row {index + 1}"

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_tables": {}}

    def _table(self, number: int) -> Any:
        import pyarrow

        if number not in self._tables:
            path = self.paths[number]
            remote = storage.is_remote(path)
            source = pyarrow.BufferReader(storage.read(path)) if remote else pyarrow.memory_map(path)
            is_file = source.read(6) == b"ARROW1"
            source.seek(0)
            opened = pyarrow.ipc.open_file(source) if is_file else pyarrow.ipc.open_stream(source)
            self._tables[number] = opened.read_all()
        return self._tables[number]


class _readable:
    """Turns pyarrow's errors at opening into one line with the file's name."""

    def __init__(self, path: str) -> None:
        self.path = path

    def __enter__(self) -> None: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: object) -> None:
        if isinstance(error, ValueError | OSError):
            raise ValueError(f"{self.path} cannot be read: {' '.join(str(error).split())}") from error


def _row(table: Any, row: int) -> dict[str, Any]:
    """One row of a pyarrow table. Raises Rejected for a value that Python cannot hold: text that is not UTF-8, ..."""
    try:
        found: dict[str, Any] = table.slice(row, 1).to_pylist()[0]
    except (ValueError, OverflowError) as error:
        raise Rejected("bad row", " ".join(str(error).split())) from error
    return found


def _locate(ends: Sequence[int], index: int) -> tuple[int, int]:
    """Which part holds row `index`, and its number there; `ends` are the running totals."""
    if not 0 <= index < (ends[-1] if ends else 0):
        raise IndexError(f"row {index} of {ends[-1] if ends else 0}")
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def _pyarrow() -> None:
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise ValueError("Parquet and Arrow files need pyarrow; get it with: pip install 'ldm[data]'") from error


def usual(columns: Iterable[str], names: Sequence[str]) -> str:
    """The column with the first of these usual names, whatever its case; "" without one."""
    lower: dict[str, str] = {}
    for column in columns:
        lower.setdefault(column.lower(), column)
    return next((lower[n] for n in names if n in lower), "")
