"""The synthetic tasks: RULER's needles, and two-hop chains, written as documents.

A key is an adjective and a noun, a value seven digits:

    needle    One of the special magic numbers for gentle-otter is: 4729103.
    link      One of the special magic numbers for brave-lamp is the one for gentle-otter.      (a chain's first document)
    noise     The quiet river can follow the wooden table near the harbor.
    question  What is the special magic number for brave-lamp?

A question does not say whether its answer is one hop away or two. The pairs (adjective, noun) are divided once and for
all, whatever the seed: 60 % test, 5 % validation, 35 % training, so that test keys are never seen in training as a pair.
"""
from dataclasses import dataclass

import numpy as np

from common import UserError

TASKS = ("niah_single", "niah_multikey", "two_hop")


@dataclass(frozen=True)
class Question:
    """A question's text, the documents that answer it in the order of the hops (as indices), and the answer."""
    text: str
    gold: tuple
    answer: str


class Words:
    """The words of wonderwords, and the division of all pairs (adjective, noun) into train, validation and test."""

    def __init__(self):
        try:
            from wonderwords import RandomWord
        except ImportError:
            raise UserError("the synthetic tasks need wonderwords: pip install -e '.[data]'") from None
        def words(category):
            found = RandomWord().filter(include_categories=[category])
            return sorted({word for word in found if word.isascii() and word.isalpha() and word.islower()})
        self.adjectives, self.nouns, self.verbs = words("adjective"), words("noun"), words("verb")
        draw = np.random.default_rng(0).random(len(self.adjectives) * len(self.nouns), dtype=np.float32)
        self.split = np.digitize(draw, (0.60, 0.65)).astype(np.int8)  # per pair: 0 test, 1 validation, 2 train

    def key(self, pair):
        """The key "adjective-noun" of pair number `pair`."""
        return f"{self.adjectives[pair // len(self.nouns)]}-{self.nouns[pair % len(self.nouns)]}"

    def pairs(self, split, count, rng):
        """`count` distinct pairs of one split ("test", "validation", "train"), shuffled."""
        pairs = np.flatnonzero(self.split == ("test", "validation", "train").index(split))
        if count > len(pairs):
            raise UserError(f"{count:,} keys were asked for, but there are {len(pairs):,} {split} pairs; ask for a smaller memory")
        return rng.permutation(pairs)[:count].tolist()  # a larger count extends a smaller one

    def similar_pairs(self, split, count, rng):
        """`count` distinct pairs of which half share the adjective or the noun with another: hard negatives."""
        code = ("test", "validation", "train").index(split)
        chosen = []
        while len(chosen) < count:
            adjective, noun = int(rng.integers(len(self.adjectives))), int(rng.integers(len(self.nouns)))
            if chosen and len(chosen) % 2:
                other = chosen[int(rng.integers(len(chosen)))]
                if rng.random() < 0.5:
                    adjective = other // len(self.nouns)
                else:
                    noun = other % len(self.nouns)
            pair = adjective * len(self.nouns) + noun
            if self.split[pair] == code and pair not in chosen:
                chosen.append(pair)
        return chosen

    def noise(self, rng):
        """One sentence about nothing."""
        a, b = rng.integers(len(self.adjectives), size=2)
        n, m, o = rng.integers(len(self.nouns), size=3)
        verb = self.verbs[rng.integers(len(self.verbs))]
        return (f"The {self.adjectives[a]} {self.nouns[n]} can {verb} the {self.adjectives[b]} {self.nouns[m]} "
                f"near the {self.nouns[o]}.")

    def distinct_noise(self, count, rng):
        """`count` noise sentences, all different."""
        sentences = {}
        while len(sentences) < count:
            sentences[self.noise(rng)] = None
        return list(sentences)


def needle_text(key, value):
    return f"One of the special magic numbers for {key} is: {value}."


def link_text(key, next_key):
    return f"One of the special magic numbers for {key} is the one for {next_key}."


def question_text(key):
    return f"What is the special magic number for {key}?"


def values(count, rng):
    """`count` strings of seven digits."""
    return [str(value) for value in rng.integers(1_000_000, 10_000_000, size=count)]


def make_pool(words, config, split, rng):
    """One step's documents (list of texts, shuffled) and questions about them (list of Question)."""
    count = config.needles + 2 * config.chains
    keys = [words.key(pair) for pair in words.similar_pairs(split, count, rng)]
    order = rng.permutation(count).tolist()  # similar keys land in needles and in chains alike
    keys, numbers = [keys[i] for i in order], values(count, rng)
    texts = [needle_text(key, number) for key, number in zip(keys, numbers)]
    golds = [(i,) for i in range(config.needles)]
    for first in range(config.needles, count, 2):
        texts[first] = link_text(keys[first], keys[first + 1])
        golds.append((first, first + 1))
    texts += words.distinct_noise(config.noise, rng)
    place = rng.permutation(len(texts))  # document i of this list lies at place[i]
    documents = [""] * len(texts)
    for i, text in enumerate(texts):
        documents[place[i]] = text
    questions = [Question(question_text(keys[gold[0]]), tuple(int(place[i]) for i in gold), numbers[gold[-1]])
                 for gold in golds]
    return documents, questions


def make_memory(words, task, documents, questions, seed):
    """A test memory: texts of `documents` documents and `questions` questions about the first of them.

    The documents that answer the questions come first (shuffle the ones that the shortest memory holds).
    For `niah_single` they are `questions` needles, one for each question, followed by noise only: a question's memory is
    its own needle and the noise. Everything depends on `seed` alone; more documents extend the same memory.
    """
    rng = np.random.default_rng([seed, TASKS.index(task)])
    if task == "niah_single":
        keys = [words.key(pair) for pair in words.pairs("test", questions, rng)]
        numbers = values(questions, rng)
        texts = [needle_text(key, number) for key, number in zip(keys, numbers)]
        asked = [Question(question_text(key), (i,), numbers[i]) for i, key in enumerate(keys)]
        return texts + words.distinct_noise(documents - questions, rng), asked
    hops = 2 if task == "two_hop" else 1
    count = max(documents, questions * hops)
    count += count % hops
    keys = [words.key(pair) for pair in words.pairs("test", count, rng)]
    numbers = values(count, rng)
    texts = [needle_text(key, number) for key, number in zip(keys, numbers)]
    if hops == 2:
        texts[::2] = [link_text(key, next_key) for key, next_key in zip(keys[::2], keys[1::2])]
    asked = [Question(question_text(keys[i]), tuple(range(i, i + hops)), numbers[i + hops - 1])
             for i in range(0, questions * hops, hops)]
    return texts[:documents], asked
