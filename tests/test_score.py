"""RewardModel and its command: the same number whatever surrounds it; clear words for bad input."""

import dataclasses
import io
import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import PIL.Image
import pytest
from export_case import family_run, make_groups

from jrm_jax import RewardModel, score
from jrm_jax.data import images
from jrm_jax.errors import UserError
from jrm_jax.serving import rows
from jrm_jax.serving.device_call import SCORES
from jrm_jax.serving.groups import read_picture


@pytest.fixture(scope="module")
def workdir():
    return family_run("qwen3_vl")


@pytest.fixture(scope="module")
def model(workdir):
    return RewardModel.load(workdir, batch_size=4, devices=jax.devices()[:1])


@pytest.fixture(scope="module")
def groups():
    return [group for group in make_groups(12) if not isinstance(group[1], str)][1:]


@pytest.fixture
def files(groups, tmp_path):
    """(instruction, source, candidates) as files."""
    text, source, candidates = groups[0]
    for name, data in (
        ("source.png", source),
        *((f"{i}.png", c) for i, c in enumerate(candidates)),
    ):
        (tmp_path / name).write_bytes(read_picture(data))
    return text, tmp_path / "source.png", [tmp_path / f"{i}.png" for i in range(len(candidates))]


def test_scores_do_not_depend_on_what_surrounds_them(model, groups):
    together = [scores.reward_KR[:, 0] for scores in model.score_batch(groups)]
    order = np.random.default_rng(0).permutation(len(groups))
    mixed = model.score_batch([groups[i] for i in order])
    for i, scores in zip(order, mixed, strict=True):
        np.testing.assert_allclose(scores.reward_KR[:, 0], together[i], rtol=0, atol=1e-5)
    for (text, source, candidates), wanted in list(zip(groups, together, strict=True))[:4]:
        alone = model.score(text, source, candidates)
        assert alone.dtype == np.float32 and alone.shape == (len(candidates),)
        np.testing.assert_allclose(alone, wanted, rtol=0, atol=1e-5)
        assert (np.argsort(alone) == np.argsort(wanted)).all()
        turned = model.score(text, source, candidates[::-1])[::-1]
        np.testing.assert_allclose(turned, wanted, rtol=0, atol=1e-5)
        single = model.score(text, source, candidates[:1])
        np.testing.assert_allclose(single, wanted[:1], rtol=0, atol=1e-5)
    assert np.std(np.concatenate(together)) > 0.1


def test_within_a_bucket_scores_are_bit_identical(model, groups):
    text, source, candidates = groups[0]
    others = [candidates, candidates[::-1], candidates[:1] * len(candidates), candidates[::-1]]
    others = [model.encode((text, source, pictures)) for pictures in others]
    (bucket,) = {model.bucket_of(group) for group in others}
    # sets of other sizes may be laid otherwise, after what earlier tests have asked for
    first = model.score_rows(bucket, others[:1] * 4)[0].reward_KR
    found = model.score_rows(bucket, others)
    np.testing.assert_array_equal(found[0].reward_KR, first)
    assert not np.allclose(found[1].reward_KR, first)


def test_rows_of_many_callers_join_in_one_program(model, groups):
    encoded = [model.encode(group) for group in groups[:6]]
    bucket = max(map(model.bucket_of, encoded))
    held = [group for group in encoded if model.bucket_of(group) == bucket]
    alone = [model.score_rows(bucket, [group])[0].reward_KR for group in held]
    before = len(model._runner.device.compiled)
    with ThreadPoolExecutor(4) as pool:
        parts = [held[start : start + 4] for start in range(3)]
        together = list(pool.map(lambda part: model.score_rows(bucket, part), parts))
    for start, found in enumerate(together):
        for wanted, scores in zip(alone[start:], found, strict=False):
            np.testing.assert_array_equal(scores.reward_KR, wanted)
    assert len(model._runner.device.compiled) == before
    with pytest.raises(ValueError, match="a program has 4 rows"):
        model.score_rows(bucket, held[:1] * 5)
    small = dataclasses.replace(bucket, prompt=16)
    taken = model._runner.shelf((SCORES,)).taken
    with pytest.raises(UserError, match="does not fit into its bucket"):
        model.score_rows(small, held[:1])
    assert model._runner.shelf((SCORES,)).taken == taken


def test_a_group_of_many_candidates_is_laid_into_several_rows(model, groups):
    text, source, candidates = groups[0]
    wanted = model.score(text, source, candidates)
    programs = len(model._runner.device.compiled)
    many = model.score(text, source, candidates * 10)
    np.testing.assert_allclose(many, np.tile(wanted, 10), rtol=0, atol=1e-5)
    assert len(model._runner.device.compiled) <= programs + 1


def test_warming_compiles_what_calls_need(workdir, groups):
    model = RewardModel.load(workdir, batch_size=4, programs=2, devices=jax.devices()[:1])
    bucket = model.bucket_of(model.encode(groups[0]))
    model.warm([bucket])
    model.warm([bucket], single=True)
    warm = set(model._runner.device.compiled)
    model.score_rows(bucket, [model.encode(groups[0])])
    model.score(*groups[0])
    assert set(model._runner.device.compiled) == warm and len(warm) == 2
    assert 0 < model.work.padded < 1 and model.work.rows == 2
    with pytest.raises(UserError, match="2 are allowed"):
        model.warm([dataclasses.replace(bucket, prompt=2 * bucket.prompt)])


def test_a_second_model_like_it_compiles_nothing(workdir, model, groups):
    (wanted,) = model.score_batch(groups[:1])
    program = model._runner.device._program((SCORES,))
    before = program._cache_size()
    again = RewardModel.load(workdir, batch_size=4, devices=jax.devices()[:1])
    (found,) = again.score_batch(groups[:1])
    np.testing.assert_array_equal(found.reward_KR, wanted.reward_KR)
    assert again._runner.device._program((SCORES,)) is program
    assert program._cache_size() == before


def test_every_form_of_a_picture_scores_the_same(model, files):
    text, source, candidates = files
    wanted = model.score(text, source, candidates)
    pixels = [images.decode(path.read_bytes()) for path in (source, *candidates)]
    forms = {
        "text": [str(path) for path in (source, *candidates)],
        "bytes": [path.read_bytes() for path in (source, *candidates)],
        "array": pixels,
        "pil": [PIL.Image.fromarray(p) for p in pixels],
    }
    for name, (first, *others) in forms.items():
        np.testing.assert_array_equal(model.score(text, first, others), wanted, err_msg=name)


def test_no_source_and_several_sources(model, files):
    text, source, candidates = files
    none = model.score(text, None, candidates)
    several = model.score(text, [source, candidates[0]], candidates)
    assert none.shape == several.shape == (len(candidates),)
    assert not np.allclose(none, several)


def test_normalised_scores(model, groups, monkeypatch):
    (scores,) = model.score_batch(groups[:1])
    assert np.isnan(scores.normalised_KR).all()  # a run of no steps knows no rewards
    monkeypatch.setitem(model.card, "reward_mean", 0.5)
    monkeypatch.setitem(model.card, "reward_std", 2.0)
    (scores,) = model.score_batch(groups[:1])
    np.testing.assert_allclose(scores.normalised_KR, (scores.reward_KR - 0.5) / 2, rtol=1e-6)


def run(capsys, workdir, *arguments):
    code = 0
    try:
        score.main([f"--model={workdir}", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    return code, capsys.readouterr().out


def test_the_command_ranks(workdir, model, files, tmp_path, capsys):
    text, source, candidates = files
    sheet = tmp_path / "sheet.png"
    options = [f"--source={source}", f"--instruction={text}", *candidates]
    code, out = run(capsys, workdir, *options, "--json", "--critique", "--max_tokens=4",
                    f"--sheet={sheet}")  # fmt: skip
    assert code == 0
    rows = json.loads(out)["candidates"]
    wanted = dict(zip(map(str, candidates), model.score(text, source, candidates), strict=True))
    found = {row["picture"]: row["reward"] for row in rows}
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert all(abs(found[name] - value) < 1e-5 for name, value in wanted.items())
    assert all(isinstance(row["critique"], str) and row["normalised"] is None for row in rows)
    assert PIL.Image.open(sheet).size[0] > 256 * len(candidates)
    code, out = run(capsys, workdir, *options)
    assert code == 0 and out.index(rows[0]["picture"][-5:]) < out.index(rows[-1]["picture"][-5:])


def broken(kind):
    if kind == "truncated":
        file = io.BytesIO()
        noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), np.uint8)
        PIL.Image.fromarray(noise).save(file, "PNG")
        return file.getvalue()[:2000]
    if kind == "text":
        return b"this is no picture\n"
    if kind == "narrow":
        return images_of(1, 20_000)
    return bomb()


def images_of(width, height):
    file = io.BytesIO()
    PIL.Image.new("RGB", (width, height)).save(file, "PNG")
    return file.getvalue()


def bomb():
    """A header that promises 10^10 pixels."""
    small = bytearray(images_of(8, 8))
    small[16:24] = (100_000).to_bytes(4, "big") * 2
    return bytes(small)


@pytest.mark.parametrize("kind, words", [
    ("truncated", "not a readable image"),
    ("text", "not a readable image"),
    ("narrow", "one side may be at most 200 times"),
    ("bomb", "at most 100,000,000 pixels"),
])  # fmt: skip
def test_a_bad_picture_is_named_and_never_scored(workdir, files, tmp_path, capsys, kind, words):
    text, source, candidates = files
    bad = tmp_path / "bad.png"
    bad.write_bytes(broken(kind))
    options = [f"--source={source}", f"--instruction={text}", candidates[0], bad]
    code, _ = run(capsys, workdir, *options)
    assert words in code and "bad.png" in code and "\n" not in code
    code, out = run(capsys, workdir, *options, "--json")
    rows = {row["picture"]: row for row in json.loads(out)["candidates"]}
    assert code == 1 and words in rows[str(bad)]["error"]
    assert "reward" not in rows[str(bad)] and "error" not in rows[str(candidates[0])]
    code, _ = run(capsys, workdir, f"--source={bad}", *options[1:3])
    assert words in code and "source" in code


def test_other_bad_input_is_one_line(workdir, model, files, tmp_path, capsys):
    text, source, candidates = files
    options = [f"--source={source}", f"--instruction={text}"]
    assert "at least one candidate" in run(capsys, workdir, *options)[0]
    none = run(capsys, workdir, *options, candidates[0], "--programs=0")[0]
    assert "--programs=0: at least 1" in none
    for folder in (tmp_path, tmp_path / "nowhere"):
        assert "give the folder of a run" in run(capsys, folder, *options, candidates[0])[0]
    absent = tmp_path / "absent.png"
    assert "absent.png: No such file" in run(capsys, workdir, *options, absent)[0]
    for candidates_given, words in (
        ([], "at least one"), ("a.png", "a list of"), ([3], "a int: give a path"),
        ([np.zeros((4, 4))], "uint8"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=words):
            model.score(text, source, candidates_given)


def test_the_picture_of_a_bad_size_is_named(model):
    good, thin = np.zeros((64, 64, 3), np.uint8), np.zeros((1, 500, 3), np.uint8)
    for source, candidates, name in (
        (good, [good, thin], "candidate 1"), (thin, [good], "source"),
        (PIL.Image.fromarray(good), [PIL.Image.fromarray(thin)], "candidate 0"),
        ([good, thin], [good], "source 1"),
    ):  # fmt: skip
        for ask in (model.need, model.encode):
            with pytest.raises(UserError, match=f"^{name}: .*at most 200 times"):
                ask(("Make it red.", source, candidates))


def test_any_number_of_groups_is_streamed(model, groups):
    taken = []

    def endless():
        for index in itertools.count():
            taken.append(index)
            yield groups[index % len(groups)]

    wanted = [scores.reward_KR for scores in model.score_batch(groups)]
    found = itertools.islice(model.iter_scores(endless()), 3 * len(groups))
    for index, scores in enumerate(found):
        again = wanted[index % len(groups)]
        np.testing.assert_allclose(scores.reward_KR, again, rtol=0, atol=1e-5)
    assert len(taken) < 3 * len(groups) + 80 * model.batch_size  # no further ahead than it must
    broken = [*groups[:3], (*groups[0][:2], [b"no picture"])]
    for index, begun in ((3, broken), (0, broken[:2:-1])):
        streamed = model.iter_scores(begun)
        assert len(list(itertools.islice(streamed, index))) == index
        with pytest.raises(UserError, match=f"group {index}: candidate 0"):
            next(streamed)
    found = list(model.iter_found([broken[3], *broken]))
    assert [isinstance(one, UserError) for one in found] == [True, False, False, False, True]
    for one, again in zip(found[1:4], wanted, strict=False):
        np.testing.assert_allclose(one.reward_KR, again, rtol=0, atol=1e-5)
    assert not list(model.iter_scores([]))


def test_candidates_laid_apart_score_the_same(model, groups):
    encoded = [model.encode(group) for group in groups[:2]]
    wanted = model.score_encoded(encoded)
    for group, scores in zip(encoded, wanted, strict=True):
        parts = rows.apart(group)
        assert all(len(part.candidates) == 1 and not part.prompt.tokens for part in parts)
        found = [one.reward_KR for one in model.score_encoded(parts, one_bucket=True)]
        np.testing.assert_allclose(np.concatenate(found), scores.reward_KR, rtol=0, atol=1e-5)
