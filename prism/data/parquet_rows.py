"""The rows of parquet files, one page at a time, without the columns that nobody asks for.

pyarrow decodes whole pages. A page has any size that its writer chose, below 2 GiB; pyarrow's own pages hold about
1 MiB or, of large values, a thousand rows. So memory is bounded by a page of each column and by a batch of rows. A row
above the greatest size is seen only after its batch is decoded, unless the rows of its row group are that large on
average: the footer tells that, and such a group is not read.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prism.data.files import MAX_VALUES, PIECE, DataError, Raw, RowError, open_regular

# rows that are decoded at once. fewer if they are large; but a group of small rows may have a large dictionary, too
_BATCH, _LEAST_BATCH = 64, 8
_BATCH_BYTES = 64 * 2**20
# the least memory of a list's item, as a part of a row's greatest size
_ITEM_BYTES = 64


def parquet_rows(path: Path, row: int, offset: int, columns: Collection[str] | None, max_bytes: int) -> Iterator[Raw]:
    """Yields the rows of a file from row `offset` on; for the arguments see `read_rows`."""
    reached = [row]
    with _opened(path, reached) as file:
        names = [name for name in file.schema_arrow.names if columns is None or name in columns]
        skip = offset
        for group in range(file.metadata.num_row_groups):
            rows = file.metadata.row_group(group).num_rows
            if skip >= rows:
                skip -= rows
                continue
            for content, size in _group(file, group, names, skip, max_bytes):
                reached[0], offset = reached[0] + 1, offset + 1
                yield Raw(reached[0], offset, content, size)
            skip = 0


def number_of_rows(path: Path) -> int:
    """Returns the number of rows of a file."""
    with _opened(path, [0]) as file:
        return file.metadata.num_rows


@contextmanager
def _opened(path: Path, reached: list[int]) -> Iterator[Any]:
    """Opens a file; an error says that the row after the one in `reached` cannot be read."""
    try:
        import pyarrow as arrow
        from pyarrow import parquet
    except ImportError as error:
        raise DataError(f"{path}: expected pyarrow, to read parquet: pip install pyarrow ({error})") from None
    with open_regular(path) as opened:
        try:
            # without a buffer of its own, and with pre_buffer, pyarrow reads whole row groups
            with parquet.ParquetFile(opened, buffer_size=PIECE, pre_buffer=False) as file:
                yield file
        except (arrow.ArrowException, OSError, UnicodeDecodeError) as error:
            problem = f"expected a parquet file, row {reached[0] + 1} cannot be read: {error}"
            raise DataError(f"{path}: {problem}") from None


def _group(
    file: Any, group: int, names: list[str], skip: int, max_bytes: int
) -> Iterator[tuple[dict[str, Any] | RowError, int]]:
    """Yields the rows of a row group after the first `skip`, each with its size."""
    metadata = file.metadata.row_group(group)
    rows = metadata.num_rows
    chunks = [metadata.column(index) for index in range(metadata.num_columns)]
    used = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in names]
    total = sum(chunk.total_uncompressed_size for chunk in used)
    values = max((chunk.num_values for chunk in used), default=0)
    if total > max_bytes * rows or values > MAX_VALUES * rows:
        wanted = f"expected a row group whose rows have at most {max_bytes} bytes and {MAX_VALUES} values on average"
        for _ in range(skip, rows):
            yield RowError("too long", "", f"{wanted}, got {total // rows} bytes and {values // rows} values"), 0
        return
    # a value of a dictionary is stored once, for any number of rows
    shared = max((chunk.total_uncompressed_size for chunk in used if chunk.has_dictionary_page), default=0)
    most = min(_BATCH_BYTES * rows // max(total, 1), max(_BATCH_BYTES // max(shared, 1), _LEAST_BATCH))
    for batch in file.iter_batches(batch_size=max(1, min(most, _BATCH)), row_groups=[group], columns=names):
        kept = batch.slice(skip)
        skip -= batch.num_rows - kept.num_rows
        yield from _rows(kept, max_bytes)


def _rows(batch: Any, max_bytes: int) -> Iterator[tuple[dict[str, Any] | RowError, int]]:
    size = sum(map(_bytes, batch.columns))
    if size <= min(max_bytes, _BATCH_BYTES):
        try:
            contents = batch.to_pylist()
        except (ValueError, OverflowError):
            # some row has a value that Python has not: the rows are converted one at a time
            contents = []
        for content in contents:
            yield content, size // batch.num_rows
        if contents:
            return
    for index in range(batch.num_rows):
        row = batch.slice(index, 1)
        size = sum(map(_bytes, row.columns))
        if size > max_bytes:
            yield RowError("too long", "", f"expected a row of at most {max_bytes} bytes, got {size} bytes"), 0
            continue
        try:
            (content,) = row.to_pylist()
        except (ValueError, OverflowError) as error:
            cause = "broken text" if isinstance(error, UnicodeDecodeError) else "wrong type"
            yield RowError(cause, "", f"expected values that Python has, too: {error}"), 0
        else:
            yield content, size


def _bytes(array: Any) -> int:
    """Returns the size of an array once its values are written out, about."""
    from pyarrow import compute, types

    if types.is_dictionary(array.type):
        values = array.dictionary
        # a dictionary of numbers repeats nothing large
        kinds = (types.is_string, types.is_binary, types.is_large_string, types.is_large_binary)
        repeated = None
        if any(is_kind(values.type) for is_kind in kinds):
            repeated = compute.sum(compute.binary_length(values).take(array.indices)).as_py()
        return array.indices.nbytes + (repeated or 0)
    # lists and structs; pyarrow cannot flatten maps
    inner = array.flatten() if hasattr(array, "flatten") and not types.is_map(array.type) else None
    if isinstance(inner, list):
        return sum(map(_bytes, inner))
    return array.nbytes if inner is None else _ITEM_BYTES * len(inner) + _bytes(inner)
