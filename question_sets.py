"""Sets of documents with questions about them, and BM25, which searches them by words.

    texts, questions, none = read_set("squad")  # a folder in BEIR's layout, or SQuAD's own .json file
    questions["test"][0]                        # SetQuestion(text="Who ...?", gold=(17,), answers=("...",))
    none["test"][0]                             # ("Why ...?", 17): document 17 does not answer it
    search = bm25_search(texts)
    search("Who ...?", 5)                      # the five best, pairs (place in texts, score)

A document's title is the first line of its text. Questions come by split (train, test and others).
"""
import json
import re
import unicodedata
from collections import Counter
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from common import UserError, is_first_rank, numbered, read_rows, read_text
from documents import Titled, name_in, read_jsonl

UNANSWERED = ("cannotanswer", "unanswerable", "no answer present")  # QuAC's, Qasper's and MS MARCO's words


class SetQuestion(NamedTuple):
    text: str
    gold: tuple           # places, in the list of documents, of those that answer; () where nobody said
    answers: tuple = ()   # all of them right; () where nobody said
    nothing: bool = False  # no document answers it
    whole: bool = False    # gold are pieces of files that were meant as a whole


def titled(title, text):
    """A document's text, behind its title if it has one."""
    return Titled(f"{title}\n{text}") if title else text


def read_set(path, say=print):
    """A folder in BEIR's layout or SQuAD's .json file: (texts, {split: list of SetQuestion}, none).

    none: {split: pairs (question, place of the document that seems to answer it, but does not, or None)}.
    say: told in one line of each file what of it could not be used. Raises UserError.
    """
    return read_beir(path, say) if Path(path).is_dir() else read_squad(path, say)


def is_questions(path):
    """Whether what --data names is a file of one's own questions, not a set."""
    return str(path).lower().endswith(".jsonl")


def set_files(path):
    """The files of a set that is a folder; none of another."""
    if not path or not Path(path).is_dir():
        return []
    return [*Path(path).glob("*.jsonl"), *(Path(path) / "qrels").glob("*.tsv")]


def read_texts(path, say=print):
    """The texts of a set's documents alone; the set needs no questions. Raises UserError."""
    if not Path(path).is_dir():
        return read_squad(path, lambda _: None)[0]
    return read_corpus(path, say)[0]


def choose_split(questions, none, split, path):
    """Of what `read_set` returned the questions of a split, its pairs of `none`, and its name; "": of test,
    else dev, else the only one; "all": of all splits, each once."""
    filled = [*filter(questions.get, questions)] or [*filter(none.get, none)]
    if split == "all" and filled and split not in filled:
        return *(list(dict.fromkeys(chain(*splits.values()))) for splits in (questions, none)), split
    preferred = [name for name in ("test", "dev") if name in filled]
    if not split and (preferred or len(filled) == 1):
        split = [*preferred, *filled][0]
    if split not in filled:
        if not filled:
            raise UserError(f"{path}: no question of it has a document that answers; expected judgements in "
                            "qrels/test.tsv, or SQuAD's .json file with questions")
        asked = f"no split {split!r} with questions" if split else "several splits, none of them test or dev"
        raise UserError(f"{path}: {asked}; give --split {' or '.join(filled)}")
    return questions.get(split, []), none.get(split, []), split


# ------------------------------------------------------------------------------------------------------------
# BEIR's layout: corpus.jsonl, queries.jsonl, qrels/SPLIT.tsv

def read_beir(folder, say=print):
    """As `read_set`. A question may have "answers", a list; without qrels there are no splits.

    Raises UserError that names the file and line.
    """
    texts, place = read_corpus(folder, say)
    path, asked, odd = Path(folder) / "queries.jsonl", {}, Counter()
    for number, row in read_rows(path):
        id, text = name_in(row.get("_id", row.get("id"))), row.get("text", 0)
        if not isinstance(id, str):
            raise UserError(f'{path}:{number}: a question needs an "_id", a string or a whole number')
        if text is None or isinstance(text, str) and not text.strip():
            odd["skipped: empty text"] += 1
        elif id in asked:
            odd["skipped: an _id that was there before"] += 1
        else:
            asked[id] = question_of(row, "text", f"{path}:{number}")
    splits = sorted((Path(folder) / "qrels").glob("*.tsv"))
    judged = {split.stem: read_qrels(split, asked, place, say) for split in splits}
    known = {*chain(*judged.values())}
    unjudged = [question for id, question in asked.items() if id not in known]
    nothing = [(question.text, None) for question in unjudged if question.nothing and judged]
    odd["not asked: no qrels name a document that answers"] = len(unjudged) - len(nothing)
    questions, none = {split: [] for split in judged}, read_impossible(folder, place, [*judged])
    for split in judged if nothing else ():  # without a document, so that training leaves them out
        none.setdefault(split, []).extend(nothing)
    odd["not asked: of a split of impossible.jsonl that no qrels file has"] = sum(
        len(none[split]) for split in none.keys() - judged.keys())
    tell_odd(path, odd, say)
    for split, own in judged.items():
        for question in own.values():
            if question.nothing:
                none.setdefault(split, []).append((question.text, question.gold[0]))
            else:
                questions[split].append(question)
    return texts, questions, none


def tell_odd(path, odd, say):
    """Say what is odd in a file, and how often, if anything is."""
    if any(odd.values()):
        say(f"{path}: " + ", ".join(f"{what} ({count:,})" for what, count in odd.items() if count))


def read_impossible(folder, place, splits):
    """`none` of a folder's impossible.jsonl; {} without one. place: of documents, by their ids. A line:
    {"text": "...", "document": an _id of the corpus, "split": "train"}; without a document training leaves it
    out, and without a split it is of all `splits`. Raises UserError."""
    path, found = Path(folder) / "impossible.jsonl", {}
    for number, row in read_rows(path) if path.is_file() else ():
        document = name_in(row.get("document"))
        if document is not None and (not isinstance(document, str) or document not in place):
            raise UserError(f'{path}:{number}: "document" is {document!r}, no _id of corpus.jsonl')
        question = question_of(row, "text", f"{path}:{number}")
        for split in [str(row["split"])] if row.get("split") else splits:
            found.setdefault(split, []).append((question.text, place.get(document)))
    return found


def read_corpus(folder, say=print):
    """A folder's corpus.jsonl: its texts, titles included, each once, and id -> place among them."""
    path, places, place, odd = Path(folder) / "corpus.jsonl", {}, {}, Counter()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected a set in BEIR's layout: "
                        "corpus.jsonl, queries.jsonl, qrels/test.tsv")
    for id, title, text in read_jsonl(path):
        if not (title + text).strip():
            odd["skipped: empty text"] += 1
        elif id in place:
            odd["skipped: an _id that was there before"] += 1
        else:
            place[id] = places.setdefault(titled(title, text), len(places))
    odd["the same as another, and one document with it"] = len(place) - len(places)
    tell_odd(path, odd, say)
    if not places:
        raise UserError(f"{path}: no document in it")
    return [*places], place


def answered(text, gold, given):
    """The SetQuestion to which a set gives these answers; of UNANSWERED alone, nothing answers it."""
    stands_for_none = lambda answer: answer.rstrip(".").lower() in UNANSWERED
    answers = dict.fromkeys(answer for answer in given if not stands_for_none(answer))
    return SetQuestion(text, gold, tuple(answers), not answers and any(map(stands_for_none, given)))


def question_text(row, name, where):
    """The question of an object {name: question}; where: file and line. Raises UserError."""
    text = row.get(name)
    if not isinstance(text, str) or not text.strip():
        raise UserError(f'{where}: not an object {{"{name}": "...", "answers": ["..."]}} with a question')
    return text


def answer_texts(given, where):
    """The answers in what a set gives: a text, a number, true for yes, or a list of these, perhaps of lists;
    null and NaN are none. Each may be SQuAD's {"text": ...}. where: file, line and name. Raises UserError."""
    opened = lambda part: part["text"] if isinstance(part, dict) and "text" in part else part
    listed = lambda part: part if isinstance(part, list) else [part]
    parts = [opened(one) for part in listed(opened(given)) for one in listed(opened(part))]
    parts = [one for one in parts if one is not None and one == one]
    if not all(type(one) in (str, int, float, bool) for one in parts):
        raise UserError(f"{where} is {given!r}; it must be a list of strings")
    spell = lambda one: ("no", "yes")[one] if type(one) is bool else re.sub(r"\.0$", "", repr(one))
    texts = [one if type(one) is str else spell(one) for one in parts]
    return [text.strip() for text in texts if text.strip()]


def is_impossible(row):
    """Whether a set says of a question that nothing answers it; true and false may be 1 and 0."""
    return row.get("is_impossible") == 1 or row.get("answerable") == 0


def question_of(row, name, where):
    """A SetQuestion, without gold, of an object {name: question, "answers": [...]}; where: file and line.

    Where there are no "answers" it is "answer", and where that is missing what "metadata" has of both;
    "answer_aliases" are right, too. With "is_impossible": true, or "answerable": false, nothing answers it.
    Raises UserError.
    """
    text, answers = question_text(row, name, where), []
    parts = [part for part in (row, row.get("metadata")) if isinstance(part, dict)]
    for part in parts:
        for key in ("answers", "answer", "answer_aliases"):
            if key == "answer_aliases" or not answers:
                answers += answer_texts(part.get(key), f'{where}: "{key}"')
    if any(map(is_impossible, parts)):
        return SetQuestion(text, (), nothing=True)
    return answered(text, (), answers)


def read_qrels(path, asked, place, say=print):
    """The questions of a file qrels/SPLIT.tsv, with their gold documents, by their ids.

    asked: SetQuestions by their ids; place: of documents, by their ids. Judgements of unknown ids are
    skipped; a missing header, scores with a decimal point and the four columns of TREC, whose third one is
    the document, are understood; `say` gets one line that counts them. Raises UserError for a line that is
    not a judgement at all.
    """
    gold, lost, odd, header = {}, set(), Counter(), []
    lines = [(number, line.strip()) for number, line in numbered(read_text(path)) if line.strip()]
    for nth, (number, line) in enumerate(lines):
        columns = [column.strip() for column in (line.split("\t") if "\t" in line else line.split())]
        trec = len(columns) == 4 and not re.match("score|rel|label|grade", "".join(header[2:3]), re.I)
        try:
            score = float(columns[2 + trec])
        except (ValueError, IndexError):
            if nth == 0 and not (columns[0] in asked and columns[-2:][0] in place):
                header = columns  # their names
                continue
            raise UserError(f"{path}:{number}: {line!r} is not a question's id, a document's id and a score, "
                            "with tabs between") from None
        query, document = columns[0], columns[1 + trec]
        odd["no header"] += nth == 0
        odd["four columns"] += trec
        odd["decimal scores"] += not columns[2 + trec].lstrip("-+").isdigit()
        if query not in asked or document not in place:
            odd["skipped: unknown question or document"] += 1
            lost |= {query} if score > 0 and document not in place else set()
        elif score > 0:
            gold.setdefault(query, {})[place[document]] = None  # a dict: in order, each once
    odd["questions judged by the others of their documents alone"] = len(lost & gold.keys())
    tell_odd(path, odd, say)
    return {query: asked[query]._replace(gold=tuple(indices)) for query, indices in gold.items()}


# ------------------------------------------------------------------------------------------------------------
# SQuAD's file, and one's own questions

def read_squad(path, say=print):
    """SQuAD's own file: its paragraphs, titled by their article, and the questions about each. As `read_set`.

    The splits are train and test: every fourth article is for testing. Raises UserError for another file.
    """
    places, questions, none = {}, {"train": [], "test": []}, {"train": [], "test": []}
    odd = Counter()
    wrong = lambda what: UserError(f"{path}: not a file of SQuAD's: {what}; other sets go into a folder in "
                                   "BEIR's layout, one's own questions into a .jsonl file")

    def field(row, name, kind, where):
        """row[name], which must be of this kind; where: what stands before the name."""
        value = row.get(name) if isinstance(row, dict) else None
        if not isinstance(value, kind):
            what = "a list" if kind is list else "a text"
            raise wrong(f"{where}{name} is {json.dumps(value)[:50]}, not {what}")
        return value

    try:
        file = json.loads(read_text(path))
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; expected SQuAD's .json file, or a folder in BEIR's "
                        "layout") from None
    except (ValueError, RecursionError) as error:
        raise wrong(f"{type(error).__name__}: {error}") from None
    for i, article in enumerate(field(file, "data", list, "")):
        split, of_article = "test" if i % 4 == 3 else "train", f"data[{i}]."
        paragraphs = field(article, "paragraphs", list, of_article)
        titles = {"title": name_in(article.get("title") or "")}
        title = field(titles, "title", str, of_article).replace("_", " ")
        for j, paragraph in enumerate(paragraphs):
            of_paragraph = f"{of_article}paragraphs[{j}]."
            context = field(paragraph, "context", str, of_paragraph)
            context = re.sub(r"\s*CANNOTANSWER\s*$", "", context)  # as all of QuAC's end
            if not context.strip():
                odd["skipped: empty context"] += 1
                continue
            place = places.setdefault(titled(title, context), len(places))
            for n, row in enumerate(field(paragraph, "qas", list, of_paragraph)):
                where = f"{of_paragraph}qas[{n}]."
                asked = field(row, "question", str, where).strip()
                if not asked:
                    odd["skipped: empty question"] += 1
                    continue
                given = answer_texts(row.get("answers"), f"{path}: {where}answers")
                question = answered(asked, (place,), given)
                if is_impossible(row) or question.nothing:
                    none[split].append((asked, place))
                else:
                    questions[split].append(question)
    say(f"{path}: every fourth article is for testing: {len(questions['test']):,} questions; "
        f"{len(questions['train']):,} of train")
    tell_odd(path, odd, say)
    return [*places], questions, none


def read_questions(path, documents, say=print):
    """One's own questions about Documents: a list of SetQuestion.

    A line of the file: {"question": "...", "answers": ["..."], "documents": ["notes.md:12"]}; answers and
    documents may be missing, but nothing answers a question without answers whose documents are []. A
    document is a file or id, perhaps with a line; a list of them is a hop. Raises UserError.
    """
    questions, pieces, again = {}, pieces_of(documents), 0
    for number, row in read_rows(path):
        where, gold = f"{path}:{number}", row.get("documents") or []
        if isinstance(gold, list):  # as for training, hop by hop
            gold = [name_in(name) for hop in gold for name in (hop if isinstance(hop, list) else [hop])]
        if not isinstance(gold, list) or not all(isinstance(name, str) for name in gold):
            raise UserError(f'{where}: "documents" is {row["documents"]!r}; it must be a list of strings, or '
                            "of lists of them")
        try:
            found = [places_of(name, pieces, documents) for name in gold]
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        question = question_of(row, "question", where)
        nothing = question.nothing or row.get("documents") == [] and not question.answers
        found = [] if nothing else found
        answers = lambda place: holds(documents[place].text, question.answers)
        meant = [next(filter(answers, places), places[0]) for places in found]  # of a long line what answers
        whole = any(len(places) > 1 and same(name) in pieces for name, places in zip(gold, found))
        question = question._replace(gold=tuple(dict.fromkeys(meant)), nothing=nothing, whole=whole)
        again += question in questions
        questions[question] = None
    if not questions:
        raise UserError(f"{path}: no question in it")
    tell_odd(path, {"skipped: asked again": again}, say)
    return [*questions]


def same(name):
    """A name in the spelling that `documents.name_of` gives to a file's."""
    return unicodedata.normalize("NFC", name)


def pieces_of(documents):
    """The places of each file's or id's Documents. Raises UserError for an id that stands twice."""
    pieces, (id, count) = {}, Counter(document.id for document in documents).most_common(1)[0]
    if count > 1:
        raise UserError(f"two documents have the id {id.rpartition('#')[0]!r}; ids must differ")
    for place, document in enumerate(documents):
        pieces.setdefault(same(document.id.rpartition("#")[0]), []).append(place)
    return pieces


def places_of(name, pieces, documents):
    """The places of the documents that are meant by "notes.md", all of its pieces, or by "notes.md:12", most
    often one. Raises UserError where there are none."""
    name = same(name)
    file, _, line = name.rpartition(":")
    places = pieces.get(name)
    if places is None:
        line = int(line) if line.isdecimal() and len(line) < 10 else 0
        places = [place for place in pieces.get(file, ())
                  if documents[place].first_line <= line <= documents[place].last_line]
    if not places:
        raise UserError(f"{name!r} names no document; give a file below --documents, or an id, and perhaps a "
                        'line of it: "notes.md:12"')
    return places


def holds(text, answers):
    """Whether a text has one of the answers in it, as words, whatever space or line end is between them: "no"
    is not in "known"."""
    spaced = lambda text: " ".join(text.lower().split())
    text, letter = spaced(text), "[^\\W_\u3000-\U0010ffff]"  # Chinese and Japanese words stand side by side
    return any(re.search(rf"(?<!{letter}){re.escape(spaced(one))}(?!{letter})", text) for one in answers)


def place_of(name, pieces, documents, answer):
    """The place of the one document that is meant, as by `places_of`; of a line that is several documents the
    first one that holds the answer. Raises UserError."""
    places = places_of(name, pieces, documents)
    end = documents[places[0]].last_line
    if len(places) > 1 and all(documents[place].first_line <= end for place in places):
        places = [place for place in places if holds(documents[place].text, [answer])][:1]
        if not places:
            raise UserError(f"{name!r} is a line that was split, and no piece of it holds {answer!r}; give a "
                            "larger max_document_tokens, or break the line")
    if len(places) != 1:
        raise UserError(f"{name!r} names {len(places)} documents, not one; give a file below --documents, or "
                        'an id, and a line of it if the file was split: "notes.md:12"')
    return places[0]


# ------------------------------------------------------------------------------------------------------------

def bm25_search(texts):
    """A function (query, k) -> the k best of `texts`, pairs (index, score), by BM25 as Lucene computes it.

    k1 1.2, b 0.75; words are stemmed, and English stop words left out. What has none of the words scores 0.
    """
    try:
        import bm25s
        import Stemmer
    except ImportError:
        raise UserError("BM25 needs bm25s and PyStemmer: pip install -e '.[baselines]'") from None
    words = dict(stemmer=Stemmer.Stemmer("english"), stopwords="en")
    index = bm25s.BM25(method="lucene", k1=1.2, b=0.75)
    bars = is_first_rank() and sum(map(len, texts)) > 10_000_000  # seconds
    tokens = bm25s.tokenize(texts, **words, show_progress=bars)
    if not tokens.vocab:  # stop words alone: nothing is found, and the order stays
        return lambda query, k: [(i, 0.0) for i in range(min(k, len(texts)))]
    index.index(tokens, show_progress=bars)

    def search(query, k):
        found, scores = index.retrieve(bm25s.tokenize([query], **words, show_progress=False),
                                       k=min(k, len(texts)), show_progress=False)
        return list(zip(found[0].tolist(), scores[0].tolist()))
    return search
