"""The synthetic tasks: RULER's needles, and chains of several hops, written as documents.

A key is an adjective and a noun, as gentle-otter, a value seven digits, a colour one of 16. Documents say:

    needle    One of the special magic numbers for gentle-otter is: 4729103.
    link      One of the special magic numbers for brave-lamp is the one for gentle-otter.
    property  The colour of gentle-otter is teal.      (asked about, it is answered from the pooled memory)
    noise     The quiet river can follow the wooden table near the harbor.

A chain is links that end at a needle; a needle alone is a chain of one. A question about a number does not
say how long its chain is. With `filler`, noise sentences stand around the sentence that matters: two make a
document of about 64 tokens. The pairs (adjective, noun) are divided once and for all, whatever the seed: 60 %
test, 5 % validation, 35 % training, so that test keys are never seen in training as a pair.
"""
import re
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from common import UserError, parts_of

# task -> hops of its questions; a new one goes to the end: the place of a task seeds its memory
TASKS = {"niah_single": 1, "niah_multikey": 1, "two_hop": 2, "read_pooled": 1}
COLOURS = ("azure", "beige", "cobalt", "crimson", "cyan", "fuchsia", "indigo", "khaki", "lavender", "maroon",
           "mauve", "navy", "ochre", "scarlet", "teal", "turquoise")  # no words of the keys or the noise
NEEDLE = "One of the special magic numbers for {} is: {}."
LINK = "One of the special magic numbers for {} is the one for {}."
PROPERTY = "The colour of {} is {}."
NUMBER_QUESTION = "What is the special magic number for {}?"
COLOUR_QUESTION = "What is the colour of {}?"


@dataclass(frozen=True)
class Question:
    """A question's text, the documents that answer it, and the answer.

    gold: a tuple of hops in their order, each a tuple of indices: the documents that one round names.
    pooled: it is answered from what the memory itself holds; nothing is named or appended.
    """
    text: str
    gold: tuple
    answer: str
    pooled: bool = False

    @property
    def documents(self):
        """The indices of all documents that answer it, in the order of the hops."""
        return [document for hop in self.gold for document in hop]

    def moved(self, place):
        """The question when document i has become document place[i]."""
        return replace(self, gold=tuple(tuple(int(place[document]) for document in hop) for hop in self.gold))


SPLITS = "test", "validation", "train"


class Words:
    """The words of wonderwords, and the division of all pairs (adjective, noun) into three splits."""

    def __init__(self):
        try:
            from wonderwords import RandomWord
        except ImportError:
            raise UserError("the synthetic tasks need wonderwords: pip install -e '.[data]'") from None

        def words(category):
            found = RandomWord().filter(include_categories=[category])
            return sorted({word for word in found if word.isascii() and word.isalpha() and word.islower()})

        self.adjectives, self.nouns, self.verbs = words("adjective"), words("noun"), words("verb")
        both = self.adjectives, self.nouns  # two dictionaries of numbers: by beginnings, by ends
        self.dictionaries = ([range(len(found)) for found in both],
                             [sorted(range(len(found)), key=lambda i: found[i][::-1]) for found in both])
        draw = np.random.default_rng(0).random(len(self.adjectives) * len(self.nouns), dtype=np.float32)
        self.split = np.digitize(draw, (0.60, 0.65)).astype(np.int8)  # 0 test, 1 validation, 2 train

    def of_split(self, split):
        """Which pairs are of a split, "test", "validation" or "train": bool, by their number."""
        return self.split == SPLITS.index(split)

    def key(self, pair):
        """The key "adjective-noun" of pair number `pair`."""
        return f"{self.adjectives[pair // len(self.nouns)]}-{self.nouns[pair % len(self.nouns)]}"

    def pairs(self, split, count, rng):
        """`count` distinct pairs of one split ("test", "validation", "train"), shuffled."""
        pairs = np.flatnonzero(self.of_split(split))
        if count > len(pairs):
            raise UserError(f"{count:,} keys were asked for, but there are {len(pairs):,} {split} pairs; "
                            "ask for a smaller memory")
        return rng.permutation(pairs)[:count].tolist()  # a larger count extends a smaller one

    def similar_pairs(self, split, count, rng, alike=0.0):
        """`count` distinct pairs of which half share the adjective or the noun with another: hard negatives.

        alike: the share of these whose other words are neighbours in a dictionary, which sorts words by their
            beginnings or by their ends: tell and teller, or tell and bell.
        """
        code = SPLITS.index(split)
        chosen, missed = [], 0  # missed: in a row, as where all neighbours of the chosen are of other splits
        while len(chosen) < count:
            adjective, noun = int(rng.integers(len(self.adjectives))), int(rng.integers(len(self.nouns)))
            if chosen and len(chosen) % 2:
                other = chosen[int(rng.integers(len(chosen)))]
                other_adjective, other_noun = divmod(other, len(self.nouns))
                if alike and rng.random() < alike and missed < 1000:
                    adjective, noun = self.neighbours(other_adjective, other_noun, rng)
                if rng.random() < 0.5:
                    adjective = other_adjective
                else:
                    noun = other_noun
            pair = adjective * len(self.nouns) + noun
            missed += 1
            if self.split[pair] == code and pair not in chosen:
                chosen.append(pair)
                missed = 0
        return chosen

    def neighbours(self, adjective, noun, rng):
        """The numbers of an adjective and a noun up to three places from these in one of the dictionaries."""
        beside = int(rng.integers(1, 4)) * (1 if rng.random() < 0.5 else -1)
        dictionary = self.dictionaries[int(rng.random() < 0.5)]
        return [order[(order.index(word) + beside) % len(order)]
                for order, word in zip(dictionary, (adjective, noun))]

    def noise(self, rng):
        """One sentence about nothing."""
        a, b = rng.integers(len(self.adjectives), size=2)
        n, m, o = rng.integers(len(self.nouns), size=3)
        verb = self.verbs[rng.integers(len(self.verbs))]
        return (f"The {self.adjectives[a]} {self.nouns[n]} can {verb} "
                f"the {self.adjectives[b]} {self.nouns[m]} near the {self.nouns[o]}.")

    def distinct_noise(self, count, rng):
        """`count` noise sentences, all different."""
        sentences = {}
        while len(sentences) < count:
            sentences[self.noise(rng)] = None
        return list(sentences)


def chain_texts(keys, numbers, hops):
    """Chains of `hops` documents each, one chain behind another: links to the next key, then a number."""
    return [LINK.format(key, keys[i + 1]) if (i + 1) % hops else NEEDLE.format(key, numbers[i])
            for i, key in enumerate(keys)]


def chain_question(keys, numbers, first, hops):
    """The question about the chain whose documents are `first` to `first + hops - 1`."""
    gold = tuple((document,) for document in range(first, first + hops))
    return Question(NUMBER_QUESTION.format(keys[first]), gold, numbers[first + hops - 1])


def colour_question(key, document, colour):
    """The question about the document that states the colour of `key`."""
    return Question(COLOUR_QUESTION.format(key), ((document,),), colour, pooled=True)


def hide(needles, sentences, rng):
    """A document of `sentences` with needles at random places between them."""
    sentences = list(sentences)
    for needle in needles:
        sentences.insert(int(rng.integers(len(sentences) + 1)), needle)
    return " ".join(sentences)


def fill(words, text, count, rng):
    """`text` at a random place among `count` noise sentences."""
    return hide([text], [words.noise(rng) for _ in range(count)], rng)


def values(count, rng):
    """`count` strings of seven digits."""
    return [str(value) for value in rng.integers(1_000_000, 10_000_000, size=count)]


def make_pool(words, config, split, rng):
    """One step's documents (list of texts, shuffled) and questions about them (list of Question).

    config: a DataConfig; needles come first, then chains, documents that state a colour, and noise.
    """
    needles, hops = config.needles, config.hops
    properties = needles + hops * config.chains  # the first document that states a colour
    count = properties + config.properties
    keys = [words.key(pair) for pair in words.similar_pairs(split, count, rng, config.alike)]
    keys = [keys[i] for i in rng.permutation(count)]  # similar keys land in needles and in chains alike
    numbers = values(count, rng)
    texts = chain_texts(keys[:needles], numbers, 1)
    texts += chain_texts(keys[needles:properties], numbers[needles:], hops)
    asked = [chain_question(keys, numbers, i, 1) for i in range(needles)]
    asked += [chain_question(keys, numbers, i, hops) for i in range(needles, properties, hops)]
    for i in range(properties, count):
        colour = COLOURS[rng.integers(len(COLOURS))]
        texts.append(PROPERTY.format(keys[i], colour))
        asked.append(colour_question(keys[i], i, colour))
    if config.filler:
        texts = [fill(words, text, int(rng.integers(config.filler + 1)), rng) for text in texts]
    texts += words.distinct_noise(config.noise, rng)
    place = rng.permutation(len(texts))  # document i of this list lies at place[i]
    return [texts[i] for i in np.argsort(place)], [question.moved(place) for question in asked]


def make_memory(words, task, documents, questions, seed, filler=0):
    """A test memory: texts of `documents` documents and `questions` questions about the first of them.

    The documents that answer the questions come first (shuffle the ones that the shortest memory holds).
    For `niah_single` they are `questions` needles, one a question, followed by noise only: a question's
    memory is its own needle and the noise. Everything depends on `seed` alone; more documents extend it.
    `filler`: so many noise sentences stand around each document's own sentence.
    """
    hops = TASKS[task]
    stream = [seed, list(TASKS).index(task)]
    rng = np.random.default_rng(stream)
    count = questions if task == "niah_single" else max(documents, questions * hops)
    count += -count % hops  # whole chains
    keys = [words.key(pair) for pair in words.pairs("test", count, rng)]
    numbers = values(count, rng)
    texts = chain_texts(keys, numbers, hops)
    asked = [chain_question(keys, numbers, i, hops) for i in range(0, questions * hops, hops)]
    if task == "read_pooled":
        colours = [COLOURS[int(number) % len(COLOURS)] for number in numbers]
        texts = [PROPERTY.format(key, colour) for key, colour in zip(keys, colours)]
        asked = [colour_question(keys[i], i, colours[i]) for i in range(questions)]
    if task == "niah_single":
        texts += words.distinct_noise(documents - questions, rng)
    texts = texts[:documents]
    if filler:
        filling = np.random.default_rng([*stream, 1])
        texts = [fill(words, text, filler, filling) for text in texts]
    return texts, asked


def parse_lengths(text):
    """"16k,1m" -> [16384, 1048576]. Raises UserError."""
    lengths = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)([km]?)", part.strip().lower())
        if not match or int(match[1]) == 0:
            raise UserError(f"--lengths {text}: '{part}' is not a length; write tokens as 500, 16k or 1m, "
                            "with commas between")
        lengths.append(int(match[1]) * {"": 1, "k": 1 << 10, "m": 1 << 20}[match[2]])
    return sorted(set(lengths))


@dataclass
class GrowingMemory:
    """A test memory of several lengths, and its questions; documents stand in the order in which it grows."""
    texts: list        # of M documents
    numbers: list      # of the documents, a random permutation: they do not say which documents answer
    ends: np.ndarray   # (M,) tokens of the memory up to the end of each document, as documents are spelled
    counts: list       # documents that each length holds
    questions: list    # Questions about documents of the shortest length
    needles: list      # niah_single: what stands in document 0's place when a question is asked; else nothing


def grow_memory(words, tokenizer, task, lengths, questions, seed, filler=0, ranks=None):
    """The GrowingMemory of a task whose `lengths` are tokens, increasing, with `questions` questions.

    The documents that answer are shuffled into the shortest length. ranks: memory_parallel.Ranks, each of
    which counts the tokens of its share. Raises UserError where the documents do not fit.
    """
    rng = np.random.default_rng(seed)
    single = task == "niah_single"
    example = make_memory(words, task, 64, 1, seed, filler)[0][-1]
    count = lengths[-1] // (tokenizer.count(example) + 8) + questions  # a guess
    if not single:
        keys = int(words.of_split("test").sum())  # the guess for 100m is above all of them
        count = min(count, keys - keys % TASKS[task])
    while True:
        texts, asked = make_memory(words, task, count, questions, seed, filler)
        needles = texts[:questions] if single else []
        texts = texts[questions - 1:] if single else texts
        numbers = rng.permutation(len(texts)).tolist()
        frames = frame_tokens(tokenizer, numbers)
        sizes = count_tokens(tokenizer, texts, ranks)
        ends = np.cumsum(sizes + frames)
        if ends[-1] >= lengths[-1]:
            break
        count += count // 8 + 1
    counts = np.searchsorted(ends, lengths, side="right").tolist()
    needed = 1 if single else max(max(question.documents) for question in asked) + 1
    if needed > counts[0]:
        raise UserError(f"--lengths: {lengths[0]:,} tokens hold {counts[0]} documents, {questions} questions "
                        f"need {needed}; ask fewer --questions or begin with a longer memory")
    place = np.arange(len(texts))  # document i moves to place[i]
    if not single:
        place[:counts[0]] = rng.permutation(counts[0])
    source = np.argsort(place)[:counts[-1]]
    ends = np.cumsum(sizes[source] + frames[:counts[-1]])
    asked = [replace(question, gold=((0,),)) if single else question.moved(place) for question in asked]
    return GrowingMemory([texts[i] for i in source], numbers[:counts[-1]], ends, counts, asked, needles)


def frame_tokens(tokenizer, numbers):
    """(M,) tokens that stand around the texts of documents: their numbers and punctuation."""
    around = [len(tokenizer.document(10 ** digits, [])) for digits in range(len(str(max(numbers))))]
    return np.array([around[len(str(number)) - 1] for number in numbers])


def count_tokens(tokenizer, texts, ranks=None, batch=1000):
    """(M,) token counts of texts. ranks: memory_parallel.Ranks, each of which counts its share of them."""
    rank, world = (ranks.rank, ranks.world) if ranks else (0, 1)
    share = -(-len(texts) // world)
    own = texts[rank * share:(rank + 1) * share]
    found = [len(ids) for part in parts_of(own, batch, "counting tokens", "document")
             for ids in tokenizer.encode_batch(part)]
    counts = F.pad(torch.tensor(found, dtype=torch.int64), (0, share - len(found)))  # the last may have fewer
    if ranks:
        counts = ranks.gather(counts.to(ranks.device)).flatten().cpu()
    return counts[:len(texts)].numpy()
