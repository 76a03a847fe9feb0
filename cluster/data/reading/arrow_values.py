"""Converts columns of Parquet and Arrow to the values that a row of JSON would hold.

Such a file gives all rows of a column the same keys. A key of a nested struct that is null in a row is left out of it.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from typing import Any

import pyarrow as pa
import pyarrow.types as types

Convert = Callable[[Any], Any]


def plain_values(column: pa.ChunkedArray, field: pa.Field) -> list[Any]:
    """Return the values of a column.

    Null keys of structs are left out, maps become dicts, times become ISO 8601 texts, decimals numbers; texts that hold
    JSON by the file's metadata are parsed.
    """
    kind = field.type
    if (types.is_timestamp(kind) or types.is_duration(kind) or types.is_time64(kind)) and kind.unit == "ns":
        column = column.cast(_in_microseconds(kind), safe=False)  # else pyarrow would need pandas
    values: list[Any] = column.to_pylist()
    convert = _converter(field.type)
    return values if convert is None else [None if value is None else convert(value) for value in values]


def holds_bytes(kind: pa.DataType) -> bool:
    """Return whether values of that type are or contain bytes, such as images."""
    if isinstance(kind, pa.BaseExtensionType):
        return holds_bytes(kind.storage_type)
    if types.is_struct(kind) or types.is_map(kind) or any(is_kind(kind) for is_kind in _LISTS):
        return any(holds_bytes(kind.field(place).type) for place in range(kind.num_fields))
    return bool(
        types.is_binary(kind)
        or types.is_large_binary(kind)
        or types.is_fixed_size_binary(kind)
        or types.is_binary_view(kind)
    )


def _in_microseconds(kind: pa.DataType) -> pa.DataType:
    if types.is_timestamp(kind):
        return pa.timestamp("us", kind.tz)
    return pa.duration("us") if types.is_duration(kind) else pa.time64("us")


def _converter(kind: pa.DataType) -> Convert | None:
    """Return the conversion of non-null values of that type, or None if they stay as they are."""
    if isinstance(kind, pa.JsonType):
        return json.loads
    if isinstance(kind, pa.BaseExtensionType):
        return _converter(kind.storage_type)
    if types.is_dictionary(kind):
        return _converter(kind.value_type)
    if types.is_struct(kind):
        return _struct(kind)
    if types.is_map(kind):
        return _mapping(kind)
    if any(is_kind(kind) for is_kind in _LISTS):
        return _each(_converter(kind.value_type))
    if types.is_decimal(kind):
        return _number if kind.scale > 0 else int
    return _time_text if types.is_temporal(kind) else None


_LISTS: tuple[Callable[[pa.DataType], bool], ...] = (
    types.is_list,
    types.is_large_list,
    types.is_fixed_size_list,
    types.is_list_view,
    types.is_large_list_view,
)


def _struct(kind: pa.StructType) -> Convert:
    converters = {part.name: _converter(part.type) for part in kind}
    has_content = {"role", "content"} <= set(converters)

    def convert(value: dict[str, Any]) -> dict[str, Any]:
        row = {}
        for name, part in value.items():
            change = converters[name]
            if part is not None:
                row[name] = part if change is None else change(part)
            elif has_content and name == "content":
                row[name] = None  # a message that calls tools has null as its content
        return row

    return convert


def _mapping(kind: pa.MapType) -> Convert:
    change = _converter(kind.item_type)

    def convert(value: list[tuple[Any, Any]]) -> dict[Any, Any]:
        return {name: part if change is None or part is None else change(part) for name, part in value}

    return convert


def _each(change: Convert | None) -> Convert | None:
    if change is None:
        return None
    return lambda values: [None if value is None else change(value) for value in values]


def _number(value: Decimal) -> float:
    return float(value)


def _time_text(value: date | datetime | time | timedelta) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else value.isoformat()
