"""What the tests of sources make and compare with."""

import hashlib
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipeline.sources import Rejected, Source

# Opens a source in a fresh process and prints a hash of all that it gives.
ELSEWHERE = """
import pickle, sys
from tests.data_pipeline.makers import digest
print(digest(pickle.load(open(sys.argv[1], "rb"))))
"""


def png(seed: int = 0, size: tuple[int, int] = (6, 5)) -> bytes:
    """A noise picture as a PNG."""
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def described(source: Source) -> list[tuple[Any, ...]]:
    """Every row in order: (name, key, captions, meta, pixels) or (name, reason, detail)."""
    return [row(source, i) for i in range(len(source))]


def row(source: Source, index: int) -> tuple[Any, ...]:
    """One row of `described`."""
    try:
        sample = source[index]
    except Rejected as rejected:
        return source.name(index), rejected.reason, rejected.detail
    return source.name(index), sample.key, sample.captions, sample.meta, sample.image.tobytes()


def verdicts(source: Source) -> dict[str, Any]:
    """Name -> captions, or the reason of the rejection; names must differ."""
    found = {r[0]: r[2] if len(r) == 5 else r[1] for r in described(source)}
    assert len(found) == len(source)
    return found


def digest(source: Source) -> str:
    """A hash of everything a source gives."""
    return hashlib.sha256(repr(described(source)).encode()).hexdigest()


def check_random_access(source: Source, folder: Path) -> None:
    """Rows asked for in any order, of a copy, and in another process are those read in order."""
    import pickle

    in_order = described(source)
    copy = pickle.loads(pickle.dumps(source))
    for index in np.random.default_rng(0).permutation(len(source)):
        assert row(copy, int(index)) == in_order[index]
    assert copy.fingerprint == source.fingerprint
    pickled = folder / ".source.pickle"
    pickled.write_bytes(pickle.dumps(source))
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", ELSEWHERE, str(pickled)]
    said = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=120, check=False)
    assert said.stdout.strip() == digest(source), said.stderr[-2000:]
    pickled.unlink()
