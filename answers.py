"""How well a set's questions are answered: methods with the same prompt, reader and count of documents.

    none      the question alone
    oracle    its gold documents, however many; of long ones the passages that hold an answer come first
    bm25      the first k documents that BM25 finds
    routing   recall alone, before the second look, where a model has learned to look twice
    memory    the first k documents that the model finds in its memory: by routing, in one round or two, and
              by that second look, which may find that the first one is enough

Documents stand in the prompt in the order in which they were found. Recall is measured on every question
that has gold documents; answers and second looks, which take longer, on some. Answers are compared as SQuAD
compares them.
"""
import re
import string
from bisect import bisect_left, bisect_right
from collections import Counter
from functools import cache

import numpy as np

from batches import Find
from common import drawing, parts_of, timed
from interleave import answers_from_texts, context_of, documents_of, look_again, rounds_of, run
from prompts import NOT_FOUND
from question_sets import holds

METHODS = ("none", "oracle", "bm25", "routing", "memory")
AT = (1, 5, 16)     # recall is of the first so many
RECALLS = (*(f"recall_at_{n}" for n in AT), f"all_gold_at_{AT[-1]}")
SCORES = ("exact_match", "f1", "contained", "empty", "not_found")
RESAMPLES = 1000    # of the bootstrap
SHOWN = 8           # passages of long documents that the oracle shows at most, of all that are gold
PUNCTUATION = str.maketrans("", "", string.punctuation)


# ------------------------------------------------------------------------------------------------------------
# One question's score

def words_of(text):
    """SQuAD's normalisation: the words of a text in lower case, without punctuation and articles."""
    text = text.lower().translate(PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def f1(words, accepted):
    """The harmonic mean of precision and recall of an answer's words; of an empty side: whether both are."""
    if not words or not accepted:
        return float(words == accepted)
    common = (Counter(words) & Counter(accepted)).total()
    return 2 * common / (len(words) + len(accepted))


def score_answer(answer, accepted):
    """SCORES of an answer, each the best over the accepted answers (strings, at least one).

    contained: an accepted answer's words stand in the answer, side by side; not_found: it is NOT_FOUND.
    """
    words, accepted = words_of(answer), [words_of(text) for text in accepted]
    inside = [bool(own) and f" {' '.join(own)} " in f" {' '.join(words)} " for own in accepted]
    return (float(words in accepted), max(f1(words, own) for own in accepted), float(any(inside)),
            float(not answer.strip()), float(answer.strip() == NOT_FOUND))


def score_ranking(documents, gold):
    """RECALLS of a ranking, best first: the share of gold documents among the first, and whether all are."""
    shares = [len({*documents[:n]} & {*gold}) / len(gold) for n in AT]
    return (*shares, float(shares[-1] == 1))


def interval(differences, seed):
    """[mean, low, high] of paired differences (n,): a bootstrap's 95 % interval of the mean."""
    rng, differences = np.random.default_rng(seed), np.asarray(differences, float)
    n = len(differences)  # one draw after another: of 100,000 questions all at once would take gigabytes
    means = [differences[rng.integers(n, size=n)].mean() for _ in range(RESAMPLES)]
    return [float(x) for x in (differences.mean(), *np.percentile(means, (2.5, 97.5)))]


# ------------------------------------------------------------------------------------------------------------
# Finding and reading

def loop_ranked(model, tokenizer, memory, texts, question, config, look):
    """A loop: the positions of the documents that the model finds for a question, best first, how many of
    them it would read, and the best score of its first round; texts: token ids by position; look: at how many
    it looks twice.

    What rounds name comes first, then what the last one has found besides. A last round whose second look
    named nothing has ordered nothing: there what the first look read comes first. Without a second look a
    chat backbone has two rounds only where config, an InterleaveConfig, says so; both name half of the 16.
    """
    tokens, routes = tokenizer.routed(question)
    most, count = documents_of(model, config) if look else AT[-1], rounds_asked(model, config, look)
    rankings = yield Find(tokens, memory, routes, len(tokenizer.head), count)
    rounds = yield from look_again(model, tokenizer, question, rankings, texts, int, config.router_weight,
                                   most, look)
    best = max((score for ranked in rankings[:1] for _, score in ranked), default=float("-inf"))
    named = [document for ranked, count in rounds for document, _ in ranked[:count]]
    others = [document for ranked, count in rounds[::-1] for document, _ in ranked[count:]]
    if look and len(rounds) > 1 and not rounds[-1][1]:
        others = [document for document, _ in rounds[0][0][:look]] + others
    found = list(dict.fromkeys(named + others))
    yield found, len(named) if look else len(found), best


def rounds_asked(model, config, look):
    """How many rounds `loop_ranked` has."""
    if model.config.prompts != "chat" or not (look or config.max_rounds > 0):
        return 1
    return max(min(rounds_of(model, config), documents_of(model, config) if look else 2, 2), 1)


def ranked(model, tokenizer, memory, texts, questions, config, batch, look):
    """(positions, how many are read, best score) of each question, as of `loop_ranked`."""
    loops = (loop_ranked(model, tokenizer, memory, texts, question, config, look) for question in questions)
    return [found for _, found in sorted(run(model, tokenizer, loops, config, batch, memory))]


def refused(questions, best, reaches):
    """The share that is refused of the questions that have an answer, and of those that nothing answers; None
    where there are none. best: text -> best score; reaches: what it reaches by chance, -inf if unknown."""
    parts = [[best[question.text] <= reaches for question in questions if question.nothing == nothing]
             for nothing in (False, True)]
    return [float(np.mean(part)) if part and reaches > float("-inf") else None for part in parts]


def told_not_found(questions, find, read, ks, batch=8):
    """{k: the share that is told NOT_FOUND of the questions that nothing answers, from the first k documents
    that `find` finds}; {} where there are no such questions."""
    none, shares = [question for question in questions if question.nothing], {}
    if not none:
        return shares
    rankings, _ = find_all(find, none, "nothing answers", batch)
    for k in ks:
        said = read([(question.text, documents[:min(k, most)])
                     for question, (documents, most) in zip(none, rankings)])
        shares[k] = float(np.mean([answer.strip() == NOT_FOUND for answer, _ in said]))
    return shares


def find_all(find, questions, label, batch):
    """What `find` finds for every question, as for `measure`, and the mean seconds of one."""
    seconds, rankings = timed(lambda: [found for part in parts_of(questions, 2 * batch, label, "question")
                                       for found in find([question.text for question in part])])
    return rankings, seconds / len(questions)


def reader(model, tokenizer, texts, config, batch, say=print):
    """A function: pairs (question, documents) -> (answer, seconds) of each; nothing is read twice.

    texts: token ids of documents by position, which is the number that they have in the prompt. say: is told
    once where a chat backbone's message cannot hold all documents.
    """
    known = {}
    cut = cache(lambda: say("the last documents of some messages are left out, as this model reads "
                            f"{context_of(model):,} tokens at once; lower --k"))

    def read(asked):
        asked = [(question, *documents) for question, documents in asked]
        new = list(dict.fromkeys(one for one in asked if one not in known))
        given = [(question, [(d, texts[d]) for d in documents]) for question, *documents in new]
        seconds, found = timed(lambda: answers_from_texts(model, tokenizer, given, config, batch, cut))
        known.update({one: (answer, seconds / len(new)) for one, answer in zip(new, found)})
        return [known[one] for one in asked]
    return read


# ------------------------------------------------------------------------------------------------------------
# The table

def draw(items, count, seed):
    """`count` random ones of a list, in their order, fixed by the seed."""
    return [items[i] for i in sorted(np.random.default_rng(seed).permutation(len(items))[:count])]


def measure(questions, chosen, finders, read, ks, seed, owner, texts, batch=8, looked=()):
    """The rows of a table, objects of RECALLS, SCORES and seconds, method by method for every k.

    finders: of bm25 and memory, perhaps of routing: questions' texts -> pairs (documents, best first, how
    many of them are read at most). With routing, memory is asked the questions `looked` at, if any, alone.
    read: a `reader`; chosen: the indices of the questions that are answered.
    owner, texts: the document of each passage, increasing, and its text. Finders deal with passages, of which
    k counts so many; recall counts documents, and the oracle shows what `shown` takes.

    What does not apply is None. Rows of memory hold what it has over bm25, with intervals.
    """
    judged = [i for i, question in enumerate(questions) if question.gold]
    rankings, seconds, recalls = {}, dict.fromkeys(METHODS, 0.0), {}
    owners_of = lambda places: [*dict.fromkeys(owner[i] for i in places)]
    for method, find in finders.items():
        asked = range(len(questions))
        if method == "memory" and "routing" in finders and looked:
            asked = looked
        found, seconds[method] = find_all(find, [questions[i] for i in asked], f"{method} finds", batch)
        rankings[method] = dict(zip(asked, found))
        recalls[method] = {i: score_ranking(owners_of(rankings[method][i][0]), questions[i].gold)
                           for i in asked if questions[i].gold}
    given = ("none", "oracle") if {*chosen} <= {*judged} else ("none",)
    methods = [method for method in METHODS if method in finders or chosen and method in given]

    def documents_for(method, i, k):
        """The documents from which a method answers question i."""
        if method == "none":
            return ()
        if method == "oracle":
            return shown(questions[i], owner, texts)
        documents, most = rankings[method][i]
        return documents[:min(k, most)]

    rows = []
    for k in ks if chosen else [None]:
        scores = {}
        for method in methods:
            row = dict(method=method, k=k) | dict.fromkeys((*RECALLS, *SCORES, "seconds_per_question"))
            if recalls.get(method):
                row |= zip(RECALLS, np.mean([*recalls[method].values()], 0).tolist())
                row["questions_of_recall"] = len(recalls[method])
            if chosen and method != "routing":
                said = [one for part in parts_of(chosen, 2 * batch, f"{method} answers, k {k}", "question")
                        for one in read([(questions[i].text, documents_for(method, i, k)) for i in part])]
                scores[method] = np.array([score_answer(answer, questions[i].answers)
                                           for (answer, _), i in zip(said, chosen)])
                row |= zip(SCORES, scores[method].mean(0).tolist())
                spent = float(np.mean([took for _, took in said])) + seconds[method]
                row["seconds_per_question"] = round(spent, 5)
            rows.append(row)
        if recalls["memory"]:
            gains = [recalls["memory"][i][0] - recalls["bm25"][i][0] for i in recalls["memory"]]
            rows[-1]["recall_at_1_over_bm25"] = interval(gains, seed)
        if chosen:
            f1_column = SCORES.index("f1")
            difference = scores["memory"][:, f1_column] - scores["bm25"][:, f1_column]
            rows[-1]["f1_over_bm25"] = interval(difference, seed)
    return rows


def shown(question, owner, texts):
    """The places of what the oracle shows: a question's gold documents; or SHOWN of their passages, as many
    of each, those with one of the answers before those without. owner, texts: as for `measure`."""
    found, lacks = [], lambda place: not holds(texts[place], question.answers)
    for document in question.gold:
        places = range(bisect_left(owner, document), bisect_right(owner, document))
        found += sorted(sorted(places, key=lacks)[:max(1, SHOWN // len(question.gold))])
    return found


def table(rows):
    """The lines of a table of `measure`'s rows, and what memory has over bm25."""
    names = ("R@1", "R@5", "R@16", "all16", "exact", "F1", "contained", "empty", "not found", "s/question")
    columns = (*RECALLS, *SCORES, "seconds_per_question")
    lines = [f"{'k':>3} {'method':<7}" + "".join(f" {name:>{max(6, len(name))}}" for name in names)]
    for row in rows:
        values = ["-" if row[column] is None else f"{row[column]:.3f}" for column in columns]
        cells = [f"{value:>{max(6, len(name))}}" for value, name in zip(values, names)]
        lines.append(f"{row['k'] or '-':>3} {row['method']:<7} " + " ".join(cells))
    judged = {row["method"]: row["questions_of_recall"] for row in rows if "questions_of_recall" in row}
    if len({*judged.values()}) > 1:
        lines.append("R@ and all16 are of different questions: "
                     + ", ".join(f"{method}'s of {count:,}" for method, count in judged.items()))
    for row in rows:
        for column, name in (("recall_at_1_over_bm25", "recall@1"), ("f1_over_bm25", "F1")):
            if column in row:
                mean, low, high = row[column]
                lines.append(f"k {row['k'] or '-'}: memory - bm25 in {name}: {mean:+.3f} "
                             f"(95 % interval {low:+.3f} to {high:+.3f})")
    return lines


# ------------------------------------------------------------------------------------------------------------
# Drawings

def plot_set(rows, path):
    """Recall and F1 of every method: bars, or curves where the memory has several sizes."""
    with drawing(path, (12, 4), columns=3) as panels:
        for axes, name in zip(panels, ("recall_at_1", "recall_at_16", "f1")):
            curves = {}  # label -> {tokens of memory: value}; recall does not depend on k
            for row in rows:
                label = row["method"] if name in RECALLS else f"{row['method']}, k {row['k']}"
                if row[name] is not None:
                    curves.setdefault(label, {})[row["memory_tokens"]] = row[name]
            for label, curve in curves.items():
                if len(curve) > 1:
                    axes.plot(curve.keys(), curve.values(), "o-", label=label)
                    axes.set(xscale="log", xlabel="tokens of memory")
                    axes.legend(fontsize="small")
                else:
                    axes.bar(label, *curve.values())
                    axes.tick_params(axis="x", rotation=20)
            axes.set(ylim=(0, 1.02))
            axes.set_title(f"{rows[0]['set']}: {name}", parse_math=False)  # a folder may be called $x
