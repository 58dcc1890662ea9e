"""Adapters by name: those in a folder, those that prompts ask for, and those that are on a model."""

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from ldm.adapters import bundled, lora
from ldm.adapters.adapter import Adapter, Words, check_fit
from ldm.adapters.files import DIFFUSERS_FILE, read
from ldm.adapters.peft_folder import CONFIG, PLACES
from ldm.adapters.textual_inversion import forget, learned_words, teach
from ldm.checkpoints.files import sha256
from ldm.checkpoints.foreign import FILES
from ldm.checkpoints.textual_inversion import EMBEDDINGS
from ldm.names import known

log = logging.getLogger(__name__)

Wanted = tuple[tuple[str, float], ...]
"""Names of adapters, each with its weight, in the order of asking."""


def adapters_in(folder: str | Path) -> dict[str, Path]:
    """The adapters in a folder and below, by name: of a file that without suffix, or of a folder of peft or diffusers.

    A folder of peft's has its configuration in itself, or one in a folder of its own for each network. Folders named
    embeddings hold words, which are not meant. Raises ValueError for a path that is no folder, and for two adapters of
    one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of adapters")
    peft = {path.parent for path in folder.rglob(CONFIG)}
    whole = {path.parent if path.name in PLACES and path != folder else path for path in peft}
    whole |= {path.parent for path in folder.rglob(DIFFUSERS_FILE)}
    files = [path for path in folder.rglob("*") if path.suffix in FILES and path.parent not in whole | peft]
    files = [path for path in files if EMBEDDINGS not in path.relative_to(folder).parts[:-1]]
    found: dict[str, Path] = {}
    for path in sorted([*files, *whole]):
        name = _name_of(path)
        if name in found:
            raise ValueError(f"{found[name]} and {path} are two adapters of one name")
        found[name] = path
    return found


class Library:
    """What may be put on the components of a model, and what it has put on them now.

    paths: where adapters are, by the names that prompts call them. Each is read once, when it is first asked for.
    What others attach to the model stays on, and the words that others taught its text encoder stay what they are.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self.components = components
        self.paths: dict[str, Path] = {}
        self._always: dict[str, tuple[Path, float]] = {}  # on for every picture
        self._on: dict[str, tuple[Path, float]] = {}  # put on by the library
        self._attached: dict[str, float] = {}  # all that was on the model after that
        self._taught: dict[str, tuple[Tensor, ...]] = {}  # what the text encoder learned from those that are on
        self._read: dict[Path, Adapter] = {}
        self._hashes: dict[Path, str] = {}

    def put_on(self, path: str | Path, weight: float = 1.0) -> None:
        """Have an adapter on for every picture.

        Raises ValueError, changing nothing, for one that does not fit the model or what is on for every picture.
        """
        path = Path(path)
        name = _name_of(path)
        if self.paths.get(name, path) != path:
            raise ValueError(f"{self.paths[name]} and {path} are two adapters of one name")
        self._check(name, path)
        self._words_of({**self._always, name: (path, weight)})
        self.paths = {**self.paths, name: path}
        self._always[name] = path, weight
        self.use(())

    def check(self, wanted: Wanted) -> None:
        """Raise ValueError for an adapter that is not there, is for another model, or has the name of another.

        And for two that bring one word, with different vectors.
        """
        weights = self._all_of(wanted)
        for name, (path, _) in weights.items():
            self._check(name, path)
        self._words_of(weights)

    def use(self, wanted: Wanted) -> None:
        """Have on what is always on and these, after what others attached. Raises ValueError as `check` does.

        The text encoder knows their words for as long; of one that others taught it, theirs stands, with a warning.

        The sums of weights are rounded. So all that the library has put on is taken off first, also what stays: what
        is on now must not depend on what was on before.
        """
        weights, there = self._all_of(wanted), lora.attached(self.components)
        same = [*weights.items()] == [*self._on.items()] and [*there.items()] == [*self._attached.items()]
        if same and self._knows_words_of(weights):
            return
        self.check(wanted)
        while self._on:
            name, _ = self._on.popitem()
            if name in there:
                lora.detach(self.components, name)
        self._forget()
        for name, (path, weight) in weights.items():
            lora.attach(self.components, self._adapter(path), weight, name)
            self._on[name] = path, weight
        self._teach(self._words_of(weights))
        self._attached = lora.attached(self.components)

    @contextmanager
    def teaching(self, wanted: Wanted) -> Iterator[None]:
        """The text encoder knows the words of these meanwhile, without their change of weights: for counting tokens.

        Raises ValueError for an adapter that is not there or does not fit, and as `check` does for its words.
        """
        text, words = self.components["text"], self._words_of(self._all_of(wanted))
        new = {word: vectors for word, vectors in words.items() if word.lower() not in learned_words(text)}
        for word, vectors in new.items():
            teach(text, word, vectors)
        try:
            yield
        finally:
            for word in new:
                forget(text, word)

    def _words_of(self, weights: Mapping[str, tuple[Path, float]]) -> Words:
        return bundled.united(self._adapter(path).words for path, _ in weights.values())

    def _knows_words_of(self, weights: Mapping[str, tuple[Path, float]]) -> bool:
        """Whether the text encoder knows every word of these, and what it was taught for them as it was taught."""
        known = all(word.lower() in learned_words(self.components["text"]) for word in self._words_of(weights))
        return known and all(bundled.knows(self.components["text"], *taught) for taught in self._taught.items())

    def _teach(self, words: Words) -> None:
        for word, vectors in words.items():
            if word.lower() in learned_words(self.components["text"]):
                log.warning("the word %r is known already; what an adapter brings for it is left out", word)
                continue
            teach(self.components["text"], word, vectors)
            self._taught[word] = vectors

    def _forget(self) -> None:
        """What it taught, but for words that others took away or taught anew meanwhile."""
        for word, vectors in self._taught.items():
            if bundled.knows(self.components["text"], word, vectors):
                forget(self.components["text"], word)
        self._taught = {}

    def hashes(self, wanted: Wanted) -> str:
        """ "name: hash, ..." of all that `use` has on: the first 12 digits of the sha256 of each one's files."""
        return ", ".join(f"{name}: {self._hash(path)}" for name, (path, _) in self._all_of(wanted).items())

    def _all_of(self, wanted: Wanted) -> dict[str, tuple[Path, float]]:
        """Those that are always on and those that are asked for; of what is asked for twice the weights add up."""
        found = dict(self._always)
        for name, weight in wanted:
            if not self.paths:
                raise ValueError(f"the prompt asks for the adapter {name!r}, and no folder of adapters was given")
            path = self.paths[known("adapter", name, self.paths)]
            on, already = found.get(name, (path, 0.0))
            if on != path:
                raise ValueError(f"{on} and {path} are two adapters of one name")
            found[name] = path, already + weight
        return found

    def _check(self, name: str, path: Path) -> None:
        if name not in self._on and name in lora.attached(self.components):
            raise ValueError(f"an adapter named {name!r} is attached to the model already; detach it first")
        self._adapter(path)

    def _adapter(self, path: Path) -> Adapter:
        if path not in self._read:
            adapter = read(path, self.components)
            try:
                check_fit(adapter, self.components)
                bundled.check_fit(adapter.words, self.components.get("text"))
            except ValueError as error:
                raise ValueError(f"{path}: {error}") from error
            self._read[path] = adapter
        return self._read[path]

    def _hash(self, path: Path) -> str:
        if path not in self._hashes:
            self._hashes[path] = (sha256(path) if path.is_file() else _sha256_of_all(path))[:12]
        return self._hashes[path]


def same_for_all(wanted: Sequence[Wanted]) -> Wanted:
    """What the prompts of one batch ask for. Raises ValueError unless it is the same."""
    first, *others = wanted
    for other in others:
        if sorted(other) != sorted(first):
            raise ValueError(
                "the prompts of one batch ask for different adapters: draw them with batch=1, or one after the other"
            )
    return first


def _name_of(path: Path) -> str:
    return path.name if path.is_dir() else path.stem


def _sha256_of_all(folder: Path) -> str:
    """The sha256 of a line a file in a folder and below, in order: its name and sha256."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    lines = (f"{file.relative_to(folder).as_posix()} {sha256(file)}\n" for file in files)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
