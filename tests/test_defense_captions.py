"""defense.captions: what a perturbation keeps, what it adds, and how often each place gets it."""

import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from defense.captions import PERTURBATIONS, list_tokens, random_caption, random_numbers, random_tokens, repeat_words
from defense.tiny import build_tokenizer

captions = st.lists(st.sampled_from(["a", "red", "kite", "the", "mill", "7", "café"]), max_size=8).map(" ".join)
seeds = st.integers(0, 2**32 - 1)
ADDING = ("random-tokens", "repeat-words", "random-numbers")


def is_subsequence(short: list[str], long: list[str]) -> bool:
    rest = iter(long)
    return all(word in rest for word in short)


@pytest.mark.parametrize("name", PERTURBATIONS)
@settings(deadline=None)
@given(caption=captions, seed=seeds)
def test_the_same_seed_gives_the_same_text(name, caption, seed):
    perturb = PERTURBATIONS[name]
    once = perturb(np.random.default_rng(seed), caption)
    assert once == perturb(np.random.default_rng(seed), caption)
    assert once == " ".join(once.split())


@pytest.mark.parametrize("name", ADDING)
@settings(deadline=None)
@given(caption=captions, seed=seeds)
def test_words_are_added_and_none_is_lost(name, caption, seed):
    words = PERTURBATIONS[name](np.random.default_rng(seed), caption).split()
    before = caption.split()
    assert is_subsequence(before, words)
    added = Counter(words) - Counter(before)
    assert added.total() == (0 if name == "repeat-words" and not before else 2)
    if name == "repeat-words":
        assert set(added) <= set(before)
    if name == "random-numbers":
        assert all(word.isdecimal() and int(word) < 100_000 for word in added)
    if name == "random-tokens":
        assert set(added) <= set(list_tokens())


@settings(deadline=None)
@given(caption=captions, seed=seeds, count=st.integers(0, 6))
def test_the_count_is_what_it_says(caption, seed, count):
    n = len(caption.split())
    for perturb in (random_tokens, random_numbers):
        assert len(perturb(np.random.default_rng(seed), caption, count).split()) == n + count
    assert len(repeat_words(np.random.default_rng(seed), caption, count).split()) == (n + count if n else 0)
    assert len(random_caption(np.random.default_rng(seed), caption, count).split()) == count


@settings(deadline=None)
@given(seed=seeds)
def test_a_random_caption_does_not_depend_on_the_caption(seed):
    draws = {random_caption(np.random.default_rng(seed), text) for text in ("", "a red kite", "an old mill")}
    assert len(draws) == 1
    assert set(draws.pop().split()) <= set(list_tokens())


def test_every_word_and_every_place_is_as_likely():
    rng, words, n = np.random.default_rng(0), ["a", "b", "c"], 6_000
    drawn = [repeat_words(rng, " ".join(words), count=1).split() for _ in range(n)]
    repeated = Counter((Counter(text) - Counter(words)).most_common()[0][0] for text in drawn)
    assert stats.chisquare([repeated[word] for word in words]).pvalue > 0.001
    places = Counter(
        next(i for i, word in enumerate(random_numbers(rng, "a b c", count=1).split()) if word.isdecimal())
        for _ in range(n)
    )
    assert set(places) == {0, 1, 2, 3}
    assert stats.chisquare([places[i] for i in range(4)]).pvalue > 0.001


def test_random_tokens_are_tokens_of_clip():
    tokenizer, tokens = build_tokenizer(8), list_tokens()
    assert len(tokens) > 30_000
    assert len(set(tokens)) == len(tokens)
    vocabulary = tokenizer.get_vocab()
    assert all(f"{token}</w>" in vocabulary for token in tokens)


def test_no_torch_is_imported():
    code = (
        "import sys, numpy; from defense.captions import PERTURBATIONS\n"
        "for f in PERTURBATIONS.values(): f(numpy.random.default_rng(0), 'a red kite')\n"
        "assert not {'torch', 'open_clip', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
