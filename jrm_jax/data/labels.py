"""Labels and field checks of a JSON record: ranks, scores or a preference matrix -> arrays.

Letters: K candidates, R reward dimensions. `where` is 'file:line', `field` the field's path.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any

import numpy as np

from jrm_jax.errors import RecordError


def parse_labels(
    obj: dict, count: int, dimensions: tuple[str, ...], where: str
) -> tuple[np.ndarray, np.ndarray]:
    """(preference, weight), each [K, K, R] float32; see `parsing.parse_json` for what is read."""
    keys = [key for key in ("ranks", "scores", "preference") if obj.get(key) is not None]
    if len(keys) > 1:
        raise field_error(where, keys[1], f"stands beside {keys[0]!r}; give only one kind of label")
    shape = (count, count, len(dimensions))
    if not keys:
        return np.full(shape, 0.5, np.float32), np.zeros(shape, np.float32)
    key = keys[0]
    if key == "preference":
        preference = _matrix(obj[key], shape, where, key)
        missing = np.isnan(preference)
        if (missing != missing.swapaxes(0, 1)).any():
            i, j, r = np.argwhere(missing & ~missing.swapaxes(0, 1))[0]
            raise field_error(where, f"preference[{i}][{j}][{r}]", "is null but its mirror is not")
        preference = np.where(missing, np.float32(0.5), preference)
        labelled = ~missing
    else:
        values_KR = _values(obj[key], count, dimensions, where, key)
        sign = np.sign(values_KR[:, None] - values_KR[None, :]) * (-1 if key == "ranks" else 1)
        labelled = ~np.isnan(sign)
        preference = np.where(labelled, (1 + sign) / 2, 0.5)
    off_diagonal = ~np.eye(count, dtype=bool)[:, :, None]
    labelled &= off_diagonal
    weight = labelled.astype(np.float32)
    if obj.get("weight") is not None:
        factor = _matrix(obj["weight"], shape, where, "weight", scalar=True)
        # What is said of unlabelled pairs and of the diagonal carries no meaning.
        weight = np.where(labelled, np.nan_to_num(factor, nan=0.0), 0.0)
    preference = np.where(off_diagonal, preference, 0.5)
    return preference.astype(np.float32), weight.astype(np.float32)


def labels_in(
    preference: np.ndarray, weight: np.ndarray, found: Sequence[str], wanted: Sequence[str]
) -> tuple[np.ndarray, np.ndarray]:
    """Both [K, K, R] in the order of `wanted`; a dimension that is not in `found` is unlabelled."""
    columns = [found.index(name) if name in found else 0 for name in wanted]
    known = np.array([name in found for name in wanted])
    return (
        np.where(known, preference[..., columns], np.float32(0.5)),
        np.where(known, weight[..., columns], np.float32(0)),
    )


def _values(
    value: Any, count: int, dimensions: tuple[str, ...], where: str, field: str
) -> np.ndarray:
    """[K, R] float64 of `ranks` or `scores`; NaN = unlabelled."""
    if isinstance(value, list):
        if len(dimensions) != 1:
            raise field_error(
                where, field, f"must name its dimensions: {{{dimensions[0]!r}: [...]}}"
            )
        value = {dimensions[0]: value}
    check_type(value, dict, where, field, "a list or {dimension: list}")
    check_keys(value, dimensions, (), where, field)
    values_KR = np.full((count, len(dimensions)), np.nan)
    for r, name in enumerate(dimensions):
        if value.get(name) is None:
            continue
        row, at = value[name], f"{field}.{name}"
        check_type(row, list, where, at, "a list")
        if len(row) != count:
            raise field_error(where, at, f"has {len(row)} entries for {count} candidates")
        values_KR[:, r] = [_number(v, where, f"{at}[{k}]") for k, v in enumerate(row)]
    return values_KR


def _matrix(
    value: Any, shape: tuple[int, ...], where: str, field: str, scalar: bool = False
) -> np.ndarray:
    """[K, K, R] float32 from nested lists; [K][K] is spread over R, NaN = null."""
    count, _, dims = shape
    if scalar and not isinstance(value, list):
        return np.full(shape, _number(value, where, field), np.float32)
    out = np.zeros(shape, np.float32)

    def rows(value: Any, length: int, at: str) -> list:
        check_type(value, list, where, at, "a list")
        if len(value) != length:
            raise field_error(
                where, at, f"has {len(value)} entries, must have {length} (K x K matrix)"
            )
        return value

    for i, row in enumerate(rows(value, count, field)):
        for j, cell in enumerate(rows(row, count, f"{field}[{i}]")):
            at = f"{field}[{i}][{j}]"
            cells = rows(cell, dims, at) if isinstance(cell, list) else [cell]
            out[i, j] = [_number(v, where, at) for v in cells]
    return out


def _number(value: Any, where: str, field: str) -> float:
    if value is None:
        return math.nan
    number = finite(value)
    if number is None:
        raise field_error(where, field, f"is {shown(value)}, must be a number or null")
    return number


def finite(value: Any) -> float | None:
    """A number of JSON as float64; None where it is none, not finite, or beyond float64."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # of an integer with hundreds of digits
        return None
    return number if math.isfinite(number) else None


_DECIMAL_COMMA = re.compile(r"[+-]?\d+,\d+")
_THOUSANDS = re.compile(r"[+-]?[1-9]\d{0,2}(?:,\d{3})+")


def read_decimal(text: str) -> float:
    """A number as people write it, with a point or a decimal comma ('7,5').

    Raises:
        ValueError: what it must be; of '1,250', which may be either, how it is written clearly.
    """
    if _THOUSANDS.fullmatch(text):
        plain = text.replace(",", "")
        words = "where the comma may be a decimal one or part thousands"
        raise ValueError(f"{words}: write {plain}, or {text.replace(',', '.', 1)}")
    try:
        if "_" in text:  # Python's own sign between thousands
            raise ValueError
        number = float(text.replace(",", ".") if _DECIMAL_COMMA.fullmatch(text) else text)
    except ValueError as error:
        raise ValueError("must be a number") from error
    if not math.isfinite(number):
        raise ValueError("must be a finite number")
    return number


def shown(value: Any) -> str:
    """The beginning of a value, as JSON writes it; of any type."""
    return json.dumps(value, default=repr)[:40]


def check_type(value: Any, kind: type | UnionType, where: str, field: str, words: str) -> None:
    if not isinstance(value, kind):
        raise field_error(where, field, f"is {shown(value)}, must be {words}")


_FLAGS = {
    "true": True, "1": True, "yes": True,
    "false": False, "0": False, "no": False, "": False, "nan": False, "none": False, "null": False,
}  # fmt: skip


def read_flag(value: Any, where: str, field: str) -> bool:
    """true or false, as JSON, a number or a word says it; nothing said is false.

    Raises:
        RecordError: another word.
    """
    word = f"{value:g}" if isinstance(value, float) else str(value).strip().lower()
    if word not in _FLAGS:
        raise field_error(where, field, f"is {shown(value)}, must be true or false")
    return _FLAGS[word]


def read_id(value: Any, where: str) -> str | None:
    """A name, or a whole number as text; None where there is none.

    Raises:
        RecordError: something else.
    """
    if isinstance(value, float) and (math.isnan(value) or value.is_integer()):
        value = None if math.isnan(value) else int(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if value is not None:
        check_type(value, str, where, "id", "a string or a whole number")
    return value


BROKEN_TEXT = (
    "is no valid text (half of a surrogate pair, or bytes that are not UTF-8): correct it, or save"
    " the file as UTF-8",
    "text that is not valid Unicode",
)


def is_text(value: str) -> bool:
    """Whether UTF-8 can hold it: JSON can write half of a surrogate pair, which nothing else
    can."""
    try:
        value.isascii() or value.encode()
    except UnicodeEncodeError:
        return False
    return True


def check_text(value: Any, where: str, field: str, words: str = "a non-empty string") -> None:
    """
    Raises:
        RecordError: no string, empty, or not to be encoded.
    """
    if not isinstance(value, str) or not value:
        raise field_error(where, field, f"must be {words}")
    if not is_text(value):
        raise field_error(where, field, *BROKEN_TEXT)


def check_keys(
    obj: Mapping, allowed: Iterable[str], required: Iterable[str], where: str, field: str
) -> None:
    prefix = f"{field}." if field else ""
    for key in obj:
        if key not in tuple(allowed):
            close = difflib.get_close_matches(str(key), tuple(allowed), 1, 0.5)
            hint = f"did you mean {close[0]!r}?" if close else f"known: {', '.join(allowed)}"
            raise field_error(where, f"{prefix}{key}", f"is unknown; {hint}")
    for key in required:
        if key not in obj:
            raise field_error(where, f"{prefix}{key}", "is missing")


def field_error(where: str, field: str, message: str, kind: str = "") -> RecordError:
    """`kind` defaults to the field's name without indices."""
    plain = re.sub(r"\[\d+\]", "", field)
    return RecordError(f"{where}: field '{field}': {message}", kind or f"field '{plain}'")
