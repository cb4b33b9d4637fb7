"""Chat template and tokenizer; `make_model_folder` also serves the pipeline's tests."""

import hashlib
import json
import os
import pickle
import subprocess
import sys

import pytest
from entry_point import ROOT

from jrm_jax.data import template
from jrm_jax.data.processor import Processor
from jrm_jax.data.schema import Image, Text
from jrm_jax.data.stated import stated_scores
from jrm_jax.data.template import (
    IM_END,
    IM_START,
    IMAGE_PAD,
    REWARD,
    VISION_END,
    VISION_START,
    Template,
    Token,
    load_tokenizer,
    protocol_stamp,
    render,
    save_tokenizer,
)
from jrm_jax.errors import UserError

QWEN_PIECES = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = (
    "Make the red circle blue. system user assistant Result: Judge how well the edit follows the"
    " instruction and preserves the rest.\nThe circle is blue as asked.\nfollowing nine quality ten"
)
SPECIAL = ["<|endoftext|>", IM_START, IM_END, VISION_START, VISION_END, IMAGE_PAD, "<|video_pad|>"]
ROWS = 400
A, B = Image(b"a"), Image(b"b")


def make_model_folder(folder, patch=8, **processor):
    """Tokenizer and image processor in the layout of a Qwen-VL folder."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
    from tokenizers import pre_tokenizers as pre
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.BPE())
    backend.normalizer = normalizers.NFC()
    backend.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(QWEN_PIECES), "isolated"),
            pre.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=380, initial_alphabet=sorted(pre.ByteLevel.alphabet()), show_progress=False
    )
    backend.train_from_iterator([CORPUS] * 3, trainer)
    backend.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    backend.add_tokens([AddedToken("<think>", special=False, normalized=False)])
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token=str(IM_END), pad_token="<|endoftext|>"
    )
    wrapped.save_pretrained(folder)
    fields = {"patch_size": patch, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    fields |= {"size": {"shortest_edge": 256, "longest_edge": 4096}, **processor}
    (folder / "preprocessor_config.json").write_text(json.dumps(fields))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_model_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    return load_tokenizer(folder, ROWS)


def plain(pieces):
    return ["IMAGE" if isinstance(p, Image) else p for p in pieces]


def test_layout():
    prompt, candidates = Template().split([Text("Make it blue."), A], [[B], [Text("No."), B]])
    assert render(prompt) == (
        "<|im_start|>system\nJudge how well the edit follows the instruction and preserves the"
        " rest.<|im_end|>\n<|im_start|>user\nMake it blue.<|vision_start|><|image_pad|>"
        "<|vision_end|>"
    )
    end = "<|im_end|>\n<|im_start|>assistant\n<|reward|>"
    vision = "<|vision_start|><|image_pad|><|vision_end|>"
    assert render(candidates[0]) == f"\nResult:{vision}{end}"
    assert render(candidates[1], [3]) == (
        f"\nResult:\nNo.<|vision_start|>{IMAGE_PAD * 3}<|vision_end|>{end}"
    )
    assert all(isinstance(p, (Token, Image)) or type(p) is str for p in prompt)


@pytest.mark.parametrize(
    "parts", [[A, Text("Make it blue.")], [Text("Draw a cat.")], [Text("One."), Text("Two.")]]
)
def test_prompt_is_cut_behind_a_special_token(parts):
    """The tail of a prompt that ends in text moves into every candidate."""
    prompt, candidates = Template().split(parts, [[A], [B]])
    assert isinstance(prompt[-1], Token)
    assert prompt[-1] == (VISION_END if isinstance(parts[0], Image) else IM_START)
    whole = {render([*prompt, *candidate]) for candidate in candidates}
    assert len(whole) == 1
    words = "\n".join(part.text for part in parts if isinstance(part, Text))
    assert f"{words}\nResult:" in whole.pop()
    assert words in candidates[0][0] and type(candidates[0][1]) is not str


def test_empty_rubric_leaves_the_system_turn_out():
    prompt, _ = Template(rubric="").split([A], [[B], [B]])
    assert render(prompt).startswith("<|im_start|>user\n<|vision_start|>")


TEXTS = [
    "Make the red circle blue.",
    "line\n\n  two \n",
    "naïve e\u0301\u00e9 ﬁ 東京 🙂 ½",
    " it's  40%...\r\n",
    "\n",
    "'ll don't",
]


def encode_pieces(tokenizer, pieces):
    ids = []
    for piece in pieces:
        if isinstance(piece, Image):
            ids.append(tokenizer.image_id)
        elif isinstance(piece, Token):
            ids.append(tokenizer.ids[piece])
        else:
            ids += tokenizer.encode_text(piece)
    return ids


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_tokenise_as_the_whole(folder, tokenizer, tmp_path, text):
    """Against the tokenizer as transformers loads it from an exported folder."""
    from transformers import AutoTokenizer

    save_tokenizer(folder, tmp_path, ROWS)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    for parts in ([Text(text), A], [A, Text(text)], [Text(text), Text(text)]):
        for answer in ([B], [Text(text), B], [B, Text(text)], [Text(text)]):
            prompt, (candidate, _) = Template().split(parts, [answer, [A]])
            critique = tokenizer.encode_critique(text)[0]
            pieces = [*prompt, *candidate]
            whole = render(pieces) + text + IM_END
            ids = [*encode_pieces(tokenizer, pieces), *critique, tokenizer.end_id]
            assert ids == theirs(whole, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(
    "name", [REWARD, IMAGE_PAD, IM_END, VISION_START, "<|endoftext|>", "<think>"]
)
def test_user_text_never_becomes_a_special_token(folder, tokenizer, name):
    from transformers import AutoTokenizer

    text = f"Make {name} blue{name}"
    base = min(AutoTokenizer.from_pretrained(folder).get_added_vocab().values())
    for copy in (tokenizer, pickle.loads(pickle.dumps(tokenizer))):
        ids = copy.encode_text(str(text))
        assert max(ids) < base and not set(ids) & set(copy.ids.values())
        assert copy.decode(ids) == text
        assert max(copy.encode_critique(str(text))[0]) < base


def test_reward_token_takes_the_first_unused_row(folder, tokenizer, tmp_path):
    from transformers import AutoTokenizer

    used = len(AutoTokenizer.from_pretrained(folder))
    assert tokenizer.reward_id == used
    assert load_tokenizer(folder, used + 1).reward_id == used
    with pytest.raises(UserError, match="none is left for <|reward|>".replace("|", r"\|")):
        load_tokenizer(folder, used)
    save_tokenizer(folder, tmp_path, ROWS)
    again = load_tokenizer(tmp_path, used + 1)  # an export keeps its row
    assert again.reward_id == used and again.digest == tokenizer.digest


def test_score_line_is_found(tokenizer, monkeypatch):
    ids, before = tokenizer.encode_critique("Good é.\nfollowing nine")
    assert tokenizer.decode(ids[:before]) == "Good é.\n"
    assert tokenizer.decode(ids[before:]) == "following nine"
    assert tokenizer.encode_critique("following nine")[1] == 0
    ids, before = tokenizer.encode_critique("a\nb\nnine\n")
    assert tokenizer.decode(ids[before:]).strip() == "nine"
    words = tokenizer.encode_text("a white cat")
    monkeypatch.setattr(tokenizer, "_backend", None)  # what was read once is kept
    assert tokenizer.encode_critique("a\nb\nnine\n") == (ids, before)
    assert tokenizer.encode_text("a white cat") == words


@pytest.mark.parametrize("end", ["", "\n", "\n    ", "  \n\t\n", "\r\n", "\n\u3000"])
def test_the_line_that_is_masked_is_the_one_whose_scores_are_read(tokenizer, end):
    text = f"Fine.\nfollowing ten preservation two{end}"
    stated = stated_scores(text, ["following", "preservation"])
    assert stated == {"following": 10, "preservation": 2}
    ids, before = tokenizer.encode_critique(text)
    assert tokenizer.decode(ids[:before]) == "Fine.\n"


def test_cache_is_bounded(folder):
    tokenizer = load_tokenizer(folder, ROWS)
    tokenizer.CACHE_SIZE = 10
    first = tokenizer.encode_text("0 1")
    for number in range(100):
        tokenizer.encode_text(f"{number} 1")
        tokenizer.encode_critique(f"{number} 1")
    assert len(tokenizer._texts) <= 10 and len(tokenizer._critiques) <= 10
    assert tokenizer.encode_text("0 1") == first


def test_folders_that_do_not_do(tmp_path):
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    with pytest.raises(UserError, match="not found"):
        load_tokenizer(tmp_path / "absent", ROWS)
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path, ROWS)
    other = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.BPE()))
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=r"has no <\|im_start\|>"):
        load_tokenizer(tmp_path / "other", ROWS)


def test_stamp_changes_with_what_it_stands_for(tokenizer):
    base = (Template(), tokenizer, Processor(8, 2, 256, 4096), "mrope", ("overall",))
    stamp = protocol_stamp(*base)
    assert json.loads(json.dumps(stamp)) == stamp
    assert stamp["reward_token_id"] == tokenizer.reward_id
    for place, other in (
        (0, Template(rubric="Judge.")),
        (0, Template(result="\nEdited:")),
        (2, Processor(8, 2, 256, 8192)),
        (3, "1d"),
        (4, ("overall", "quality")),
    ):
        changed = [*base]
        changed[place] = other
        assert protocol_stamp(*changed) != stamp
    assert Template().hash == Template().hash == stamp["template"]


def test_an_empty_thinking_block_stands_before_the_reward_token(tokenizer):
    plain, thinking = (Template().of_family(f) for f in ("qwen3_vl", "qwen3_5"))
    assert plain == Template()  # other families' stamps and hashes stay as they were
    content = json.dumps([1, Template().rubric, Template().result])
    assert plain.hash == hashlib.sha256(content.encode()).hexdigest()[:16] != thinking.hash
    (_, (before, _)), (_, (after, _)) = (t.split([A], [[B], [B]]) for t in (plain, thinking))
    words = "<|im_start|>assistant\n{}<|reward|>"
    assert render(before).endswith(words.format(""))
    assert render(after).endswith(words.format("<think>\n\n</think>\n\n"))
    assert after[-5:-1] == ["<think>", "\n\n", "</think>", "\n\n"]
    assert [type(piece) for piece in after[-5:]] == [Token, str, Token, str, Token]
    parts = (tokenizer, Processor(8, 2, 256, 4096), "mrope", ("overall",))
    assert protocol_stamp(thinking, *parts)["thinking"] is True
    assert "thinking" not in protocol_stamp(plain, *parts)


QUIET = """
import os, sys
sys.modules["torch"] = None     # as where PyTorch is not installed
from jrm_jax.data.template import load_tokenizer
load_tokenizer("jrm_jax/assets/tiny_qwen3_vl", 10**6)
print("transformers" in sys.modules, os.environ.get("TRANSFORMERS_NO_ADVISORY_WARNINGS"))
"""


@pytest.mark.parametrize("before", [None, "0"])
def test_reading_a_tokenizer_is_silent_without_pytorch(before, tmp_path):
    """And leaves the library's switch as it was."""
    env = {n: v for n, v in os.environ.items() if n != "TRANSFORMERS_NO_ADVISORY_WARNINGS"}
    env |= {"TRANSFORMERS_NO_ADVISORY_WARNINGS": before} if before else {}
    env["XDG_CACHE_HOME"] = str(tmp_path)
    command = [sys.executable, "-c", QUIET]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert (done.stdout, done.stderr) == (f"True {before}\n", "")


def test_what_transformers_has_read_is_kept(tmp_path, monkeypatch):
    """The same tokenizer, without that library; anew where a file or what lies there is another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = make_model_folder(tmp_path / "model")
    calls, load = [], template._load_wrapped
    monkeypatch.setattr(template, "_load_wrapped", lambda f: calls.append(f) or load(f))
    first = load_tokenizer(folder, ROWS)
    again = load_tokenizer(folder, ROWS)
    assert len(calls) == 1 and again.__reduce__() == first.__reduce__()
    assert again.encode_text("<|reward|> blue") == first.encode_text("<|reward|> blue")
    load_tokenizer(folder, ROWS + 1)  # another table has another spare row
    (folder / "tokenizer_config.json").write_text(
        (folder / "tokenizer_config.json").read_text() + " "
    )
    load_tokenizer(folder, ROWS)
    assert len(calls) == 3
    for path in (tmp_path / "cache").rglob("*.json"):
        path.write_text("[1]")
    assert load_tokenizer(folder, ROWS).__reduce__() == first.__reduce__() and len(calls) == 4
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "tokenizer.json"))  # no folder
    assert load_tokenizer(folder, ROWS).__reduce__() == first.__reduce__()
