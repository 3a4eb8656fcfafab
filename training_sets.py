"""What training takes of sets of questions (question_sets.py), and of one's own.

    QuestionSet(path, tokenizer, limit, rng).pool(gold, allowed, config, rng)    # one pool about `gold`

A pool is a passage, some questions about it, and passages that BM25 finds for them in its place. Questions
that a passage does not answer (of impossible.jsonl, or SQuAD's own), and ones in which a name or number is
another's, are answered by NOT_FOUND. Where a set has no questions they are made: what a sentence says is
asked of the rest of its document. Documents about which a test is asked stay out, with all that have the same
title.
"""
import os
import re
import zlib
from collections import Counter
from pathlib import Path

import numpy as np

from common import UserError, read_rows
from documents import Titled, list_documents, spelled_texts
from pools import MOST_SHOWN
from prompts import NOT_FOUND
from question_sets import (
    SetQuestion,
    bm25_search,
    is_questions,
    pieces_of,
    place_of,
    question_of,
    read_set,
    read_texts,
    tell_odd,
)
from tasks import Question

QUESTION_TOKENS = 1024  # longer ones are left out: all questions of a pool are padded to the longest
ANSWER_TOKENS = 24      # a question whose shortest answer is longer is left out: sentences are not answers
ANSWER_WORDS = 4        # but so many words are one, however many tokens they have: a uuid has 36
UPPER, LOWER = "A-ZÀ-ÖØ-ÞΑ-ΩЀ-Я", "a-zß-öø-ÿα-ωа-џ"  # letters
# Names, aside from a first word's capital, and numbers of two digits or more
NAME = re.compile(rf"(?<=[{LOWER},] )[{UPPER}][\w'’-]+(?: [{UPPER}][\w'’-]+)*|\b\d[\d,.]*\d\b")
IMPOSSIBLE = 0.34       # share of questions_per_pool, at most, that a pool's passage does not answer
RANDOM_DOCUMENTS = 1    # of a pool; the others are its passage and what is like it
HELD_OUT = 0.05         # share of the documents about which validation asks
NO_TESTS = ("train", "unlabelled")  # splits of questions that no test asks


def training_questions(path, documents):
    """The Questions of a .jsonl file about `documents`, each with one answer, of "answers" the first, and its
    hops in order, each document in the first hop that names it. Raises UserError that names the line."""
    pieces, questions, odd = pieces_of(documents), {}, Counter()
    wanted = 'an object with "question", "answer" (text) and "documents" (a list)'
    for number, row in read_rows(path, wanted):
        asked = question_of(row, "question", f"{path}:{number}")
        try:
            text, names, pooled = asked.text, row["documents"], row.get("pooled", False)
            if asked.nothing or names == [] and not asked.answers:  # eval.py asks it
                odd["left out: nothing answers"] += 1
                continue
            answer = asked.answers[0]
            if not isinstance(names, list):
                raise TypeError
            hops = [hop if isinstance(hop, list) else [hop] for hop in names]
            if not hops or not all(hops):
                raise UserError("'documents' is empty, or a list in it is; name a document in each")
            gold, found = [], set()
            for hop in hops:
                places = dict.fromkeys(place_of(str(name), pieces, documents, answer) for name in hop)
                gold.append(tuple(place for place in places if place not in found))
                found |= places.keys()
            question = Question(text, tuple(filter(None, gold)), answer, pooled)
            if type(pooled) is not bool or (pooled and len(question.documents) != 1):
                raise UserError(f"'pooled' is {pooled!r}; true or false, and true only with one document")
            odd["skipped: asked again"] += question in questions  # one of two could train, the other validate
            questions[question] = None
        except UserError as error:
            raise UserError(f"{path}:{number}: {error}") from None
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path}:{number}: not {wanted}") from None
    tell_odd(path, odd, print)
    if len(questions) < 2:
        raise UserError(f"{path}: holds {len(questions)} questions; at least 2 are needed, one to train "
                        "on and one to validate with")
    return [*questions]


def is_texts(path):
    """Whether what `data` names is a folder of texts, not a set."""
    path = Path(os.path.expanduser(path))  # settings are checked before their ~ is expanded
    return path.is_dir() and not (path / "corpus.jsonl").exists()


def read_training_set(path, documents, tokenizer, limit, rng):
    """`read_set` of a SET that is one, is made of texts, or asks, as a .jsonl file, about `documents`."""
    own = lambda place: list_documents(place, tokenizer.count, limit, print)
    if is_questions(path):
        found = own(documents)
        questions = training_questions(path, found)
        pooled = sum(question.pooled for question in questions)
        tell_odd(path, {'"pooled": a chat backbone reads their documents\' texts': pooled}, print)
        asked = [SetQuestion(question.text, tuple(question.documents), (question.answer,))
                 for question in questions]
        return spelled_texts(found), {"train": asked}, {}
    if not Path(path).is_dir() or (Path(path) / "queries.jsonl").exists():
        return read_set(path)
    texts = spelled_texts(own(path)) if is_texts(path) else read_texts(path)
    texts, asked = zip(*(cloze(text, rng) for text in texts))
    return texts, {"train": [SetQuestion(question, (i,), (answer,)) for i, found in enumerate(asked)
                             for question, answer in found]}, {}


def cloze(text, rng):
    """A text without one of its sentences, and pairs (question, answer) that this sentence makes: names and
    numbers in it that the others have, too, are asked for (arXiv 1804.00720). Without any: (text, [])."""
    title, end, body = text.partition("\n") if isinstance(text, Titled) else ("", "", text)
    about = re.sub(r"^#{1,6}\s+|\s+#+$|^\W+$", "", title)  # without the marks of a heading
    spaces = re.finditer(rf"(?<=[.!?])\s+(?=[{UPPER}])|\n\s*\n", body)
    starts = [0, *(space.end() for space in spaces), len(body)]
    for i in rng.permutation(len(starts) - 1).tolist():
        sentence, found = body[starts[i]:starts[i + 1]].strip(), []
        rest = (body[:starts[i]] + body[starts[i + 1]:]).rstrip()
        for span in NAME.finditer(sentence):
            answer = span[0].rstrip(".,")
            if re.search(rf"\b{re.escape(answer)}\b", rest) and answer not in title:
                asked = "who or what" if answer[0].isalpha() else "how many"
                if re.fullmatch(r"1\d\d\d|20\d\d", answer):
                    asked = "what year"
                said = sentence[:span.start()] + asked + sentence[span.start() + len(answer):]
                said = " ".join(said.rstrip(".").split())
                found.append((f"{about}: {said}?" if about else f"{said}?", answer))
        if found:
            return type(text)(title + end + rest), found
    return text, []


class QuestionSet:
    """What training takes of a set: texts that may be shown, and questions by what they are about."""

    def __init__(self, path, tokenizer, limit, rng, documents=""):
        texts, questions, none = read_training_set(path, documents, tokenizer, limit, rng)
        self.texts, self.search = texts, bm25_search(texts)
        self.titles = titles = [text.partition("\n")[0] if isinstance(text, Titled) else text
                                for text in texts]
        tests = questions.keys() - {*NO_TESTS}
        tested = {titles[i] for split in tests for question in questions[split] for i in question.gold}
        tested |= {titles[i] for split in tests for _, i in none.get(split, ()) if i is not None}
        self.usable = {i for i, tokens in enumerate(tokenizer.encode_batch(texts))
                       if len(tokens) <= limit and titles[i] not in tested}
        self.about = {}  # gold documents -> (Questions that they answer, Questions that they do not)
        left_out = Counter()
        for question in questions.get("train", ()):
            answer = min(question.answers, key=len, default="")
            if not answer:
                left_out["without an answer"] += 1
            elif len(answer.split()) > ANSWER_WORDS and tokenizer.count(answer) > ANSWER_TOKENS:
                left_out[f"with an answer of more than {ANSWER_TOKENS} tokens"] += 1
            elif tokenizer.count(question.text) > QUESTION_TOKENS:
                left_out[f"of more than {QUESTION_TOKENS} tokens"] += 1
            elif len(question.gold) > MOST_SHOWN:
                left_out[f"about more than {MOST_SHOWN} documents"] += 1
            elif not self.usable.issuperset(question.gold):
                left_out[f"about a document of more than {limit} tokens, or one that is tested"] += 1
            else:
                found = self.about.setdefault(question.gold, ([], []))
                found[0].append(Question(question.text, (question.gold,), answer))
        tell_odd(f"{path}: questions left out", left_out, print)
        self.names = [(titles[gold[0]], name) for gold, (asked, _) in self.about.items()
                      for question in asked for name in NAME.findall(question.text) if name[0].isalpha()]
        for text, place in none.get("train", ()):
            if (place,) in self.about:
                self.about[place,][1].append(Question(text, (), NOT_FOUND))

    def misled(self, question, said, rng):
        """The question with another name or number in place of one of its own, of which `said`, the texts
        that may be shown with it, does not speak; [] where it has none."""
        spans, gold = [*NAME.finditer(question.text)], question.documents
        if not spans or len(gold) > 1:  # of two hops one may answer all the same
            return []
        span = spans[rng.integers(len(spans))]
        if span[0][0].isalpha():
            titles = {self.titles[i] for i in gold}
            drawn = (self.names[i] for i in rng.permutation(len(self.names)))
            others = (name for title, name in drawn if title not in titles)
        else:
            others = ["".join(str(rng.integers(1, 10)) if c.isdigit() else c for c in span[0])]
        new = next((name for name in others if name not in said and name != span[0]), None)
        if new is None:
            return []
        return [Question(question.text[:span.start()] + new + question.text[span.end():], (), NOT_FOUND)]

    def pool(self, gold, allowed, config, rng):
        """(places of documents, Questions) of one pool about `gold`; allowed: places that may stand in it."""
        answered, impossible = ([found[i] for i in rng.permutation(len(found))] for found in self.about[gold])
        few = int(config.questions_per_pool * IMPOSSIBLE)
        found = [[place for place, _ in self.search(question.text, 4 * config.documents_per_pool)]
                 for question in impossible[:few] + answered[:config.questions_per_pool]]
        alike = [place for places in zip(*found) for place in places if place in allowed]
        drawn = rng.choice(sorted(allowed), RANDOM_DOCUMENTS).tolist()
        places = list(dict.fromkeys([*gold, *drawn, *alike]))[:max(config.documents_per_pool, len(gold))]
        said = " ".join(self.texts[place] for place in places)
        for question in answered[:len(answered) // 3]:
            impossible += self.misled(question, said, rng) if len(impossible) < few else []
        chosen = impossible[:few] + answered[:config.questions_per_pool - len(impossible[:few])]
        return rng.permutation(places).tolist(), chosen


def hold_out(sets, folder_of, seed):
    """The documents that validation asks about: {folder: places}; those of a folder are the same whatever
    other sets there are, and for all sets that are about it. sets: QuestionSets by path; folder_of: path ->
    the folder or file of its documents."""
    held = {folder: set() for folder in folder_of.values()}
    for path, own in sets.items():
        draw = np.random.default_rng([seed, zlib.crc32(folder_of[path].name.encode())])
        held[folder_of[path]] |= {i for i in sorted(own.usable) if draw.random() < HELD_OUT}
    for path, own in sets.items():  # what most of few questions are about may have been drawn
        places, asked = held[folder_of[path]], {i for gold in own.about for i in gold}
        if not any(places.isdisjoint(gold) for gold in own.about):
            places -= asked
        if own.about and not any(places & {*gold} for gold in own.about):  # of few documents
            beside = [other.about for at, other in sets.items() if folder_of[at] == folder_of[path]]
            leaves = lambda place: all(any((places | {place}).isdisjoint(gold) for gold in about)
                                       for about in beside)  # every set something to train on
            places.add(next(filter(leaves, sorted(asked)), min(asked)))
    return held
