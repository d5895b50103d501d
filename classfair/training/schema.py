"""What is read from a file is checked before it is used: a damaged or forged one gives one sentence."""

from __future__ import annotations

import gzip
import json
import os
import stat
import zlib
from pathlib import Path
from types import UnionType
from typing import Any

from torch import Tensor

Number = int | float
MAX_BYTES = 2**30  # of a JSON file; its list of ten million images has less


class CheckpointError(ValueError):
    """A run folder or checkpoint that cannot be gone on with."""


def read_json(path: Path, schema: Any, version: int) -> dict[str, Any]:
    """A JSON file of ours, compressed if it is called so; CheckpointError for any other."""
    content = _parse(path)
    found = content.get("format_version") if isinstance(content, dict) else None
    if type(found) is not int or found != version:
        raise CheckpointError(f"expected {path} of format {version}, got {found if found is None else short(found)}")
    check(content, schema, str(path))
    return content


def _parse(path: Path) -> Any:
    try:
        check_regular(path)
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) > MAX_BYTES:
            raise CheckpointError(f"expected at most {MAX_BYTES} bytes in {path}, got more")
        return json.loads(text)
    except CheckpointError:
        raise
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"expected a JSON file, got {path} ({reason})") from None


def check_regular(path: Path) -> None:
    """CheckpointError for a pipe or device, which might be read for ever."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise CheckpointError(f"expected a regular file, got {path}")


def check(value: Any, schema: Any, where: str) -> None:
    """CheckpointError where a value is not of a schema; ``where`` names it.

    Args:
        value: of plain types and tensors.
        schema: a type or a union of types, where a bool is no int; a tensor: its dtype and shape; a list of one schema:
            that of every item; a tuple of schemas: of the items; a dict with a type as its key: of every value; another
            dict: of the values of these names, which must be there. Others may be.
    """
    if isinstance(schema, Tensor):
        fits = isinstance(value, Tensor) and (value.dtype, value.shape) == (schema.dtype, schema.shape)
        _expect(fits, f"a tensor of {tuple(schema.shape)} {schema.dtype}", value, where)
    elif isinstance(schema, list | tuple):
        several = isinstance(value, list | tuple)
        fits = several and (isinstance(schema, list) or len(value) == len(schema))
        _expect(fits, "a list" if isinstance(schema, list) else f"{len(schema)} values", value, where)
        for i, item in enumerate(value):
            check(item, schema[0] if isinstance(schema, list) else schema[i], f"{where}, item {i}")
    elif isinstance(schema, dict):
        _expect(isinstance(value, dict), "named values", value, where)
        any_name = next((name for name in schema if isinstance(name, type)), None)
        for name in value if any_name else schema:
            _expect(any_name is None or type(name) is any_name, "names", name, where)
            if name not in value:
                raise CheckpointError(f"expected {name} in {where}, got none")
            check(value[name], schema[any_name if any_name else name], f"{name} of {where}")
    elif schema is not object:
        known = schema.__args__ if isinstance(schema, UnionType) else (schema,)
        _expect(type(value) in known, " or ".join(kind.__name__ for kind in known), value, where)


def schema_of(value: Any) -> Any:
    """The schema of a value: what has another number of items, other names, types or shapes is none of it."""
    if isinstance(value, dict):
        return {name: schema_of(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return tuple(schema_of(item) for item in value)
    if isinstance(value, Tensor):
        return value
    return Number if type(value) in (int, float) else type(value)


def short(value: Any) -> str:
    """A value within a sentence."""
    if isinstance(value, Tensor):
        return f"a tensor of {tuple(value.shape)} {value.dtype}"
    if isinstance(value, dict | list | tuple):
        return f"{type(value).__name__} of {len(value)}"
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _expect(holds: bool, expected: str, value: Any, where: str) -> None:
    if not holds:
        raise CheckpointError(f"expected {expected} as {where}, got {short(value)}")
