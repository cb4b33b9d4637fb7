"""From an example's parts to tokens: the rubric, Qwen's chat template, and the tokenizer.

    prompt     <|im_start|>system  rubric <|im_end|>  <|im_start|>user  prompt parts
    candidate  Result: candidate parts <|im_end|>  <|im_start|>assistant  <|reward|>
    critique   words <|im_end|>

Qwen3.5 begins its answers with an empty thinking block: <think> </think> <|reward|>.

The sequence is cut only behind a special token, so that tokenising the pieces equals tokenising
the whole: where the prompt ends in text, its tail (what follows its last special token) moves into
every candidate. Neighbouring texts are joined by a line break. User text never becomes a special
token, whatever it contains.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
from array import array
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

from jrm_jax.data.processor import Processor
from jrm_jax.data.schema import Image, Part
from jrm_jax.data.sizes import write_cache
from jrm_jax.data.stated import last_line
from jrm_jax.errors import UserError
from jrm_jax.shell import user_cache

RUBRIC = "Judge how well the edit follows the instruction and preserves the rest."
KEPT_VERSION = 1  # raise it when `_read_tokenizer` makes something else of the same files
LAYOUT_VERSION = 1  # of the structure in this file; part of the template's hash


class Token(str):
    """A special token by name; a plain `str` beside it is text."""

    __slots__ = ()


IM_START, IM_END = Token("<|im_start|>"), Token("<|im_end|>")
VISION_START, VISION_END = Token("<|vision_start|>"), Token("<|vision_end|>")
IMAGE_PAD, REWARD = Token("<|image_pad|>"), Token("<|reward|>")
THINK, END_THINK = Token("<think>"), Token("</think>")
NO_THOUGHTS = (THINK, "\n\n", END_THINK, "\n\n")
THINKERS = ("qwen3_5",)  # families that begin their answers with these
Piece = str | Image  # Token, text or picture


@dataclasses.dataclass(frozen=True)
class Template:
    """The words around an example. An empty `rubric` leaves the system turn out; `thinking` puts an
    empty thinking block before <|reward|>."""

    rubric: str = RUBRIC
    result: str = "\nResult:"
    thinking: bool = False

    def of_family(self, family: str) -> Template:
        """With a thinking block if the family's answers begin with one."""
        return dataclasses.replace(self, thinking=family in THINKERS)

    def split(
        self, prompt: Sequence[Part], candidates: Sequence[Sequence[Part]]
    ) -> tuple[list[Piece], list[list[Piece]]]:
        """(prompt pieces, pieces of each candidate up to and including <|reward|>).

        A picture stands for its placeholders; <|vision_start|> and <|vision_end|> are there.
        """
        system = [IM_START, f"system\n{self.rubric}", IM_END, "\n"] if self.rubric else []
        head = _merge([*system, IM_START, "user\n", *_pieces(prompt)])
        last = max(i for i, piece in enumerate(head) if isinstance(piece, Token))
        head, tail = head[: last + 1], head[last + 1 :]
        thoughts = NO_THOUGHTS if self.thinking else ()
        turn = [IM_END, "\n", IM_START, "assistant\n", *thoughts, REWARD]
        bodies = []
        for parts in candidates:
            body = _pieces(parts)
            gap = [] if isinstance(body[0], Token) else ["\n"]
            bodies.append(_merge([*tail, self.result, *gap, *body, *turn]))
        return head, bodies

    @property
    def hash(self) -> str:
        """Of everything that decides which tokens surround the user's parts."""
        words = [LAYOUT_VERSION, self.rubric, self.result]
        content = json.dumps(words + [NO_THOUGHTS] * self.thinking)
        return hashlib.sha256(content.encode()).hexdigest()[:16]


def _pieces(parts: Sequence[Part]) -> list[Piece]:
    pieces: list[Piece] = []
    for part in parts:
        if isinstance(part, Image):
            pieces += [VISION_START, part, VISION_END]
            continue
        if pieces and not isinstance(pieces[-1], Token):
            pieces.append("\n")
        pieces.append(part.text)
    return pieces


def _merge(pieces: Sequence[Piece]) -> list[Piece]:
    """Join neighbouring texts, so that each is tokenised as it stands in the whole."""
    merged: list[Piece] = []
    for piece in pieces:
        if merged and type(piece) is str and type(merged[-1]) is str:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def render(pieces: Sequence[Piece], image_tokens: Sequence[int] | None = None) -> str:
    """The pieces as one string; a picture becomes its number of <|image_pad|> (default 1)."""
    counts = iter(image_tokens or ())
    return "".join(
        IMAGE_PAD * next(counts, 1) if isinstance(piece, Image) else piece for piece in pieces
    )


class Tokenizer:
    """A folder's tokenizer with <|reward|>; picklable, results are cached per string.

    Attributes: `ids` {special token: id, None where there is no such token}, `pad_id`, `reward_id`,
    `image_id`, `end_id` (<|im_end|>), `digest` (hash of the vocabulary).
    """

    CACHE_SIZE = 100_000

    def __init__(self, backend_json: str, pad_id: int):
        self._json, self.pad_id = backend_json, pad_id
        self._build()

    def _build(self) -> None:
        import tokenizers

        self._backend = tokenizers.Tokenizer.from_str(self._json)
        self._backend.no_truncation()
        self._backend.no_padding()
        # Not part of the serialised form: must be set anew after every copy.
        self._backend.encode_special_tokens = True
        names = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, REWARD, THINK, END_THINK)
        self.ids = {name: self._backend.token_to_id(name) for name in names}
        self.reward_id, self.image_id = self.ids[REWARD], self.ids[IMAGE_PAD]
        self.end_id = self.ids[IM_END]
        vocabulary = sorted(self._backend.get_vocab().items())
        self.digest = hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]
        # Arrays: a tuple of ids takes six times the memory, and sets have many texts.
        self._texts: dict[str, array] = {}
        self._critiques: dict[str, tuple[array, int]] = {}

    def __reduce__(self):
        return Tokenizer, (self._json, self.pad_id)

    def encode_text(self, text: str) -> tuple[int, ...]:
        """Token ids of plain text; special tokens in it are read as text."""
        ids = self._texts.get(text)
        if ids is None:
            if len(self._texts) >= self.CACHE_SIZE:
                self._texts.clear()
            ids = array("i", self._backend.encode(text, add_special_tokens=False).ids)
            self._texts[text] = ids
        return tuple(ids)

    def encode_critique(self, text: str) -> tuple[tuple[int, ...], int]:
        """(token ids, number of them before the last line; 0 where there is only one line)."""
        found = self._critiques.get(text)
        if found is None:
            if len(self._critiques) >= self.CACHE_SIZE:
                self._critiques.clear()
            encoding = self._backend.encode(text, add_special_tokens=False)
            start = last_line(text)
            before = sum(first < start for first, _ in encoding.offsets)
            found = self._critiques[text] = (array("i", encoding.ids), before)
        return tuple(found[0]), found[1]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated tokens, special tokens left out."""
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)


def load_tokenizer(folder: str | Path, vocab_rows: int) -> Tokenizer:
    """Read a folder's tokenizer and give <|reward|> the first unused row of the vocabulary.

    Args:
        vocab_rows: rows of the embedding table (`TextConfig.vocab`).

    Raises:
        UserError: no tokenizer in the folder, no Qwen special tokens, or no unused row.
    """
    path = _kept_path(folder, vocab_rows)
    with contextlib.suppress(OSError, ValueError, TypeError):  # absent, or whatever lies there
        if path is not None:
            return Tokenizer(**json.loads(path.read_bytes()))
    found = _read_tokenizer(folder, vocab_rows)
    if path is not None:
        write_cache(path, json.dumps(found))
    return Tokenizer(**found)


def _kept_path(folder: str | Path, vocab_rows: int) -> Path | None:
    """Where a tokenizer is kept as `transformers` has read it: importing that library takes a
    quarter of a short command's time. Its version and all that it may read are part of the name."""
    place = user_cache.folder("tokenizers")
    files = sorted(p for p in Path(folder).glob("*") if p.suffix in (".json", ".txt", ".jinja"))
    if place is None or not any(path.name == "tokenizer.json" for path in files):
        return None
    versions = [metadata.version(name) for name in ("transformers", "tokenizers")]
    digest = hashlib.sha256(json.dumps([KEPT_VERSION, vocab_rows, *versions]).encode())
    for path in files:
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)} ".encode() + content)
    return place / f"{digest.hexdigest()[:32]}.json"


def _read_tokenizer(folder: str | Path, vocab_rows: int) -> dict[str, Any]:
    """Arguments of `Tokenizer`."""
    wrapped = _load_wrapped(folder)
    _add_reward(wrapped, folder, vocab_rows)
    content = json.loads(wrapped.backend_tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = True  # only so marked tokens can be kept out of user text
    pad_id = wrapped.pad_token_id
    if pad_id is None:
        pad_id = wrapped.backend_tokenizer.token_to_id("<|endoftext|>")
    if pad_id is None:
        raise UserError(f"{folder}: the tokenizer has no padding token and no <|endoftext|>")
    return {"backend_json": json.dumps(content, ensure_ascii=False), "pad_id": int(pad_id)}


def names_reward(folder: str | Path) -> bool:
    """Whether the folder's own tokenizer has <|reward|>: then the token's row was filled here."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return False
    added = json.loads(path.read_text(encoding="utf-8")).get("added_tokens") or ()
    return any(token.get("content") == REWARD for token in added)


def save_tokenizer(folder: str | Path, out: str | Path, vocab_rows: int) -> None:
    """Write the folder's tokenizer with <|reward|> into `out` (for an export)."""
    wrapped = _load_wrapped(folder)
    _add_reward(wrapped, folder, vocab_rows)
    wrapped.save_pretrained(out)
    # in user text `transformers` reads added tokens as text where they are special, and as what
    # they are where not (<think>, <tool_call>): here, in training, all of them are special
    path = Path(out) / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    for token in content["added_tokens"]:
        token["special"] = True
    path.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")


# Nothing here needs PyTorch, which transformers imports beside a tokenizer where it is installed:
# 2 s of every start. Commands set this; in a user's own program transformers keeps PyTorch.
hide_torch = False


def import_transformers() -> ModuleType:
    """Without its advice, given on import, that PyTorch was not found: nothing here needs it."""
    switch = "TRANSFORMERS_NO_ADVISORY_WARNINGS"
    before = os.environ.get(switch)
    os.environ[switch] = "1"
    hidden = hide_torch and "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None
    try:
        import transformers

        transformers.utils.is_torch_available()  # looks now, and never again
    finally:
        if hidden:  # other libraries ask, too, and take None for a module
            del sys.modules["torch"]
        os.environ.pop(switch, None)
        if before is not None:
            os.environ[switch] = before
    return transformers


def _load_wrapped(folder: str | Path) -> Any:
    if not Path(folder).is_dir():
        raise UserError(f"{folder} not found: give a Hugging Face model folder")
    transformers = import_transformers()
    try:
        wrapped = transformers.AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers raises many kinds, all meaning the same here
        detail = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} holds no usable tokenizer ({detail})") from error
    backend = getattr(wrapped, "backend_tokenizer", None)
    if backend is None:
        raise UserError(f"{folder}: a fast tokenizer (tokenizer.json) is needed")
    names = (IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD)
    missing = [name for name in names if backend.token_to_id(name) is None]
    if missing:
        raise UserError(f"{folder}: the tokenizer has no {', '.join(missing)}; not a Qwen-VL one")
    return wrapped


def _add_reward(wrapped: Any, folder: str | Path, vocab_rows: int) -> None:
    from tokenizers import AddedToken

    wrapped.add_tokens([AddedToken(REWARD, special=True, normalized=False)], special_tokens=True)
    reward_id = wrapped.backend_tokenizer.token_to_id(REWARD)
    if reward_id is None or reward_id >= vocab_rows:
        raise UserError(
            f"{folder}: all {vocab_rows} vocabulary rows are in use, none is left for {REWARD}; "
            "use a backbone with spare rows"
        )


def protocol_stamp(
    template: Template,
    tokenizer: Tokenizer,
    processor: Processor,
    positions: str,
    dimensions: Sequence[str],
) -> dict[str, Any]:
    """What a score depends on besides the weights; in JSON types.

    Checkpoints and exports carry it (with the mean and spread of training rewards beside it).
    """
    return {
        "template": template.hash,
        "rubric": template.rubric,
        "result": template.result,
        **({"thinking": True} if template.thinking else {}),
        "tokenizer": tokenizer.digest,
        "reward_token_id": tokenizer.reward_id,
        "min_pixels": processor.min_pixels,
        "max_pixels": processor.max_pixels,
        "patch": processor.patch,
        "merge": processor.merge,
        "positions": positions,
        "dimensions": list(dimensions),
    }
