"""Votes on pairs become preferences and weights."""

import itertools
import random

import numpy as np

from jrm_jax.data.ingest.votes import Vote, connected, tally


def test_shares_weights_and_what_was_not_judged():
    votes = [
        Vote("f[0]", b"a", b"b", (12 / 19, None), 0.75),
        Vote("f[1]", b"c", b"b", (0.0, 1.0)),
        Vote("f[2]", b"b", b"a", (7 / 19, 0.5), 0.25),  # the same share, seen from the other side
        Vote("f[3]", b"c", b"a", (1.0, None)),
        Vote("f[4]", b"a", b"c", (1.0, None), 2.0),
    ]
    edits, preference, weight, odd = tally(votes)
    assert edits == [b"a", b"b", b"c"] and preference.dtype == weight.dtype == np.float32
    assert preference[0, 1].tolist() == [np.float32(12 / 19), 0.5]
    assert preference[1, 2].tolist() == [1, 0] and preference[2, 1].tolist() == [0, 1]
    assert preference[0, 2, 0] == np.float32(2 / 3)
    assert weight[0, 1].tolist() == weight[1, 0].tolist() == [1, 0.25]
    assert weight[0, 2].tolist() == [3, 0] and not np.einsum("iir->ir", weight).any()
    both = weight > 0
    assert (preference + preference.swapaxes(0, 1))[both].tolist() == [1] * int(both.sum())
    assert [detail for _, detail in odd] == ["f[2]", "f[4]", "f[0]: edits 0 and 2 of its group"]
    assert "differing" in odd[2][0]


def test_every_share_and_its_mirror_sum_to_one():
    for i, j in itertools.product(range(1, 40), repeat=2):
        preference = tally([Vote("", b"a", b"b", (i / (i + j),))]).preference[..., 0]
        assert preference[0, 1] + preference[1, 0] == 1 and preference[0, 0] == 0.5


def test_parts_that_share_no_edit_are_apart():
    pairs = ["ab", "cd", "bc", "ef", "gh", "he", "ij", "ba"]
    expected = [{"ab", "cd", "bc", "ba"}, {"ef", "gh", "he"}, {"ij"}]
    for seed in range(20):
        order = random.Random(seed).sample(pairs, len(pairs))
        votes = [Vote("", p[0].encode(), p[1].encode(), (1.0,)) for p in order]
        found = [[(v.first + v.second).decode() for v in part] for part in connected(votes)]
        assert sorted(map(set, found), key=min) == sorted(expected, key=min)
        assert [p for p in order if p in found[0]] == found[0]  # in the order of the files
        assert order[0] == found[0][0]
    assert connected([]) == []
