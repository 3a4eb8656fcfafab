"""The synthetic tasks: RULER's needles, and two-hop chains, written as documents.

A key is an adjective and a noun, a value seven digits:

    needle    One of the special magic numbers for gentle-otter is: 4729103.
    link      One of the special magic numbers for brave-lamp is the one for gentle-otter.      (a chain's first document)
    property  The colour of gentle-otter is teal.                                                (one of 16 colours)
    noise     The quiet river can follow the wooden table near the harbor.
    question  What is the special magic number for brave-lamp?
    question  What is the colour of gentle-otter?                  (`read_pooled`: answered from the pooled memory, no text appended)

With `filler`, noise sentences stand around the sentence that matters: two make a document of about 64 tokens.
A question about a number does not say whether its answer is one hop away or two. The pairs (adjective, noun) are divided once and for
all, whatever the seed: 60 % test, 5 % validation, 35 % training, so that test keys are never seen in training as a pair.
"""
from dataclasses import dataclass, replace

import numpy as np

from common import UserError

TASKS = ("niah_single", "niah_multikey", "two_hop", "read_pooled")
COLOURS = ("azure", "beige", "cobalt", "crimson", "cyan", "fuchsia", "indigo", "khaki", "lavender", "maroon", "mauve", "navy", "ochre",
           "scarlet", "teal", "turquoise")  # none of them is a word of the keys or the noise


@dataclass(frozen=True)
class Question:
    """A question's text, the documents that answer it in the order of the hops (as indices), and the answer.

    pooled: it is answered from what the memory itself holds; nothing is named or appended.
    """
    text: str
    gold: tuple
    answer: str
    pooled: bool = False


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

    def similar_pairs(self, split, count, rng, alike=0.0):
        """`count` distinct pairs of which half share the adjective or the noun with another: hard negatives.

        alike: the share of these whose other word is a neighbour of the other's in the dictionary: they often begin with the same token.
        """
        code = ("test", "validation", "train").index(split)
        chosen = []
        while len(chosen) < count:
            adjective, noun = int(rng.integers(len(self.adjectives))), int(rng.integers(len(self.nouns)))
            if chosen and len(chosen) % 2:
                other = chosen[int(rng.integers(len(chosen)))]
                near = alike and rng.random() < alike
                beside = int(rng.integers(1, 4)) * (1 if rng.random() < 0.5 else -1) if near else 0
                if rng.random() < 0.5:
                    adjective = other // len(self.nouns)
                    noun = (other % len(self.nouns) + beside) % len(self.nouns) if near else noun
                else:
                    noun = other % len(self.nouns)
                    adjective = (other // len(self.nouns) + beside) % len(self.adjectives) if near else adjective
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


def property_text(key, colour):
    return f"The colour of {key} is {colour}."


def property_question(key):
    return f"What is the colour of {key}?"


def fill(words, text, count, rng):
    """`text` at a random place among `count` noise sentences."""
    sentences = [words.noise(rng) for _ in range(count)]
    sentences.insert(int(rng.integers(count + 1)), text)
    return " ".join(sentences)


def question_text(key):
    return f"What is the special magic number for {key}?"


def values(count, rng):
    """`count` strings of seven digits."""
    return [str(value) for value in rng.integers(1_000_000, 10_000_000, size=count)]


def make_pool(words, config, split, rng):
    """One step's documents (list of texts, shuffled) and questions about them (list of Question)."""
    count = config.needles + 2 * config.chains + config.properties
    keys = [words.key(pair) for pair in words.similar_pairs(split, count, rng, config.alike)]
    order = rng.permutation(count).tolist()  # similar keys land in needles and in chains alike
    keys, numbers = [keys[i] for i in order], values(count, rng)
    texts = [needle_text(key, number) for key, number in zip(keys, numbers)]
    golds = [(i,) for i in range(config.needles)]
    for first in range(config.needles, config.needles + 2 * config.chains, 2):
        texts[first] = link_text(keys[first], keys[first + 1])
        golds.append((first, first + 1))
    asked = [Question(question_text(keys[gold[0]]), gold, numbers[gold[-1]]) for gold in golds]
    for i in range(count - config.properties, count):
        colour = COLOURS[rng.integers(len(COLOURS))]
        texts[i] = property_text(keys[i], colour)
        asked.append(Question(property_question(keys[i]), (i,), colour, pooled=True))
    if config.filler:
        texts = [fill(words, text, int(rng.integers(config.filler + 1)), rng) for text in texts]
    texts += words.distinct_noise(config.noise, rng)
    place = rng.permutation(len(texts))  # document i of this list lies at place[i]
    documents = [""] * len(texts)
    for i, text in enumerate(texts):
        documents[place[i]] = text
    return documents, [replace(question, gold=tuple(int(place[i]) for i in question.gold)) for question in asked]


def make_memory(words, task, documents, questions, seed, filler=0):
    """A test memory: texts of `documents` documents and `questions` questions about the first of them.

    The documents that answer the questions come first (shuffle the ones that the shortest memory holds).
    For `niah_single` they are `questions` needles, one for each question, followed by noise only: a question's memory is
    its own needle and the noise. Everything depends on `seed` alone; more documents extend the same memory.
    `filler`: so many noise sentences stand around each document's own sentence.
    """
    rng, filling = (np.random.default_rng([seed, TASKS.index(task), *stream]) for stream in ((), (1,)))
    def filled(texts):
        return [fill(words, text, filler, filling) for text in texts] if filler else texts
    if task == "niah_single":
        keys = [words.key(pair) for pair in words.pairs("test", questions, rng)]
        numbers = values(questions, rng)
        texts = [needle_text(key, number) for key, number in zip(keys, numbers)]
        asked = [Question(question_text(key), (i,), numbers[i]) for i, key in enumerate(keys)]
        return filled(texts + words.distinct_noise(documents - questions, rng)), asked
    hops = 2 if task == "two_hop" else 1
    count = max(documents, questions * hops)
    count += count % hops
    keys = [words.key(pair) for pair in words.pairs("test", count, rng)]
    numbers = values(count, rng)
    if task == "read_pooled":
        colours = [COLOURS[int(number) % len(COLOURS)] for number in numbers]
        texts = [property_text(key, colour) for key, colour in zip(keys, colours)]
        asked = [Question(property_question(keys[i]), (i,), colours[i], pooled=True) for i in range(questions)]
    else:
        texts = [needle_text(key, number) for key, number in zip(keys, numbers)]
        if hops == 2:
            texts[::2] = [link_text(key, next_key) for key, next_key in zip(keys[::2], keys[1::2])]
        asked = [Question(question_text(keys[i]), tuple(range(i, i + hops)), numbers[i + hops - 1])
                 for i in range(0, questions * hops, hops)]
    return filled(texts[:documents]), asked
