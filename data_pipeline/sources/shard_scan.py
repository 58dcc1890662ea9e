"""The samples of one foreign WebDataset tar: its members grouped by key, and a reason for each that is not whole.

A name is split at the first dot of its last part, as webdataset does: `key.extension`. Where webdataset would pass
over something, or give half a sample, the sample is rejected here by name:

    damaged tar            a place that cannot be read, and a sample beside it that may lack members
    cut short              the file ends within the member
    empty tar              no member at all
    duplicate key          all samples of a key but the first
    members not adjacent   members of one key with others between them
    dotted name            a picture with a further dot in its name (webdataset cuts the key there)
    unsafe name            absolute, with .., a backslash, a drive or control characters
    not a plain file       a link, device, pipe or sparse file
    not a sample           a file without key or extension
"""

import json
import re
from collections.abc import Iterable
from contextlib import closing
from dataclasses import asdict, dataclass, field
from typing import Any

from data_pipeline import storage
from data_pipeline.images import SUFFIXES
from data_pipeline.sources.tars import Damage, Member, members

PICTURES = tuple(s[1:] for s in SUFFIXES)
_UNSAFE = re.compile(r"^/|^[A-Za-z]:|(?:^|/)\.\.(?:/|$)|[\\\x00-\x1f\x7f]")


@dataclass
class Entry:
    """A row of a shard. members: extension -> (offset, size). reason: why it is rejected, "" when nothing is known
    against it. row: what a table beside the shard says of it.
    """

    key: str
    members: dict[str, tuple[int, int]] = field(default_factory=dict)
    reason: str = ""
    detail: str = ""
    row: dict[str, Any] | None = None

    def reject(self, reason: str, detail: str = "") -> None:
        """The first reason stays."""
        if not self.reason:
            self.reason, self.detail = reason, detail


def scan(path: str) -> list[Entry]:
    """The rows of the tar at `path`, in the order they begin; a damaged place is a row of its own."""
    size = storage.info(path).size
    opened = storage.open_read(path) if storage.is_remote(path) else open(path, "rb", buffering=0)  # noqa: SIM115
    with closing(opened) as file:
        entries = _grouped(members(file, size))
    if not entries:
        entries = [Entry("", reason="empty tar", detail=f"{size} bytes without a member")]
    return entries


def _grouped(found: Iterable[Member | Damage]) -> list[Entry]:
    entries: list[Entry] = []
    dotted: dict[str, Entry] = {}
    beside: list[Entry] = []  # next to damage
    open_entry: Entry | None = None
    after_damage = False
    for item in found:
        if isinstance(item, Damage):
            beside += [open_entry] if open_entry else []
            after_damage = True
            entries.append(Entry(f"@{item.offset}", reason="damaged tar", detail=item.detail))
            continue
        key, extension = _split(item.name)
        if "." in extension and key and not _UNSAFE.search(item.name):
            stem, _, last = f"{key}.{extension}".rpartition(".")
            dotted.setdefault(stem, Entry(stem)).members[last] = (item.offset, item.size)
            continue
        if open_entry is None or open_entry.key != key or extension in open_entry.members or not extension:
            open_entry = Entry(key if extension else item.name)
            entries.append(open_entry)
            beside += [open_entry] if after_damage else []
        after_damage = False
        open_entry.members[extension] = (item.offset, item.size)
        _judge(open_entry, item, extension)
    entries = _joined(entries)
    _check_neighbours(entries, beside)
    owners = {e.key: e for e in reversed(entries) if any(ext in PICTURES for ext in e.members)}
    for entry in dotted.values():
        key = _split(f"{entry.key}.x")[0]
        if owner := owners.get(key):  # a further member of that sample, such as key.mask.png
            owner.members |= {f"{entry.key[len(key) + 1 :]}.{ext}": place for ext, place in entry.members.items()}
        else:
            entry.reject("dotted name", "webdataset would cut the key at the first dot")
            entries.append(entry)
    return entries


def _judge(entry: Entry, member: Member, extension: str) -> None:
    if _UNSAFE.search(member.name):
        entry.reject("unsafe name", repr(member.name)[:200])
    if member.flaw:
        entry.reject("cut short" if member.flaw == "cut short" else "not a plain file", member.flaw)
    if not extension:
        entry.reject("not a sample", "no key.extension")


def _joined(entries: list[Entry]) -> list[Entry]:
    """Entries of the same key: joined where they are parts of one sample, else all but the first rejected."""
    first: dict[str, Entry] = {}
    kept = []
    for entry in entries:
        earlier = first.setdefault(entry.key, entry)
        if earlier is entry:
            kept.append(entry)
        elif entry.members.keys() & earlier.members.keys():
            entry.reject("duplicate key", "")
            kept.append(entry)
        else:
            earlier.members |= entry.members
            earlier.reject(entry.reason or "members not adjacent", entry.detail)
    return kept


def _check_neighbours(entries: list[Entry], beside: list[Entry]) -> None:
    """Beside damage a sample counts as whole only with every kind of member that the others have."""
    near = {id(e) for e in beside}
    usual = {ext for e in entries if not e.reason and id(e) not in near for ext in e.members}
    for entry in beside:
        if lacking := sorted(usual - entry.members.keys()):
            entry.reject("damaged tar", f"beside damage, and without {', '.join(lacking)}")


def _split(name: str) -> tuple[str, str]:
    """A member's name -> key (with its folders) and extension; ("", "") or no extension where it has none."""
    folder, slash, last = name.removeprefix("./").rpartition("/")
    key, _, extension = last.partition(".")
    return (f"{folder}{slash}{key}", extension.lower()) if key and extension else (name, "")


def to_json(entries: list[Entry]) -> bytes:
    """Entries as `from_json` reads them back."""
    return json.dumps([asdict(e) for e in entries], separators=(",", ":")).encode()


def from_json(data: bytes) -> list[Entry]:
    """What `to_json` wrote. Raises ValueError, TypeError or KeyError for anything else."""
    found = [Entry(**e) for e in json.loads(data)]
    for entry in found:
        entry.members = {ext: (int(offset), int(size)) for ext, (offset, size) in entry.members.items()}
    return found
