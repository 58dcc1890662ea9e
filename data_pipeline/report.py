"""What a build delivered and what it turned away, as JSON and as a readable table."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from typing import Any

EXAMPLES = 5


@dataclass
class Rejections:
    """How many samples had one reason, and the first few of them by name."""

    count: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class Range:
    """Count, sum and extremes of a whole number."""

    count: int = 0
    total: int = 0
    low: int = 0
    high: int = 0

    def add(self, other: "Range") -> None:
        """Take in the numbers of another range."""
        if other.count:
            self.low = min(self.low, other.low) if self.count else other.low
            self.high = max(self.high, other.high) if self.count else other.high
            self.count += other.count
            self.total += other.total

    @staticmethod
    def of(value: int) -> "Range":
        """The range of one number."""
        return Range(1, value, value, value)

    def __str__(self) -> str:
        return f"{self.low} .. {self.high}, mean {self.total / max(self.count, 1):.1f}"


@dataclass
class Report:
    """Delivered + rejected = rows of the source, always. Sizes are those before resizing, in pixels."""

    delivered: int = 0
    rejected: dict[str, Rejections] = field(default_factory=dict)
    bytes: int = 0
    seconds: float = 0.0
    kept_shards: int = 0
    captions: Range = field(default_factory=Range)
    words: Range = field(default_factory=Range)
    width_px: Range = field(default_factory=Range)
    height_px: Range = field(default_factory=Range)

    @staticmethod
    def of(samples: Iterable[dict[str, Any]], rejected: Iterable[dict[str, Any]]) -> "Report":
        """The counts of one shard's index; samples of version 1 do not say their sizes and captions."""
        report = Report()
        for sample in samples:
            report.delivered += 1
            if "size" in sample:
                width, height = sample.get("original", sample["size"])
                report.captions.add(Range.of(sample["captions"]))
                report.words.add(Range.of(sample["words"]))
                report.width_px.add(Range.of(width))
                report.height_px.add(Range.of(height))
        for row in rejected:
            name, detail = row["name"], row["detail"]
            example = (detail or name) if name in detail or not detail else f"{name} ({detail})"
            report._reject(row["reason"], 1, [example])
        return report

    def add(self, other: "Report") -> None:
        """Take in the numbers of another report."""
        self.delivered += other.delivered
        self.bytes += other.bytes
        self.seconds += other.seconds
        self.kept_shards += other.kept_shards
        for name in ("captions", "words", "width_px", "height_px"):
            getattr(self, name).add(getattr(other, name))
        for reason, rejections in other.rejected.items():
            self._reject(reason, rejections.count, rejections.examples)

    def _reject(self, reason: str, count: int, examples: Iterable[str]) -> None:
        entry = self.rejected.setdefault(reason, Rejections())
        entry.count += count
        entry.examples = [*entry.examples, *examples][:EXAMPLES]

    @property
    def rejected_count(self) -> int:
        """Samples turned away, for every reason together."""
        return sum(r.count for r in self.rejected.values())

    def to_json(self) -> dict[str, Any]:
        """Plain data; `from_json` turns it back."""
        return asdict(self)

    @staticmethod
    def from_json(data: dict[str, Any]) -> "Report":
        """The report `to_json` described; what else is in the file is left alone."""
        ranges: dict[str, Any] = {k: Range(**data[k]) for k in ("captions", "words", "width_px", "height_px")}
        rejected = {reason: Rejections(**r) for reason, r in data["rejected"].items()}
        own: dict[str, Any] = {name: data[name] for name in ("delivered", "bytes", "seconds", "kept_shards")}
        return Report(**own, **ranges, rejected=rejected)

    @property
    def reasons(self) -> str:
        """The reasons for rejection with their counts, on one line, the most frequent first."""
        ordered = sorted(self.rejected.items(), key=lambda item: -item[1].count)
        return "; ".join(f"{reason}: {r.count}, such as {r.examples[0]}" for reason, r in ordered) or "none"

    def __str__(self) -> str:
        rows = [
            ("delivered", f"{self.delivered} samples, {self.bytes / 1e6:.1f} MB, {self.seconds:.1f} s"),
            ("captions", f"{self.captions} a sample"),
            ("words", f"{self.words} in the main caption"),
            ("original width", f"{self.width_px} px"),
            ("original height", f"{self.height_px} px"),
            ("rejected", f"{self.rejected_count} samples"),
        ]
        if self.kept_shards:
            rows.insert(1, ("kept", f"{self.kept_shards} shards were complete already"))
        for reason, r in sorted(self.rejected.items(), key=lambda item: -item[1].count):
            rows.append((f"  {reason}", f"{r.count}, such as {'; '.join(r.examples)}"))
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name:<{width}}  {text}" for name, text in rows)
