"""Lines of JSON as the ecosystem writes pairs, in the form that `schema` reads.

    {"instruction": "Make the cat white", "source": "cat.png", "chosen": "a.png",
     "rejected": "b.png"}

`prompt` or `conversations` may stand for `instruction`; they and the answers may be chat messages
(`role` and `content`, or `from` and `value`), whose pictures without a name are those of `images`,
in order. `<image>` in a text stands for the next of them: in messages, in questions, and in answers
where there is one of `images` for every place. Of the messages of an answer those after the last
question count. A list of answers holds several rejected (or chosen) ones. An answer that is a
string is a picture where it ends like the name of one, else text. Fields that mean nothing here
(models, categories) are passed over.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from jrm_jax.data.labels import field_error
from jrm_jax.data.picture_names import ends_like_picture

SIDES = ("chosen", "rejected")
_ASKED = ("instruction", "prompt", "conversations")
_SOURCES = ("source", "source_image", "source_img", "input_image", "input_images", "image")
_KEPT = ("id", "weight", "dimensions")
_KNOWN = (*SIDES, *_ASKED, *_SOURCES, "images", *_KEPT)
_PLACE = "<image>"  # where a text of messages has the next of `images`
_LIKE = 0.85  # share of equal letters from which an unknown field is a misspelt known one


def is_pair(obj: Mapping[str, Any]) -> bool:
    """Whether an object has an answer of one side at least."""
    return any(obj.get(name) is not None for name in SIDES)


def as_group(obj: Mapping[str, Any], where: str) -> Mapping[str, Any]:
    """A pair as prompt, candidates and ranks; anything else as it is. No field is null.

    Raises:
        RecordError: names the field that is missing or has another form.
    """
    if not isinstance(obj, dict) or "candidates" in obj or not is_pair(obj):
        return obj
    for name in SIDES:
        if name not in obj:
            raise field_error(where, name, "is missing beside the other answer")
    for name in obj:
        close = difflib.get_close_matches(str(name), _KNOWN, 1, _LIKE)
        if close and name not in _KNOWN:
            raise field_error(where, str(name), f"is unknown; did you mean {close[0]!r}?")
    asked = next((name for name in _ASKED if name in obj), None)
    if asked is None:
        raise field_error(where, "instruction", "is missing (or 'prompt')")
    images = obj.get("images", [])
    unnamed = iter(list(images) if isinstance(images, list) else [images])
    read = _Reader(where, unnamed, places=bool(images))
    prompt = read.parts(obj[asked], asked, str)  # the schema's own rule for strings
    in_all = [_places(obj[name]) for name in (asked, *SIDES)]
    fits = isinstance(images, list) and sum(in_all) == len(images)
    read.places = fits and (in_all[0] > 0 or all(in_all[1:]))  # else a text tells of a tag
    for name in _SOURCES:
        if name in obj:
            several = obj[name] if isinstance(obj[name], list) else [obj[name]]
            prompt += [{"image": value} for value in several]
    answers = [[read.answer(value, side) for value in _several(obj[side])] for side in SIDES]
    prompt += [{"image": value} for value in unnamed]
    group = {name: obj[name] for name in _KEPT if name in obj}
    ranks = [place for place, values in enumerate(answers, 1) for _ in values]
    return group | {"prompt": prompt, "candidates": [*answers[0], *answers[1]], "ranks": ranks}


def _several(value: Any) -> list:
    """The answers of one side: a list that is no list of messages holds several."""
    if isinstance(value, list) and not any(_is_message(item) for item in value):
        return value
    return [value]


class _Reader:
    """Parts of one line. unnamed: pictures for the places that name none. places: whether a plain
    string may have such places."""

    def __init__(self, where: str, unnamed: Iterator, places: bool):
        self._where, self._unnamed, self.places = where, unnamed, places

    def answer(self, value: Any, field: str) -> Any:
        if isinstance(value, dict) and "parts" in value:
            return value  # a candidate as the schema has it
        if isinstance(value, list):
            asked = [i for i, item in enumerate(value) if _is_message(item) and _asks(item)]
            value = value[asked[-1] + 1 :] if asked else value
            if not value:
                raise field_error(self._where, field, "holds the question, and no answer to it")
        return self.parts(value, field, _named_or_text)

    def parts(self, value: Any, field: str, string: Callable[[str], Any]) -> list:
        """Of a string, a picture, a part, messages, or a list of these. string: what one means."""
        if isinstance(value, str):
            return (self.places and self.said(value)) or [string(value)]
        if isinstance(value, bytes):
            return [{"image": value}]
        if isinstance(value, list):
            return [part for item in value for part in self.parts(item, field, string)]
        if _is_message(value):
            content = value.get("content", value.get("value"))
            return self.said(content) or self.parts(content, field, _text)
        if isinstance(value, dict):
            if value.get("type") == "image_url":
                link = value.get("image_url")
                return [{"image": link.get("url") if isinstance(link, dict) else link}]
            named = {k: v for k, v in value.items() if k in ("text", "image")}
            if value.get("type") == "image" and not named:
                return [{"image": self._next(field)}]
            if len(named) == 1 and set(value) <= {"text", "image", "type"}:
                return [named]
        words = "must be a text, a picture's name, or a list of parts or messages"
        raise field_error(self._where, field, words)

    def said(self, content: Any) -> list:
        """A text with places for pictures; [] where it is something else."""
        if not isinstance(content, str) or _PLACE not in content:
            return []
        parts: list[dict[str, Any]] = []
        for index, text in enumerate(content.split(_PLACE)):
            parts += [{"image": self._next("images")}] if index else []
            parts += [{"text": text.strip()}] if text.strip() else []
        return parts

    def _next(self, field: str) -> Any:
        found = next(self._unnamed, None)
        if found is None:
            words = "has a place for a picture, and 'images' holds none for it"
            raise field_error(self._where, field, words)
        return found


def _text(value: str) -> dict[str, str]:
    return {"text": value}


def _named_or_text(value: str) -> dict[str, str]:
    return {"image" if ends_like_picture(value) else "text": value}


def _places(value: Any) -> int:
    """Places of pictures that name none, in all that a question or the answers hold."""
    if isinstance(value, str):
        return value.count(_PLACE)
    if isinstance(value, list):
        return sum(map(_places, value))
    if not isinstance(value, dict):
        return 0
    if _is_message(value):
        return _places(value.get("content", value.get("value")))
    return int(value.get("type") == "image" and not {"text", "image"} & value.keys())


def _asks(message: Mapping[str, Any]) -> bool:
    return message.get("role", message.get("from")) in ("user", "human")


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and ("role" in value or "from" in value)
