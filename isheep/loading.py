"""From TOML files and "section.key=value" texts to a frozen dataclass, and back.

Works on any dataclass of plain values and nested dataclasses. A key or a value that cannot be right is a `UserError`
of one sentence that names the nearest key, the choices or the type. Also the home of `UserError` itself.
"""

import dataclasses
import difflib
import json
import tomllib
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

C = TypeVar("C")
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "text in quotes", dict: "a table"}


class UserError(ValueError):
    """A mistake the user can mend: one clear sentence with the value, the choices or the nearest, and the way out."""


def did_you_mean(name: str, choices: Iterable[str]) -> str:
    """' Did you mean "x"?' when a choice is close to `name`, else ' Choose from: a, b, c.'"""
    choices = list(choices)
    lowered = {choice.lower(): choice for choice in choices}
    near = difflib.get_close_matches(name.lower(), lowered, n=1)
    return f' Did you mean "{lowered[near[0]]}"?' if near else f" Choose from: {', '.join(choices)}."


def load_config(cls: type[C], *sources: Mapping[str, Any] | Path, overrides: Sequence[str] = ()) -> C:
    """Merge TOML files (`Path`) and mappings in order, then "a.b=value" overrides, into one `cls`.

    An override's value is read as TOML and taken as plain text where that fails: lr=1e-4, device=cpu. An optional key
    is set back to None by the text "none". Lists become tuples, whole numbers become floats where a float is meant.
    """
    return _build(cls, merge(cls, *sources, overrides=overrides), "")


def merge(cls: type, *sources: Mapping[str, Any] | Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """What the sources say, the last word on each dotted key, its value as it stands; see `load_config`."""
    hints = dict(_dotted_hints(cls))
    merged: dict[str, Any] = {}  # dotted key -> value
    for source in sources:
        layer, where = (_read_toml(source), f" in {source}") if isinstance(source, Path) else (source, "")
        merged.update(_flatten(layer, hints, where))
    for text in overrides:
        merged.update(_flatten(_parse_override(text), hints, ""))
    return merged


def settings(cfg: Any) -> dict[str, Any]:
    """A section as a nested dict of plain values (tuples as lists), as JSON and TOML can hold it."""
    return {f.name: _plain(getattr(cfg, f.name)) for f in dataclasses.fields(cfg)}


def to_toml(cfg: Any) -> str:
    """The TOML text that `load_config` reads back to an equal section. None is written by leaving the key out."""
    return "\n".join(_toml_lines(settings(cfg), ())) + "\n"


def as_overrides(layer: Mapping[str, Any], prefix: str = "") -> list[str]:
    """A nested layer of settings as "section.key=value" texts, which `load_config` reads back."""
    texts = []
    for name, value in layer.items():
        nested = isinstance(value, Mapping)
        texts += as_overrides(value, f"{prefix}{name}.") if nested else [f"{prefix}{name}={_toml_value(value)}"]
    return texts


def diff(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Dotted keys whose values differ between two nested dicts, or that only one of them has; sorted."""
    keys: list[str] = []
    missing = object()
    for key in sorted(a.keys() | b.keys()):
        left, right = a.get(key, missing), b.get(key, missing)
        if isinstance(left, Mapping) and isinstance(right, Mapping):
            keys += [f"{key}.{inner}" for inner in diff(left, right)]
        elif left is missing or right is missing or left != right:
            keys.append(key)
    return keys


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return settings(value)
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    """Scalars first, then one [table] for each mapping, as TOML's order demands."""
    for key, value in table.items():
        if value is not None and not isinstance(value, Mapping):
            yield f"{key} = {_toml_value(value)}"
    for key, value in table.items():
        if isinstance(value, Mapping):
            yield f"\n[{'.'.join((*path, key))}]"
            yield from _toml_lines(value, (*path, key))


def _toml_value(value: Any) -> str:
    if isinstance(value, str):  # JSON's escapes are TOML's, but for DEL
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    return str(value).lower() if isinstance(value, bool) else repr(value)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as err:
        raise UserError(f"cannot read the configuration {path}: {err.strerror}.") from err
    except ValueError as err:  # broken TOML, or bytes that are no UTF-8
        raise UserError(f"{path} is not valid TOML: {err}.") from err


def _parse_override(text: str) -> dict[str, Any]:
    """'train.r=4' -> {"train": {"r": 4}}"""
    key, equals, raw = text.partition("=")
    parts = [part.strip() for part in key.split(".")]
    if not equals or not all(parts):
        raise UserError(f'"{text}" is no setting: write key=value or section.key=value, for example train.r=4.')
    try:
        value = tomllib.loads(f"value = {raw.strip()}")
        nested: Any = value["value"] if len(value) == 1 else raw.strip()
    except tomllib.TOMLDecodeError:
        nested = raw.strip()
    for part in reversed(parts):
        nested = {part: nested}
    return nested


def _dotted_hints(cls: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Each key that may be set, with its type: ("train.r", int), ..."""
    for name, hint in typing.get_type_hints(cls).items():
        if dataclasses.is_dataclass(hint):
            yield from _dotted_hints(hint, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def _flatten(
    layer: Mapping[str, Any], hints: Mapping[str, Any], where: str, prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    """Nested mappings -> (dotted key, value); `where` names the layer's file in an error."""
    for name, value in layer.items():
        key = prefix + name
        if key in hints:
            yield key, value
        elif isinstance(value, Mapping) and any(known.startswith(f"{key}.") for known in hints):
            yield from _flatten(value, hints, where, f"{key}.")
        else:
            raise _unknown_key(key, list(hints), where)


def _unknown_key(key: str, known: list[str], where: str) -> UserError:
    section, _, leaf = key.rpartition(".")
    inside = [k for k in known if k.startswith(f"{key}.")]
    if inside:
        return UserError(f'"{key}" is a section{where}, not a value: set its keys, such as {inside[0]}.')
    twins = [k for k in known if k.rpartition(".")[2] == leaf]
    neighbours = [k for k in known if k.rpartition(".")[0] == section]
    near = difflib.get_close_matches(key, known, n=1) or difflib.get_close_matches(leaf, known, n=1)
    if twins:  # the right name in the wrong section
        near = twins
    hint = f" Did you mean {' or '.join(near)}?" if near else did_you_mean(key, neighbours or known)
    return UserError(f'unknown setting "{key}"{where}.{hint}')


def _build(cls: type[C], flat: Mapping[str, Any], prefix: str) -> C:
    kwargs = {}
    hints = typing.get_type_hints(cls)
    for f in dataclasses.fields(cls):  # type: ignore[arg-type]
        key = prefix + f.name
        if dataclasses.is_dataclass(hints[f.name]):
            kwargs[f.name] = _build(hints[f.name], flat, f"{key}.")
        elif key in flat:
            kwargs[f.name] = _convert(flat[key], hints[f.name], key)
        elif f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING:
            raise UserError(f"{key} is not given: pass --{key}, or write {key} = ... in the configuration.")
    return cls(**kwargs)


def _convert(value: Any, hint: Any, key: str) -> Any:
    """`value` as the type `hint`, or a UserError that says what was expected."""
    args = typing.get_args(hint)
    if isinstance(hint, types.UnionType):  # only X | None is used
        return None if value is None or value == "none" else _convert(value, args[0], key)
    if typing.get_origin(hint) is tuple:
        fixed = Ellipsis not in args
        if not isinstance(value, list | tuple) or (fixed and len(value) != len(args)):
            raise UserError(f"{key} must be a list{f' of {len(args)}' if fixed else ''}, not {value!r}.")
        return tuple(_convert(item, args[0], key) for item in value)
    if hint is float and type(value) is int:
        return float(value)
    if type(value) is not hint:
        raise UserError(f"{key} must be {TYPE_WORDS[hint]}, not {value!r}.")
    return value
