"""A question to a judge with its answer, in the layouts that trainers of language models read.

    {"conversations": [{"from": "human", "value": ..}, {"from": "gpt", ..}], "images": [..]}
    {"messages": [{"role": "user", "content": ..}, {"role": "assistant", ..}], "images": [..]}
    {"instruction": question, "input": more of it, "output": answer, "images": [..]}

From LLaMA-Factory's data/README.md and converters: ShareGPT, OpenAI and Alpaca layout, with the
pictures in `images`. Beside them: `image` for one picture or several (SpatialReward-Train's card),
and a content that is a list of parts, as ms-swift and the OpenAI interface write it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from jrm_jax.data.labels import check_type, field_error

_TURNS, _IMAGES = ("conversations", "messages"), ("images", "image")
TEXTS = (*_TURNS, "instruction", "input", "output")
FIELDS = (*TEXTS, *_IMAGES)
_ASKED, _ANSWERED = ("human", "user"), ("gpt", "assistant")


class Talk(NamedTuple):
    """The last question and the last answer. images: names, bytes or {'bytes', 'path'}, >= 1."""

    asked: str
    answered: str
    images: list[Any]


def has_texts(row: dict[str, Any]) -> bool:
    return any(row.get(n) is not None for n in _TURNS) or isinstance(row.get("output"), str)


def is_talk(row: dict[str, Any]) -> bool:
    if any(row.get(name) is not None for name in _TURNS):
        return True
    return has_texts(row) and any(row.get(name) for name in _IMAGES)


def images_of(row: dict[str, Any], where: str) -> list[Any]:
    """
    Raises:
        RecordError: there are none.
    """
    found = next((row[name] for name in _IMAGES if row.get(name)), None)
    if found is None:
        found = [image for _, _, images in _turns(row, where) for image in images]
    found = found if isinstance(found, list | tuple) else [found]
    if not found:
        raise field_error(where, _IMAGES[0], "must be a list of pictures")
    return list(found)


def read_talk(row: dict[str, Any], where: str) -> Talk:
    """
    Raises:
        RecordError: see `read_texts`; or no picture.
    """
    return Talk(*read_texts(row, where), images_of(row, where))


def read_texts(row: dict[str, Any], where: str) -> tuple[str, str]:
    """(last question, last answer).

    Raises:
        RecordError: a turn that cannot be read, no question, or no answer.
    """
    asked = answered = ""
    for speaker, text, _ in _turns(row, where):
        asked = text if speaker in _ASKED else asked
        answered = text if speaker in _ANSWERED else answered
    field = next((name for name in _TURNS if row.get(name) is not None), "output")
    for text, words in ((asked, f"no question (by {', '.join(_ASKED)})"),
                        (answered, f"no answer (by {', '.join(_ANSWERED)})")):  # fmt: skip
        if not text.strip():
            raise field_error(where, field, f"has {words}")
    return asked, answered


def _turns(row: dict[str, Any], where: str) -> list[tuple[str, str, list[Any]]]:
    """(speaker, text, pictures in the content) of every turn."""
    field = next((name for name in _TURNS if row.get(name) is not None), None)
    if field is None:
        asked = "\n".join(str(row[n]) for n in ("instruction", "input") if row.get(n))
        return [("user", asked, []), ("assistant", row["output"], [])]
    check_type(row[field], list, where, field, "a list of turns")
    turns = []
    for index, turn in enumerate(row[field]):
        at = f"{field}[{index}]"
        check_type(turn, dict, where, at, "an object")
        name = "value" if turn.get("value") is not None else "content"
        content = turn.get(name)
        parts = content if isinstance(content, list) else [content]
        texts, images = [], []
        for part in parts:
            if isinstance(part, dict) and part.get("type") not in (None, "text"):
                image = part.get("image") or part.get("image_url") or part.get("path")
                images.append(image.get("url") if isinstance(image, dict) else image)
                texts.append("<image>")
                continue
            text = part.get("text") if isinstance(part, dict) else part
            check_type(text, str, where, f"{at}.{name}", "a string")
            texts.append(text)
        turns.append((turn.get("from") or turn.get("role"), "".join(texts), images))
    return turns
