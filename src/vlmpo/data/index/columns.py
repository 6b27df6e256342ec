"""Turn NumPy arrays into Arrow columns and back, without a copy.

Arrow's ``pa.array``, ``pa.scalar`` and ``to_numpy`` import pandas, which takes 50 MB of memory and half a second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray


def to_arrow(values: NDArray[Any]) -> pa.Array:
    """Return numbers [rows] as an Arrow array."""
    buffer = pa.py_buffer(np.ascontiguousarray(values))
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, buffer])


def binary_to_arrow(values: Sequence[bytes | None]) -> pa.Array:
    """Return byte strings as an Arrow array of ``large_binary``; None becomes null."""
    is_valid = np.packbits(np.array([value is not None for value in values], np.bool_), bitorder="little")
    offsets = np.cumsum([0, *(len(value or b"") for value in values)], dtype=np.int64)
    buffers = [pa.py_buffer(is_valid), pa.py_buffer(offsets), pa.py_buffer(b"".join(filter(None, values)))]
    return pa.Array.from_buffers(pa.large_binary(), len(values), buffers)


def to_numpy(column: pa.ChunkedArray | pa.Array) -> NDArray[Any]:
    """Return a column of numbers without nulls as an array that is not writable."""
    return np.from_dlpack(one_chunk(column))


def one_chunk(column: pa.ChunkedArray | pa.Array) -> Any:
    """Return a column as one Arrow array, copied only if it is in several."""
    if isinstance(column, pa.Array):
        return column
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
