"""YAML files and `a.b=c` overrides -> dataclasses. The only importer of omegaconf."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, fields, is_dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeVar

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

T = TypeVar("T")


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A hint for an error message: the nearest known word, and all of them."""
    known = list(known)
    near = get_close_matches(word, known, n=1)
    return (f"; did you mean {near[0]!r}? " if near else "; ") + f"Known: {', '.join(known)}"


def load_config(schema: type[T], files: Sequence[str | Path], overrides: Sequence[str]) -> T:
    """An instance of the dataclass `schema` from YAML files, later ones winning, then `a.b=c` overrides.

    A field declared with `metadata={"kinds": {word: dataclass}}` takes the dataclass that its own
    `kind:` names, so a file can choose among known classes and never import one.
    Unknown keys, wrong types and missing values raise ValueError, one line each.
    """
    raw: Any = OmegaConf.create({})
    try:
        for file in files:
            raw = OmegaConf.merge(raw, _read_yaml(Path(file)))
        for override in overrides:
            key, equals, value = override.partition("=")
            if not equals or not key:
                raise ValueError(f"an override is written key=value, not {override!r}")
            OmegaConf.update(raw, key, yaml.safe_load(value) if value else "", merge=True)
        if "${" in OmegaConf.to_yaml(raw):
            # A config may come from a stranger; resolvers such as oc.env would leak our environment into it.
            raise ValueError("'${...}' is not supported in configs")
        kinds = _chosen_kinds(schema, raw)
        merged = OmegaConf.merge(OmegaConf.structured(schema), kinds, raw)
        return OmegaConf.to_object(merged)  # type: ignore[return-value]
    except MissingMandatoryValue as error:
        key = getattr(error, "full_key", None) or str(error).splitlines()[0]
        raise ValueError(f"config: {key!r} must be given") from error
    except OmegaConfBaseException as error:
        where = f" (at {error.full_key!r})" if getattr(error, "full_key", None) else ""
        raise ValueError(f"config: {str(error).splitlines()[0]}{where}") from error
    except TypeError as error:
        # OmegaConf's answer to `a.0=x` where the schema holds a list: a list is given whole.
        raise ValueError(f"config: {error}; a list is given whole, as in key=[1,2,4]") from error
    except yaml.YAMLError as error:
        raise ValueError(f"config: not valid YAML: {' '.join(str(error).split())}") from error


def to_yaml(config: Any) -> str:
    """The config as YAML that `load_config` reads back to an equal one."""
    return yaml.safe_dump(plain(config), sort_keys=False)


def plain(config: Any) -> Any:
    """A dataclass as JSON-able dicts, lists and scalars."""
    value = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    return [plain(v) for v in value] if isinstance(value, list | tuple) else value


def _read_yaml(path: Path) -> Any:
    if not path.is_file():
        raise ValueError(f"no config file {str(path)!r}")
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"config file {str(path)!r} is not UTF-8") from error
    if data is not None and not isinstance(data, dict):
        raise ValueError(f"config file {str(path)!r} must hold keys and values, not a {type(data).__name__}")
    return OmegaConf.create(data or {})


def _chosen_kinds(schema: Any, raw: Any) -> Any:
    chosen = {}
    for field in fields(schema):
        kinds = field.metadata.get("kinds")
        if not kinds:
            continue
        kind = OmegaConf.select(raw, f"{field.name}.kind")
        if kind is None:
            raise ValueError(f"config: '{field.name}.kind' must be given: one of {', '.join(kinds)}")
        if kind not in kinds:
            raise ValueError(f"config: unknown {field.name}.kind {kind!r}{did_you_mean(str(kind), kinds)}")
        chosen[field.name] = OmegaConf.structured(kinds[kind])
    return OmegaConf.create(chosen)
