"""The synthetic tasks: pools to train on and memories to test with."""
import copy
import re

import numpy as np
import pytest

from common import UserError
from prepare_data import DataConfig
from tasks import TASKS, make_memory, make_pool

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")
LINK = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is the one for ([a-z]+-[a-z]+)\.")
QUESTION = re.compile(r"What is the special magic number for ([a-z]+-[a-z]+)\?")
CONFIG = DataConfig(needles=16, chains=14, noise=4)


def keys_of(texts):
    return [key for text in texts for key in re.findall(r"for ([a-z]+-[a-z]+)", text)]


def pools_of(words, split, stream, count=20, seed=1337):
    return [make_pool(words(), CONFIG, split, np.random.default_rng([seed, stream, i])) for i in range(count)]


def test_pairs_are_divided(words):
    """Fewer than half of the pairs would be left for tests, or a split would be empty."""
    split = words().split
    shares = np.bincount(split, minlength=3) / len(split)
    assert len(split) == len(words().adjectives) * len(words().nouns) and len(shares) == 3
    assert shares[0] >= 0.5 and shares[1] >= 0.04 and shares[2] >= 0.3
    assert len({words().key(pair) for pair in range(0, len(split), 1009)}) == len(range(0, len(split), 1009))


def test_splits_are_disjoint(words):
    """Test keys would be seen in training, whatever the seed: accuracy would then measure memory of the training data."""
    train = {key for seed in (1, 2) for documents, _ in pools_of(words, "train", 0, seed=seed) for key in keys_of(documents)}
    validation = {key for documents, _ in pools_of(words, "validation", 1, seed=1) for key in keys_of(documents)}
    test = {key for task in TASKS for key in keys_of(make_memory(words(), task, 1500, 400, 1)[0])}
    assert len(train) > 1500 and len(validation) > 700 and len(test) > 3000
    assert not train & validation and not train & test and not validation & test


def check_question(question, documents):
    """Follow the documents of a question by their texts; returns its hops."""
    key = QUESTION.fullmatch(question.text)[1]
    for place in question.gold[:-1]:
        found = LINK.fullmatch(documents[place])
        assert found[1] == key
        key = found[2]
    found = NEEDLE.fullmatch(documents[question.gold[-1]])
    assert (found[1], found[2]) == (key, question.answer)
    return len(question.gold)


def test_pools_answer_their_questions(words):
    """A question's gold documents would not lead to its answer, or a document would stand in a pool twice."""
    positions = []
    for documents, questions in pools_of(words, "train", 0):
        assert len(documents) == len(set(documents)) == 16 + 2 * 14 + 4
        assert len(set(keys_of(documents))) == 16 + 2 * 14
        assert sum(not (NEEDLE.fullmatch(text) or LINK.fullmatch(text)) for text in documents) == 4
        assert [check_question(question, documents) for question in questions] == [1] * 16 + [2] * 14
        assert len({place for question in questions for place in question.gold}) == 16 + 2 * 14
        positions += [question.gold[0] for question in questions[:1]]
    assert len(set(positions)) > 10  # the place of a document says nothing


def test_half_of_a_pool_is_similar(words):
    """Training would lack hard negatives: most keys would share no word with another."""
    for documents, questions in pools_of(words, "train", 0, count=5):
        keys = sorted(set(keys_of(documents)))
        adjectives, nouns = zip(*(key.split("-") for key in keys))
        similar = [adjectives.count(a) > 1 or nouns.count(n) > 1 for a, n in zip(adjectives, nouns)]
        assert len(keys) == 44 and sum(similar) >= 22
        asked = {QUESTION.fullmatch(question.text)[1] for question in questions[:16]}
        assert 0 < sum(s for key, s in zip(keys, similar) if key in asked) < sum(similar)  # in needles and in chains alike


@pytest.mark.parametrize("task,hops", [("niah_single", 1), ("niah_multikey", 1), ("two_hop", 2)])
def test_memories_answer_their_questions(words, task, hops):
    """Evaluation would ask what its memory does not hold, or hold a document twice."""
    documents, questions = make_memory(words(), task, 301, 40, 3)
    assert len(documents) == len(set(documents)) == 301 and len(questions) == 40
    assert [check_question(question, documents) for question in questions] == [hops] * 40
    assert sorted(place for question in questions for place in question.gold) == list(range(40 * hops))  # they come first
    assert sum(bool(NEEDLE.fullmatch(text)) for text in documents) == {"niah_single": 40, "niah_multikey": 301, "two_hop": 150}[task]
    assert make_memory(words(), task, 301, 40, 4)[0] != documents


@pytest.mark.parametrize("task", TASKS)
def test_more_documents_extend_a_memory(words, task):
    """Lengths of one evaluation would be different memories: their accuracies could not be compared."""
    documents, questions = make_memory(words(), task, 301, 5, 3)
    for count in (40, 41):
        shorter, asked = make_memory(words(), task, count, 5, 3)
        assert len(shorter) == count and shorter == documents[:count] and asked == questions


def test_few_words(words):
    """Where words are few, a pool would hold a key or a sentence twice: two documents would answer one question."""
    few = copy.copy(words())
    few.adjectives, few.nouns, few.verbs = words().adjectives[:3], words().nouns[:5], words().verbs[:2]
    few.split = np.array([0, 2] * 7 + [0])
    for seed in range(5):
        pairs = few.similar_pairs("train", 7, np.random.default_rng(seed))
        assert sorted(pairs) == list(range(1, 15, 2)) == sorted(few.pairs("train", 7, np.random.default_rng(seed)))
        assert len(set(few.distinct_noise(300, np.random.default_rng(seed)))) == 300


def test_more_keys_than_there_are(words):
    """A memory that is too large would repeat keys or never end."""
    with pytest.raises(UserError, match="there are .* test pairs"):
        words().pairs("test", 10 ** 9, np.random.default_rng(0))
