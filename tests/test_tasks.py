"""The synthetic tasks: pools to train on and memories to test with."""
import copy
import re

import numpy as np
import pytest

import tasks
from common import UserError
from prepare_data import DataConfig
from tasks import COLOURS, TASKS, Question, Words, grow_memory, make_memory, make_pool

NEEDLE = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is: (\d{7})\.")
LINK = re.compile(r"One of the special magic numbers for ([a-z]+-[a-z]+) is the one for ([a-z]+-[a-z]+)\.")
PROPERTY = re.compile(r"The colour of ([a-z]+-[a-z]+) is ([a-z]+)\.")
NOISE = re.compile(r"The [a-z]+ [a-z]+ can [a-z]+ the [a-z]+ [a-z]+ near the [a-z]+\.")
QUESTION = re.compile(r"What is the (special magic number for|colour of) ([a-z]+-[a-z]+)\?")
CONFIG = DataConfig(needles=16, chains=14, noise=4)
READING = DataConfig(needles=5, chains=3, properties=7, noise=2, filler=3)


def keys_of(texts):
    return [key for text in texts for key in re.findall(r"(?:for|of) ([a-z]+-[a-z]+)", text)]


def pools_of(words, split, stream, count=20, seed=1337, config=CONFIG):
    return [make_pool(words(), config, split, np.random.default_rng([seed, stream, i])) for i in range(count)]


def sentences_of(text):
    """A document's sentences about something, and how many noise sentences stand before and behind them."""
    sentences = text.replace(". ", ".\n").split("\n")
    matter = [i for i, sentence in enumerate(sentences) if not NOISE.fullmatch(sentence)]
    if not matter:
        return [], len(sentences), 0
    return [sentences[i] for i in matter], matter[0], len(sentences) - 1 - matter[-1]


def test_pairs_are_divided(words):
    """Fewer than half of the pairs would be left for tests, or a split would be empty."""
    split = words().split
    shares = np.bincount(split, minlength=3) / len(split)
    assert len(split) == len(words().adjectives) * len(words().nouns) and len(shares) == 3
    assert shares[0] >= 0.5 and shares[1] >= 0.04 and shares[2] >= 0.3
    assert len({words().key(pair) for pair in range(0, len(split), 1009)}) == len(range(0, len(split), 1009))


def test_splits_are_disjoint(words):
    """Test keys would be seen in training, whatever the seed: accuracy would then measure memory of the
    training data."""
    def keys(split, stream, seed):
        return {key for config in (CONFIG, READING)
                for documents, _ in pools_of(words, split, stream, seed=seed, config=config)
                for key in keys_of(documents)}
    train, validation = keys("train", 0, 1) | keys("train", 0, 2), keys("validation", 1, 1)
    test = {key for task in TASKS for key in keys_of(make_memory(words(), task, 1500, 400, 1)[0])}
    assert len(train) > 1500 and len(validation) > 700 and len(test) > 3000
    assert not train & validation and not train & test and not validation & test


def check_question(question, documents):
    """Follow the documents of a question by their texts; returns its hops."""
    about, key = QUESTION.fullmatch(question.text).groups()
    assert question.pooled == (about == "colour of")
    assert all(len(hop) == 1 for hop in question.gold)
    assert question.documents == [hop[0] for hop in question.gold]
    for place in question.documents[:-1]:
        found = LINK.fullmatch(documents[place])
        assert found[1] == key
        key = found[2]
    found = (PROPERTY if question.pooled else NEEDLE).fullmatch(documents[question.documents[-1]])
    assert (found[1], found[2]) == (key, question.answer)
    assert not question.pooled or question.answer in COLOURS
    return len(question.gold)


def test_pools_answer_their_questions(words):
    """A question's gold documents would not lead to its answer, or a document would stand in a pool twice."""
    positions = []
    for documents, questions in pools_of(words, "train", 0):
        assert len(documents) == len(set(documents)) == 16 + 2 * 14 + 4
        assert len(set(keys_of(documents))) == 16 + 2 * 14
        assert sum(not (NEEDLE.fullmatch(text) or LINK.fullmatch(text)) for text in documents) == 4
        assert [check_question(question, documents) for question in questions] == [1] * 16 + [2] * 14
        assert len({place for question in questions for place in question.documents}) == 16 + 2 * 14
        positions += [question.documents[0] for question in questions[:1]]
    assert len(set(positions)) > 10  # the place of a document says nothing


@pytest.mark.parametrize("hops", [1, 3, 4])
def test_longer_chains(words, monkeypatch, hops):
    """Chains of another length than two would not lead to their answers, in pools or in memories."""
    config = DataConfig(needles=2, chains=5, hops=hops, properties=3, noise=1)
    for documents, questions in pools_of(words, "train", 0, count=3, config=config):
        assert len(documents) == len(set(documents)) == 2 + 5 * hops + 3 + 1
        assert [check_question(question, documents)
                for question in questions] == [1] * 2 + [hops] * 5 + [1] * 3
        assert len({place for question in questions for place in question.documents}) == 2 + 5 * hops + 3
    monkeypatch.setitem(tasks.TASKS, "longer", hops)
    documents, questions = make_memory(words(), "longer", 301, 40, 3)
    assert len(documents) == len(set(documents)) == 301
    assert [check_question(question, documents) for question in questions] == [hops] * 40
    assert make_memory(words(), "longer", 250, 40, 3) == (documents[:250], questions)


def test_moved_questions():
    """A question would keep the old place of a document, or lose which documents one round names."""
    moved = Question("Which?", ((2,), (0, 1)), "one", True).moved(np.array([5, 7, 3]))
    assert moved == Question("Which?", ((3,), (5, 7)), "one", True) and moved.documents == [3, 5, 7]


@pytest.mark.parametrize("alike, low, high", [(0, 0, 1), (0.5, 2, 14), (1, 6, 35)])
def test_alike(words, alike, low, high):
    """Routing and naming would not be trained on the keys that a large memory confuses: a word in common, and
    another that begins alike (tell, teller) or ends alike (tell, bell)."""
    words = words()
    for step in (1, -1):  # dictionaries that sort words by their beginnings and by their ends
        places = [{word: place for place, word in enumerate(sorted(found, key=lambda word: word[::step]))}
                  for found in (words.adjectives, words.nouns)]
        near = []
        for seed in range(5):
            pairs = words.similar_pairs("train", 44, np.random.default_rng(seed), alike)
            keys = [words.key(pair).split("-") for pair in pairs]
            adjectives, nouns = (np.array([place[key[i]] for key in keys]) for i, place in enumerate(places))
            a, n = (np.abs(x[:, None] - x) for x in (adjectives, nouns))
            a, n = np.minimum(a, len(words.adjectives) - a), np.minimum(n, len(words.nouns) - n)
            near.append(int(np.triu((a == 0) & (0 < n) & (n <= 3) | (n == 0) & (0 < a) & (a <= 3)).sum()))
            assert len(set(pairs)) == 44
        assert all(low <= count <= high for count in near), (step, near)


def test_alike_without_neighbours(words):
    """Preparing data would hang where all neighbours of the few chosen keys are of other splits."""
    assert len({*words().similar_pairs("validation", 44, np.random.default_rng(4), 1.0)}) == 44


def test_half_of_a_pool_is_similar(words):
    """Training would lack hard negatives: most keys would share no word with another."""
    for documents, questions in pools_of(words, "train", 0, count=5):
        keys = sorted(set(keys_of(documents)))
        adjectives, nouns = zip(*(key.split("-") for key in keys))
        similar = [adjectives.count(a) > 1 or nouns.count(n) > 1 for a, n in zip(adjectives, nouns)]
        assert len(keys) == 44 and sum(similar) >= 22
        asked = {QUESTION.fullmatch(question.text)[2] for question in questions[:16]}
        # in needles and in chains alike
        assert 0 < sum(s for key, s in zip(keys, similar) if key in asked) < sum(similar)


def test_colours_are_no_other_words(words):
    """A colour that is also a word of keys or of noise would stand in documents that do not state it; one
    given twice would be likelier."""
    assert len(COLOURS) == len(set(COLOURS)) == 16
    assert set(COLOURS).isdisjoint([*words().adjectives, *words().nouns, *words().verbs])


def test_properties_and_filler(words):
    """Pools would lack the documents to read from, or a fact would be lost, doubled or always in one place
    among its filler."""
    around, places, colours = [], [], []
    for documents, questions in pools_of(words, "train", 0, config=READING):
        parts = [sentences_of(text) for text in documents]
        facts = [" ".join(matter) for matter, _, _ in parts]
        assert len(documents) == len(set(documents)) == 5 + 2 * 3 + 7 + 2
        assert sorted(map(bool, facts)) == [False] * 2 + [True] * 18
        assert all(before == 1 for fact, before, _ in parts if not fact)  # noise documents stay one sentence
        assert [check_question(question, facts) for question in questions] == [1] * 5 + [2] * 3 + [1] * 7
        assert [question.pooled for question in questions] == [False] * 8 + [True] * 7
        assert len({place for question in questions
                    for place in question.documents}) == len(set(keys_of(documents))) == 18
        around += [(before, behind) for fact, before, behind in parts if fact]
        places.append(questions[-1].documents[0])
        colours += [question.answer for question in questions if question.pooled]
    counts = np.bincount([before + behind for before, behind in around], minlength=4) / 360
    # 0, 1, 2 or 3, alike often
    assert len(counts) == 4 and counts == pytest.approx([0.25] * 4, abs=4 * (0.1875 / 360) ** 0.5)
    assert {(before, behind) for before, behind in around} == {(a, b) for a in range(4) for b in range(4 - a)}
    # 140 of 16
    assert len(set(places)) > 8 and len(set(colours)) == 16 and max(map(colours.count, COLOURS)) < 30


GIVEN = {  # what these words and seeds gave before there were properties and filler
    "pool": ["One of the special magic numbers for dry-cup is: 8598079.",
             "One of the special magic numbers for brave-ant is the one for brave-cup.",
             "One of the special magic numbers for able-dog is: 2041572.",
             "One of the special magic numbers for brave-cup is: 6652272.",
             "The brave dog can see the calm dog near the ant."],
    "niah_single": ["One of the special magic numbers for dry-dog is: 4898142.",
                    "One of the special magic numbers for calm-cup is: 6591050.",
                    "The brave ant can find the brave dog near the dog.",
                    "The able bell can find the brave elm near the cup."],
    "niah_multikey": ["One of the special magic numbers for brave-dog is: 5848852.",
                      "One of the special magic numbers for able-cup is: 6061912.",
                      "One of the special magic numbers for able-elm is: 9158876.",
                      "One of the special magic numbers for dry-bell is: 2494595."],
    "two_hop": ["One of the special magic numbers for calm-elm is the one for brave-dog.",
                "One of the special magic numbers for brave-dog is: 1270375.",
                "One of the special magic numbers for able-cup is the one for dry-bell.",
                "One of the special magic numbers for dry-bell is: 2649301."],
}


@pytest.mark.parametrize("name", GIVEN)
def test_same_data_as_before(name):
    """Without properties and filler a seed would no longer give the data that published numbers were measured
    with."""
    few = object.__new__(Words)
    few.adjectives, few.verbs = ["able", "brave", "calm", "dry"], ["find", "see"]
    few.nouns = ["ant", "bell", "cup", "dog", "elm"]
    few.split = np.array([0, 2] * 10)
    if name == "pool":
        documents, questions = make_pool(few, DataConfig(needles=2, chains=1, noise=1), "train",
                                         np.random.default_rng(5))
        assert [question.gold for question in questions] == [((0,),), ((2,),), ((1,), (3,))]
    else:
        documents, questions = make_memory(few, name, 4, 1 if name == "two_hop" else 2, 3)
    assert documents == GIVEN[name] and not any(question.pooled for question in questions)


@pytest.mark.parametrize("task,hops",
                         [("niah_single", 1), ("niah_multikey", 1), ("two_hop", 2), ("read_pooled", 1)])
def test_memories_answer_their_questions(words, task, hops):
    """Evaluation would ask what its memory does not hold, or hold a document twice."""
    documents, questions = make_memory(words(), task, 301, 40, 3)
    assert len(documents) == len(set(documents)) == 301 and len(questions) == 40
    assert [check_question(question, documents) for question in questions] == [hops] * 40
    # they come first
    assert sorted(place for question in questions for place in question.documents) == list(range(40 * hops))
    needles, properties = (sum(bool(kind.fullmatch(text)) for text in documents)
                           for kind in (NEEDLE, PROPERTY))
    assert (needles, properties) == {"niah_single": (40, 0), "niah_multikey": (301, 0), "two_hop": (150, 0),
                                     "read_pooled": (0, 301)}[task]
    assert make_memory(words(), task, 301, 40, 4)[0] != documents


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("filler", [1, 3])
def test_filler_of_memories(words, task, filler):
    """With filler a memory would hold other facts than without, or another number of noise sentences than it
    says, always in one place."""
    plain, asked = make_memory(words(), task, 203, 5, 3)
    filled, questions = make_memory(words(), task, 203, 5, 3, filler)
    assert questions == asked and len(filled) == 203
    parts = [sentences_of(text) for text in filled]
    single = task == "niah_single"
    facts = [(" ".join(matter), before, behind) for matter, before, behind in parts if matter]
    assert [fact for fact, _, _ in facts] == (plain[:5] if single else plain)
    assert all(before + behind == filler for _, before, behind in facts)
    if single:  # behind the needles: a noise document's own sentence, among so many others
        assert all(before == filler + 1 and own in text
                   for (_, before, _), own, text in zip(parts[5:], plain[5:], filled[5:]))
    else:
        assert {before for _, before, _ in facts} == set(range(filler + 1))


def test_colours_of_a_memory(words):
    """Guessing one colour would answer more than 1 in 16 questions by far."""
    answers = [question.answer for question in make_memory(words(), "read_pooled", 3200, 3200, 1)[1]]
    assert set(answers) == set(COLOURS)
    assert all(abs(answers.count(colour) - 200) <= 4 * (3200 * 15 / 256) ** 0.5 for colour in COLOURS)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("filler", [0, 2])
def test_more_documents_extend_a_memory(words, task, filler):
    """Lengths of one evaluation would be different memories: their accuracies could not be compared."""
    documents, questions = make_memory(words(), task, 301, 5, 3, filler)
    for count in (40, 41):
        shorter, asked = make_memory(words(), task, count, 5, 3, filler)
        assert len(shorter) == count and shorter == documents[:count] and asked == questions


def test_few_words(words):
    """Where words are few, a pool would hold a key or a sentence twice: two documents would answer one
    question."""
    few = copy.copy(words())
    few.adjectives, few.nouns, few.verbs = words().adjectives[:3], words().nouns[:5], words().verbs[:2]
    few.split = np.array([0, 2] * 7 + [0])
    for seed in range(5):
        pairs = few.similar_pairs("train", 7, np.random.default_rng(seed))
        assert sorted(pairs) == list(range(1, 15, 2))
        assert sorted(few.pairs("train", 7, np.random.default_rng(seed))) == sorted(pairs)
        assert len(set(few.distinct_noise(300, np.random.default_rng(seed)))) == 300


def test_more_keys_than_there_are(words):
    """A memory that is too large would repeat keys or never end."""
    with pytest.raises(UserError, match="there are .* test pairs"):
        words().pairs("test", 10 ** 9, np.random.default_rng(0))


@pytest.mark.parametrize("filler", [0, 2])
@pytest.mark.parametrize("task", TASKS)
def test_grown_memories(words, number_tokenizer, task, filler):
    """A length would hold more or fewer tokens than it says, lack the documents that are asked about, or show
    in their numbers or places which documents these are."""
    tokenizer, lengths = number_tokenizer, [1500 * (1 + filler), 6000 * (1 + filler)]
    grown = grow_memory(words(), tokenizer, task, lengths, 7, 3, filler)
    count = grown.counts[-1]
    assert len(grown.texts) == len(grown.numbers) == len(set(grown.numbers)) == len(grown.ends) == count
    sizes = [len(tokenizer.document(n, tokenizer.encode(text)))
             for n, text in zip(grown.numbers, grown.texts)]
    assert grown.ends.tolist() == np.cumsum(sizes).tolist()
    for length, held in zip(lengths, grown.counts):
        assert length - 90 * (1 + filler) < grown.ends[held - 1] <= length
    for i, question in enumerate(grown.questions):
        texts = [grown.needles[i], *grown.texts[1:]] if task == "niah_single" else grown.texts
        facts = [" ".join(sentences_of(text)[0]) for text in texts]
        check_question(question, facts)
        assert max(question.documents) < grown.counts[0]
    gold = [place for question in grown.questions for place in question.documents]
    if task == "niah_single":
        assert set(gold) == {0} and len(set(grown.needles)) == 7
    else:
        assert gold != sorted(gold) and not grown.needles
    assert grown.numbers != sorted(grown.numbers) and max(grown.numbers) >= count - 1


def test_too_many_questions(words, tokenizer):
    """Documents that are asked about would lie outside of the shortest memory."""
    with pytest.raises(UserError, match="500 tokens hold .* documents, 90 questions need 180; ask fewer"):
        grow_memory(words(), tokenizer, "two_hop", [500, 9000], 90, 1)
