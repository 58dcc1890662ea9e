"""Adapters by name: those in a folder, those that prompts ask for, and those that are on a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import nn

from ldm.adapters import lora
from ldm.adapters.adapter import Adapter, check_fit
from ldm.adapters.files import read
from ldm.checkpoints.files import sha256
from ldm.checkpoints.foreign import FILES
from ldm.names import known

Wanted = tuple[tuple[str, float], ...]
"""Names of adapters, each with its weight, in the order of asking."""


def adapters_in(folder: str | Path) -> dict[str, Path]:
    """The adapters in a folder and below, by file name without suffix, and folders of peft by theirs.

    Raises ValueError for a path that is no folder, and for two adapters of one name.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder of adapters")
    peft = [path.parent for path in folder.rglob("adapter_config.json")]
    files = [path for path in folder.rglob("*") if path.suffix in FILES and path.parent not in peft]
    found: dict[str, Path] = {}
    for path in sorted([*files, *peft]):
        name = path.stem if path.is_file() else path.name
        if name in found:
            raise ValueError(f"{found[name]} and {path} are two adapters of one name")
        found[name] = path
    return found


class Library:
    """What may be put on the components of a model, and what is on them now.

    paths: where adapters are, by the names that prompts call them. Each is read once, when it is first asked for.
    """

    def __init__(self, components: Mapping[str, nn.Module]) -> None:
        self.components = components
        self.paths: dict[str, Path] = {}
        self._always: dict[str, float] = {}  # on for every picture
        self._read: dict[str, Adapter] = {}
        self._hashes: dict[str, str] = {}

    def put_on(self, path: str | Path, weight: float = 1.0) -> None:
        """Have an adapter on for every picture. Raises ValueError for one that does not fit the model."""
        path = Path(path)
        name = path.stem if path.is_file() else path.name
        if self.paths.get(name, path) != path:
            raise ValueError(f"{self.paths[name]} and {path} are two adapters of one name")
        self.paths[name] = path
        self._always[name] = weight
        self.check(((name, weight),))
        self.use(())

    def check(self, wanted: Wanted) -> None:
        """Raise ValueError for an adapter that is not there, or is for another model."""
        for name, _ in wanted:
            self._adapter(name)

    def all_of(self, wanted: Wanted) -> dict[str, float]:
        """Those that are always on and those that are asked for; of what is asked for twice the weights add up."""
        weights = dict(self._always)
        for name, weight in wanted:
            weights[name] = weights.get(name, 0.0) + weight
        return weights

    def use(self, wanted: Wanted) -> None:
        """Have on what is always on and these, and nothing else."""
        weights, there = self.all_of(wanted), lora.attached(self.components)
        if list(weights.items()) == list(there.items()):
            return
        for name in there:  # also those that stay: sums are rounded, and must not depend on what was on before
            lora.detach(self.components, name)
        for name, weight in weights.items():
            lora.attach(self.components, self._adapter(name), weight, name)

    def hashes(self, wanted: Wanted) -> str:
        """ "name: hash, ..." of all that `use` has on: the first 12 digits of the sha256 of each file."""
        names = self.all_of(wanted)
        return ", ".join(f"{name}: {self._hash(name)}" for name in names)

    def _adapter(self, name: str) -> Adapter:
        if name not in self._read:
            if not self.paths:
                raise ValueError(f"the prompt asks for the adapter {name!r}, and no folder of adapters was given")
            known("adapter", name, self.paths)
            adapter = read(self.paths[name], self.components)
            try:
                check_fit(adapter, self.components)
            except ValueError as error:
                raise ValueError(f"{self.paths[name]}: {error}") from error
            self._read[name] = adapter
        return self._read[name]

    def _hash(self, name: str) -> str:
        if name not in self._hashes:
            path = self.paths[name]
            file = path if path.is_file() else next(path.glob("adapter_model.*"))
            self._hashes[name] = sha256(file)[:12]
        return self._hashes[name]


def same_for_all(wanted: Sequence[Wanted]) -> Wanted:
    """What the prompts of one batch ask for. Raises ValueError unless it is the same."""
    first, *others = wanted
    for other in others:
        if sorted(other) != sorted(first):
            raise ValueError(
                "the prompts of one batch ask for different adapters: draw them with batch=1, or one after the other"
            )
    return first
