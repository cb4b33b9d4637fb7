"""What is scored and what comes back: groups of pictures in any form, and their scores.

Letters: K candidates, R reward dimensions.
"""

from __future__ import annotations

import io
import math
import struct
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import numpy as np

from jrm_jax.data.images import to_rgb
from jrm_jax.data.labels import BROKEN_TEXT, is_text
from jrm_jax.data.picture_names import read_named, short
from jrm_jax.data.schema import Candidate, Image, Part, Text
from jrm_jax.errors import UserError
from jrm_jax.gaussian import log_chances

if TYPE_CHECKING:
    import PIL.Image

Picture = Any  # path, data: URI, encoded bytes, PIL image, or uint8 array [h, w, 3]
Parts = tuple[list[Part], list[Candidate]]  # a prompt and its candidates, as encoders take them
Result = TypeVar("Result")


class Scores(NamedTuple):
    """Of one group. Columns stand in the order of `dimensions`.

    reward_KR: float32, unbounded. normalised_KR: (reward - mean) / standard deviation, both of the
    training rewards; NaN where the model does not know them. deviation_KR: float32, of a model
    whose rewards are Gaussians (`config.loss.gaussian`): how unsure it is of each, in units of the
    reward, which is their mean (beside normalised_KR, divide it by that standard deviation, too);
    None of other models.
    """

    reward_KR: np.ndarray
    normalised_KR: np.ndarray
    dimensions: tuple[str, ...]
    deviation_KR: np.ndarray | None = None

    def chance_KKR(self) -> np.ndarray:
        """float32 [K, K, R]: the chance that people prefer candidate i to j, by the model: the
        (expected) sigmoid of the difference of their rewards."""
        gap_KKR = self.reward_KR[:, None] - self.reward_KR[None]
        if self.deviation_KR is None:
            return np.exp(-np.logaddexp(np.float32(0), -gap_KKR))
        square_KR = np.square(self.deviation_KR)
        deviation_KKR = np.sqrt(square_KR[:, None] + square_KR[None])
        return np.exp(log_chances(gap_KKR, deviation_KKR))

    def as_rows(self) -> list[dict[str, Any]]:
        """Of each candidate, for JSON: `reward` and `normalised` (null if unknown) of the first
        dimension, and where there are several `dimensions` {name: reward}. Of Gaussian rewards
        also `deviation`, and where there are several dimensions `deviations`."""
        rows = []
        for k, (reward_R, normalised_R) in enumerate(
            zip(self.reward_KR, self.normalised_KR, strict=True)
        ):
            known = math.isfinite(normalised_R[0])
            row = {
                "reward": float(reward_R[0]),
                "normalised": float(normalised_R[0]) if known else None,
            }
            if len(self.dimensions) > 1:
                row["dimensions"] = dict(zip(self.dimensions, reward_R.tolist(), strict=True))
            if self.deviation_KR is not None:
                row["deviation"] = float(self.deviation_KR[k, 0])
                if len(self.dimensions) > 1:
                    own = zip(self.dimensions, self.deviation_KR[k].tolist(), strict=True)
                    row["deviations"] = dict(own)
            rows.append(row)
        return rows


def to_scores(
    found_KX: np.ndarray, dimensions: tuple[str, ...], mean: np.float32, spread: np.float32
) -> Scores:
    """Of what `step.make_score_step` gives; mean, spread: of the training rewards."""
    reward_KR, deviation_KR = np.split(found_KX, [len(dimensions)], axis=1)
    unsure = deviation_KR if deviation_KR.shape[1] else None
    return Scores(reward_KR, (reward_KR - mean) / spread, dimensions, unsure)


def finite(scores: Scores) -> Scores | UserError:
    """The same; where a number is none, an error in its place."""
    numbers = (scores.reward_KR, scores.deviation_KR)
    if all(np.isfinite(one).all() for one in numbers if one is not None):
        return scores
    return UserError("the model gives a score that is not finite: its weights may be damaged")


def all_finite(found: Sequence[Scores]) -> list[Scores]:
    """
    Raises:
        UserError: a number is none; names the group.
    """
    for index, scores in enumerate(found):
        if isinstance(error := finite(scores), UserError):
            raise UserError(f"group {index}: {error}" if len(found) > 1 else str(error))
    return list(found)


class Group(NamedTuple):
    """One edit and its candidates. `source` may be None, one picture or several."""

    instruction: str
    source: Picture | Sequence[Picture] | None
    candidates: Sequence[Picture]


def read_group(
    group: Group, where: str = "", read: Callable[[Picture], bytes] | None = None
) -> tuple[Parts, list[str]]:
    """(prompt and candidates with encoded pictures, a name of each picture in their order).

    Args:
        where: goes before what a message names, 'group 3: '.
        read: `read_picture`, or `read_size` where no pixels are needed.

    Raises:
        UserError: no text, no candidates, or a picture that cannot be read; it is named.
    """
    if not isinstance(group.instruction, str):
        raise UserError(f"{where}the instruction must be a text")
    if not is_text(group.instruction):
        raise UserError(f"{where}the instruction {BROKEN_TEXT[0]}")
    if isinstance(group.candidates, str | bytes | Path) or not len(group.candidates):
        raise UserError(f"{where}give a list of at least one candidate picture")
    names: list[str] = []

    def image(picture: Picture, name: str) -> Image:
        named = f" ({short(str(picture))})" if isinstance(picture, str | Path) else ""
        names.append(f"{where}{name}{named}")
        try:
            return Image((read or read_picture)(picture))
        except (ValueError, OSError) as error:
            raise UserError(f"{names[-1]}: {_words(error)}") from error

    prompt: list[Part] = [Text(group.instruction)]
    sources = group.source if isinstance(group.source, list | tuple) else [group.source]
    for i, picture in enumerate(sources):
        if picture is not None:
            prompt.append(image(picture, "source" if len(sources) == 1 else f"source {i}"))
    candidates = [
        Candidate((image(picture, f"candidate {i}"),)) for i, picture in enumerate(group.candidates)
    ]
    return (prompt, candidates), names


def naming(
    check: Callable[[bytes], Any], work: Callable[..., Result], parts: Parts, names: Sequence[str]
) -> Result:
    """work(prompt, candidates), of the encoder.

    Args:
        check: what the work does with each picture: `processor.measure` or `processor.encode`.

    Raises:
        UserError: a picture with which that cannot be done, with its name out of `names`.
    """
    try:
        return work(*parts)
    except ValueError as error:
        prompt, candidates = parts
        every = [*prompt, *(part for candidate in candidates for part in candidate.parts)]
        pictures = [part.data for part in every if isinstance(part, Image)]
        found = zip(names, pictures, strict=True)
        name = next((name for name, data in found if problem(check, data)), "a picture")
        raise UserError(f"{name}: {error}") from error


def problem(check: Callable[[bytes], Any], picture: Picture) -> str | None:
    """Why `check` refuses an encoded picture, or why there is none; None where all is well."""
    try:
        check(read_picture(picture))
    except (ValueError, OSError) as error:
        return _words(error)
    return None


def read_picture(picture: Picture) -> bytes:
    """An encoded picture, whatever form it is given in.

    Raises:
        ValueError: none of the known forms. OSError: a file that cannot be read.
    """
    if isinstance(picture, bytes):
        return picture
    if isinstance(picture, str | Path):
        return read_named(str(picture))
    file = io.BytesIO()
    to_rgb(_opened(picture)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def read_size(picture: Picture) -> bytes:
    """As `read_picture`; of a picture in memory only what a PNG begins with, its size."""
    if isinstance(picture, bytes | str | Path):
        return read_picture(picture)
    width, height = _opened(picture).size
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I4sIIB", 13, b"IHDR", width, height, 8)


def _opened(picture: Picture) -> PIL.Image.Image:
    import PIL.Image

    if isinstance(picture, np.ndarray):
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
            shape = f"{picture.dtype} {list(picture.shape)}"
            raise ValueError(f"an array of {shape}: give uint8 [height, width, 3]")
        picture = PIL.Image.fromarray(picture)
    if not isinstance(picture, PIL.Image.Image):
        kind = type(picture).__name__
        raise ValueError(f"a {kind}: give a path, bytes, a PIL image or a uint8 array")
    return picture


def _words(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return " ".join(str(error).split())
