"""Deviations of rewards where people meet them: chances, JSON, the service's wire, evaluation."""

import json

import jax
import numpy as np
import pytest

from jrm_jax import client, score
from jrm_jax.evaluation import page, report
from jrm_jax.evaluation.cases import Answer, Case, Comparison, Judged
from jrm_jax.evaluation.unsure import surer_half, unsure
from jrm_jax.service import wire
from jrm_jax.service.pictures import Fault
from jrm_jax.service.scorer import _fill
from jrm_jax.serving.groups import Scores

REWARD_KR = np.array([[1.0, -2.0], [0.0, 0.5]], np.float32)
DEVIATION_KR = np.array([[0.5, 3.0], [2.0, 0.1]], np.float32)
NAMES = ("overall", "style")
PLAIN = Scores(REWARD_KR, REWARD_KR / 2, NAMES)
SCORES = PLAIN._replace(deviation_KR=DEVIATION_KR)


def test_chances_of_pairs():
    sigmoid = 1 / (1 + np.exp(-(REWARD_KR[:, None] - REWARD_KR[None])))
    np.testing.assert_allclose(PLAIN.chance_KKR(), sigmoid, rtol=1e-6)
    found = SCORES.chance_KKR()
    assert found.shape == (2, 2, 2) and found.dtype == np.float32
    np.testing.assert_allclose(found + found.swapaxes(0, 1), 1, rtol=1e-6)
    draws = np.random.default_rng(0).normal(size=(2, 400_000, 2)) * DEVIATION_KR[:, None]
    gap = (REWARD_KR[:, None] + draws)[0] - (REWARD_KR[:, None] + draws)[1]
    np.testing.assert_allclose(found[0, 1], (1 / (1 + np.exp(-gap))).mean(0), atol=2e-3)


def test_groups_of_every_size_share_a_program():
    """K is a caller's: a program for each would take a second each."""
    SCORES.chance_KKR()
    compiled, counting = [], True

    def listen(event, seconds, **_):
        if counting and "backend_compile" in event:
            compiled.append(event)

    jax.monitoring.register_event_duration_secs_listener(listen)
    for count in range(3, 12):
        shape = count, 2
        for spread in (None, np.full(shape, 0.5, np.float32)):
            scores = Scores(np.zeros(shape, np.float32), np.zeros(shape), NAMES, spread)
            np.testing.assert_allclose(scores.chance_KKR(), 0.5, rtol=1e-6)
    counting = False
    assert not compiled


def test_rows_have_a_deviation_only_where_the_model_has():
    for scores in (PLAIN, SCORES):
        first, second = scores.as_rows()
        assert first["reward"] == 1.0 and second["dimensions"] == {"overall": 0.0, "style": 0.5}
        assert ("deviation" in first) == ("deviations" in first) == (scores is SCORES)
    assert first["deviation"] == 0.5 and second["deviations"]["overall"] == 2.0
    alone = Scores(REWARD_KR[:, :1], REWARD_KR[:, :1], NAMES[:1], DEVIATION_KR[:, :1]).as_rows()
    assert alone[1]["deviation"] == 2.0 and "deviations" not in alone[1]


def test_the_table_shows_them(capsys):
    for scores in (PLAIN, SCORES):
        rows = [{"picture": name} | row for name, row in zip("ab", scores.as_rows(), strict=True)]
        score.print_table({"instruction": "x", "candidates": rows})
        shown = capsys.readouterr().out
        assert ("deviation" in shown) == ("2.0000" in shown) == (scores is SCORES)


@pytest.mark.parametrize("scores", [PLAIN, SCORES])
def test_the_service_tells_them_and_the_client_reads_them(scores):
    answer = _fill([None, Fault("picture", "broken"), None], [scores])
    body = json.loads(json.dumps(wire.reply([answer], NAMES, {})))
    (found,) = client.read_scores(body)
    np.testing.assert_array_equal(found.reward_KR[[0, 2]], REWARD_KR)
    assert found.errors[1] == "broken" and np.isnan(found.reward_KR[1]).all()
    if scores is PLAIN:
        assert found.deviation_KR is None and "deviation" not in json.dumps(body)
    else:
        np.testing.assert_array_equal(found.deviation_KR[[0, 2]], DEVIATION_KR)
        assert np.isnan(found.deviation_KR[1]).all()


def test_a_group_that_failed_has_deviations_where_its_neighbours_do():
    """NaN, as its rewards: what is asked of all groups must not stop at one of them."""
    failed = [Fault("picture", "broken")] * 2
    for scores in (PLAIN, SCORES):
        answers = [failed, _fill([None, None], [scores]), failed]
        body = json.loads(json.dumps(wire.reply(answers, NAMES, {})))
        found = [one.deviation_KR for one in client.read_scores(body)]
        if scores is PLAIN:
            assert found == [None] * 3
        else:
            np.testing.assert_array_equal(found[1], DEVIATION_KR)
            assert all(one.shape == (2, 2) and np.isnan(one).all() for one in found[::2])


def test_a_deviation_that_is_no_number_is_no_score():
    endless = np.full_like(DEVIATION_KR, np.inf)
    answer = _fill([None, None], [SCORES._replace(deviation_KR=endless)])
    assert all(isinstance(one, Fault) for one in answer)


def judge(count, spread, known):
    """Pairs of a world in which rewards err by `spread`, some more than others, and say so."""
    rng = np.random.default_rng(3)
    judged = []
    for number in range(count):
        own = spread * rng.choice([0.25, 2.0])
        true = rng.normal(0, 3)
        label = 1 if rng.random() < 1 / (1 + np.exp(-true)) else -1
        said = true + rng.normal(0, own)
        pairs = (Comparison("0", 0, 1, label),)
        case = Case(str(number), str(number), "s", "", (), ((), ()), pairs)
        deviations = (own / np.sqrt(2),) * 2 if known else None
        judged.append(Judged(case, Answer((said, 0.0), deviations=deviations)))
    return judged


def test_equal_deviations_tell_no_halves_apart():
    """Nor does the order of the file: right, wrong and equal scores stand in blocks here."""
    case = judge(1, 1.0, True)[0].case._replace(comparisons=(Comparison("0", 0, 1, 1),))
    judged = [
        Judged(case._replace(id=str(n), group=str(n)), Answer((gap, 0.0), deviations=(1.0, 1.0)))
        for n, gap in enumerate([1.0] * 20 + [-1.0] * 20 + [0.0] * 20)
    ]
    for order in (judged, judged[::-1]):
        found = unsure(order)
        assert found["accuracy_surer"] == found["accuracy_less_sure"] == pytest.approx(0.5)


def test_pairs_of_one_deviation_share_the_halves():
    for values, wanted in (
        ([1, 2, 3, 4], [1, 1, 0, 0]), ([2, 2, 2, 2], [0.5] * 4), ([3, 1, 2, 2], [0, 1, 0.5, 0.5]),
        ([1, 1, 1, 5], [2 / 3] * 3 + [0]), ([2, 1, 3], [0.5, 1, 0]),
    ):  # fmt: skip
        found = surer_half(np.array(values, float))
        np.testing.assert_allclose(found, wanted)
        assert found.sum() == pytest.approx(len(values) / 2)


def test_every_number_has_its_interval():
    found = unsure(judge(400, 4.0, True))
    for kind in ("with", "without"):
        for key, (low, high) in found[kind]["intervals"].items():
            assert low < high and (key == "error" or low < found[kind][key] < high)
    low, high = found["accuracy_surer_interval"]
    assert low < found["accuracy_surer"] < high
    assert all("[" in row["value"] for row in found["rows"])


def test_right_deviations_calibrate_what_means_alone_do_not():
    found = unsure(judge(6000, 4.0, True))
    assert found["with"]["count"] == 6000
    assert found["with"]["error"] < 0.6 * found["without"]["error"]
    assert found["with"]["log_loss"] < found["without"]["log_loss"]
    assert found["accuracy_surer"] > found["accuracy_less_sure"] + 0.1
    assert unsure(judge(30, 4.0, False)) is None and unsure([]) is None
    other = {"dimension": "style", "headline": False}
    style = [one._replace(case=one.case._replace(**other)) for one in judge(9, 1.0, True)]
    both = judge(8, 1.0, True) + style
    counts = [unsure(both, own)["with"]["count"] for own in ((), ("style",), ("other",), NAMES)]
    assert counts == [8, 9, 8, 17]
    names = [row["name"] for row in found["rows"]]
    assert names[0] == "calibration error" and names[-1] == "accuracy by deviation"
    lines = report._probe_lines(found, report.SANITY["unsure"])
    assert lines[0].startswith("How unsure") and any("log loss" in line for line in lines)
    shown = page._probe(found, report.SANITY["unsure"])
    assert "<svg" in shown and "accuracy by deviation" in shown
