"""Small tables for the tests of tables and of the dispatcher."""

import json
from typing import Any

from communicators.selection.tables import parse


def table_text(**changes):
    row = {
        "op": "all_reduce", "dtype": "bfloat16", "mode": "eager", "up_to_bytes": 256,
        "communicator": "all", "us": {"all": 2.0, "small": 3.5},
    }  # fmt: skip
    data = {
        "machine": {"device": "Toy", "link": "NV1", "world_size": 2},
        "measured": {"date": "2026-01-01", "driver": "1", "commit": "abc", "command": "tune"},
        "rows": [
            row,
            {**row, "up_to_bytes": 512, "communicator": "small", "us": {"all": 3.5, "small": 2.0}},
        ],
    }
    for path, value in changes.items():
        *parents, last = path.split("__")
        holder: Any = data
        for key in parents:
            holder = holder[int(key) if key.isdigit() else key]
        holder[last] = value
    return json.dumps(data)


def rows_table(*rows, merged=False):
    """A table of (op, dtype, size, us), all eager."""
    items = [
        {"op": op, "dtype": dtype, "mode": "eager", "up_to_bytes": size, "us": us,
         "communicator": min(us, key=us.get)}
        for op, dtype, size, us in rows
    ]  # fmt: skip
    return parse(table_text(rows=items, merged=merged), "toy.json")
