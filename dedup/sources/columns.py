"""What the columns of a table mean: which of them hold images, captions and keys, and what a value says.

Shared by the sources with rows: `table`, `parquet`, `huggingface`. A column that no option names is found by
convention, whatever its case. The text rule: text stands as it is, a number as it is written, of a list the first text;
an object and bytes are no text.
"""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dedup.manifest import encode_name
from dedup.sources import MAX_BYTES, Layout, Record, Shard, SourceError
from dedup.sources.folder import find_file, read_file

if TYPE_CHECKING:
    import pyarrow as pa

PATHS = ("file_name", "image_path", "image", "path", "filepath", "file_path", "filename", "file", "img_path", "img")
BYTES = ("image", "img", "jpg", "jpeg", "png", "webp", "picture", "image_bytes", "bytes", "data")
CAPTIONS = ("text", "caption", "captions", "alt_text", "alt", "title", "description", "prompt")
KEYS = ("key", "__key__")
URLS = ("url", "image_url", "img_url", "link")


def find(names: Sequence[str], wanted: Sequence[str]) -> str | None:
    """The column that stands first in `wanted`."""
    return next((name for want in wanted for name in names if name.lower() == want), None)


def require(place: object, names: Sequence[str], layout: Layout) -> None:
    """Raise SourceError unless the columns that options name are there, once each."""
    for option in ("image_column", "caption_column", "id_column", "subject_column", "url_column"):
        column = getattr(layout, option)
        if column is not None and names.count(column) != 1:
            problem = "stands there more than once" if column in names else "is not there"
            raise SourceError(f"{place}: the --{option.replace('_', '-')} {column!r} {problem}; it has {tell(names)}")


def tell(names: Sequence[str]) -> str:
    """The columns, for a message."""
    return f"the columns {', '.join(names)}" if names else "no columns"


def check_names(fields: Iterable["pa.Field"]) -> None:
    """Raise UnicodeDecodeError where the name of a column, or of a part of one, is no text."""
    for field in fields:
        str(field.name)
        check_names(field.type.field(number) for number in range(field.type.num_fields))


def is_images(kind: "pa.DataType") -> bool:
    """Whether a column of this type may hold the bytes of images: binary, or struct {bytes, path}."""
    import pyarrow.types as pat

    if pat.is_struct(kind):
        return any(field.name == "bytes" and is_images(field.type) for field in kind)
    return pat.is_binary(kind) or pat.is_large_binary(kind) or pat.is_binary_view(kind)


def list_image_columns(schema: "pa.Schema") -> list[str]:
    """Columns that may hold images; those that `datasets` calls so, if it has left a note of its types."""
    possible = [field.name for field in schema if is_images(field.type)]
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        kinds = {name: features[name]["_type"] for name in possible}
    except (ValueError, KeyError, TypeError):
        return possible
    return [n for n in possible if kinds[n] == "Image"] or [n for n in possible if kinds[n] == "Value"]  # no sounds


def default_image_column(schema: "pa.Schema") -> str | None:
    """By convention, or the only one there is."""
    possible = list_image_columns(schema)
    return find(possible, BYTES) or (possible[0] if len(possible) == 1 else None)


def choose(place: object, schema: "pa.Schema", layout: Layout, keys: Sequence[str] = ()) -> Layout:
    """The columns that are read from a file with images in it. Raises SourceError."""
    names = schema.names
    require(place, names, layout)
    image = layout.image_column or default_image_column(schema)
    if image is None:
        possible = list_image_columns(schema)
        problem = (
            "more than one column may hold images: choose by --image-column" if possible else "no column of images"
        )
        raise SourceError(f"{place}: {problem}; it has {tell(possible or names)}")
    if not is_images(schema.field(image).type):
        raise SourceError(f"{place}: the --image-column {image!r} holds {schema.field(image).type}, no bytes of images")
    others = [name for name in names if name != image and _is_text(schema.field(name).type)]
    caption = layout.caption_column or find(others, CAPTIONS)
    key = layout.id_column or find(others, keys)
    texts = {"caption": layout.caption_column, "id": layout.id_column, "subject": layout.subject_column}
    for option, column in texts.items():
        if column is not None and column not in others:
            raise SourceError(f"{place}: the --{option}-column {column!r} holds {schema.field(column).type}, no text")
    return replace(layout, image_column=image, caption_column=caption, id_column=key)


def _is_text(kind: "pa.DataType") -> bool:
    import pyarrow.types as pat

    if pat.is_list(kind) or pat.is_large_list(kind):
        return _is_text(kind.value_type)
    return not (is_images(kind) or pat.is_nested(kind))


def read_text(value: Any) -> str | None:
    """The text rule. Empty text is none."""
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode().strip() or None  # JSON may hold lone surrogates
    if isinstance(value, list | tuple):
        return next((text for text in map(read_text, value) if text), None)
    if value is None or isinstance(value, bytes | dict) or (isinstance(value, float) and math.isnan(value)):
        return None
    return json.dumps(value) if isinstance(value, bool) else str(value)


def read_scalar(value: "pa.Scalar") -> Any:
    """As Python has it. What is not UTF-8 in a text becomes U+FFFD: not every writer checks."""
    import pyarrow as pa

    try:
        return value.as_py()
    except UnicodeDecodeError:
        if isinstance(value, pa.StructScalar):
            return {name: read_scalar(part) for name, part in value.items()}
        if isinstance(value, pa.ListScalar):
            return [read_scalar(part) for part in value]
        return value.as_buffer().to_pybytes().decode("utf-8", "replace")


def find_inside(root: str, text: str) -> str:
    """A path as it is written, relative to `root` or absolute → relative to `root`. Raises ValueError outside of it."""
    if "://" in text:
        raise ValueError("an address, not a file: --url-column names a column of addresses, which are downloaded")
    if "\0" in text:
        raise ValueError("no name of a file: it holds a zero byte")
    whole = os.path.normpath(os.path.join(root, text))  # noqa: PTH118 - a million of them, lexically
    inside = root.rstrip("/") + "/"
    if not whole.startswith(inside):
        raise ValueError(f"leads out of {root}: give a --root above it")
    return whole[len(inside) :]


def read_beside(root: str, base: str, text: str, key: str, caption: str | None) -> Record:
    """The image in a file that a row names; base: `find_root(SRC)`. A row whose file cannot be had says why."""
    try:
        place = os.path.join(os.path.relpath(root, base), find_inside(root, text))  # noqa: PTH118
    except ValueError as error:
        return Record(key, 0, 0, None, caption, f"{text[:200]}: {error}", status="unsupported")
    file = encode_name(os.fsencode(os.path.normpath(place)))
    path = find_file(Path(base), file)
    try:
        data = read_file(path)
    except OSError as error:
        return Record(key, 0, 0, None, caption, error.strerror, file=_unless(key, file))
    return Record(key, 0, len(data), data, caption, link=path.is_symlink(), file=_unless(key, file))


def _unless(key: str, file: str) -> str | None:
    """None where the key says it already, as in a folder of images."""
    return None if file == key else file


def read_cell(value: Any) -> tuple[bytes | None, str | None]:
    """Bytes and path of an image column's value: binary, or struct {bytes, path}."""
    if isinstance(value, dict):
        path = value.get("path")
        return value["bytes"], path if isinstance(path, str) and path else None
    return value, None


def make_record(shard: Shard, file: str, number: int, offset: int, cell: Any, values: Mapping[str, Any]) -> Record:
    """Row `number` of a file with images in it. cell: its image; offset: where in `file` that is found again."""
    layout = shard.layout
    caption = read_text(values[layout.caption_column]) if layout.caption_column else None
    subject = read_text(values[layout.subject_column]) if layout.subject_column else None
    named = read_text(values[layout.id_column]) if layout.id_column else None
    key = encode_name((named or str(number)).encode())
    data, path = read_cell(cell)
    if data is not None and len(data) <= MAX_BYTES:
        return Record(key, offset, len(data), data, caption, file=file, subject=subject)
    if data is not None:
        problem = f"more than {MAX_BYTES:,} bytes"
    elif values.get("status", "success") != "success":  # as img2dataset says it
        problem = f"{values['status']}: {values.get('error_message')}"
    elif path is not None:
        return replace(read_beside(str(layout.root), shard.root, path, key, caption), subject=subject)
    else:
        problem = f"no bytes in the column {layout.image_column!r}"
    return Record(key, offset, 0, None, caption, problem, file=file, subject=subject)


def check_ids(place: object, values: Iterable[Any], start: int, column: str, seen: set[str]) -> None:
    """Raise SourceError unless each names one row. start: number of the first; seen: all before, added to."""
    for number, value in enumerate(values, start):
        key = read_text(value)
        if key is None or key in seen:
            problem = "is missing" if key is None else f"{key!r} stands more than once"
            raise SourceError(f"{place}: row {number}: the --id-column {column!r} {problem}; it must name one row")
        seen.add(key)
