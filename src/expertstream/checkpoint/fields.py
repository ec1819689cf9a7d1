"""Validates config.json: every value that a model takes from it is checked for type and range, and errors name both."""

from __future__ import annotations

from typing import Any

from ..errors import CheckpointError

__all__ = ["Fields"]

_MAX_SIZE = 1 << 40


class Fields:
    """The fields of one object of config.json. where: the checkpoint, for errors. Every method raises CheckpointError."""

    def __init__(self, values: Any, where: str, name: str = "") -> None:
        self._where, self._prefix = where, f"{name}." if name else ""
        if not isinstance(values, dict):
            raise CheckpointError(f"{where}: config.json: {name or 'the file'} must be an object; got {values!r}")
        self.values: dict[str, Any] = values

    def error(self, what: str) -> CheckpointError:
        """what: begins with a field's name."""
        return CheckpointError(f"{self._where}: config.json: {self._prefix}{what}")

    def inner(self, name: str) -> Fields:
        """The fields of a nested object; these fields themselves if there is none of that name."""
        return Fields(self.values[name], self._where, f"{self._prefix}{name}") if name in self.values else self

    def size(self, name: str) -> int:
        """An integer from 1 to 2**40."""
        value = self.values.get(name)
        if type(value) is not int or not 1 <= value <= _MAX_SIZE:
            raise self.error(f"{name} must be an integer from 1 to 2**40; got {value!r}")
        return value

    def number(self, name: str, above: float, most: float, default: float | None = None) -> float:
        """A number greater than `above` and at most `most`; null is the default if there is one."""
        value = self.values.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, int | float) or not above < value <= most:
            raise self.error(f"{name} must be greater than {above:g} and at most {most:g}; got {value!r}")
        return float(value)

    def flag(self, name: str, default: bool) -> bool:
        value = self.values.get(name, default)
        if type(value) is not bool:
            raise self.error(f"{name} must be true or false; got {value!r}")
        return value

    def fixed(self, **expected: Any) -> None:
        """Checks fields that may be missing or null, and otherwise must have the one supported value."""
        for name, value in expected.items():
            found = self.values.get(name)
            if found is not None and found != value:
                raise self.error(f"{name} is {found!r}; only {value!r} is supported")

    def multiple(self, name: str, of: str) -> None:
        """Checks that one size is a multiple of another."""
        if self.size(name) % self.size(of):
            raise self.error(f"{name} ({self.size(name)}) must be a multiple of {of} ({self.size(of)})")

    def layer_types(self, *known: str) -> tuple[str, ...]:
        """The list layer_types, which has one of the known names for each layer."""
        layers, kinds = self.size("num_hidden_layers"), self.values.get("layer_types")
        if not isinstance(kinds, list) or len(kinds) != layers or any(kind not in known for kind in kinds):
            raise self.error(f"layer_types must name {' or '.join(known)} for each of {layers} layers")
        return tuple(kinds)
