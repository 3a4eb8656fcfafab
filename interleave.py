"""The interleave loop (section 3.5): in a round the model names documents or ends the retrieval; the system
appends the text of the named ones to the question, and the next round begins, with new routing.

    for event in interleave(model, tokenizer, memory, texts, question, config): ...  # Rounds, then the answer

Three loops stand behind one function, and the checkpoint's `prompts` chooses: `nanomsa` for models that
train.py made, `msa` for the authors' MSA-4B, `chat` for a backbone that never learned to name documents. How
each of them spells its questions: tokenizer.py and prompts.py. How many questions share the model's reads:
batches.py.
"""
import re
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
import torch

from batches import Find, Likelihood, Name, Pick, Prompt, Read, Server, choose, serve
from checkpoint import CONTEXT
from common import UserError
from memory_parallel import ParallelMemory
from prompts import END_OF_RETRIEVE

NAMING_TOKENS = 256   # that MSA-4B writes in one round at most
# In nats. What each costs and brings was measured: results/README.md
REFUSAL_MARGIN = 3.0  # by which NOT_FOUND must lead where several documents are shown, or none
ALONE_MARGIN = 2.0    # the same, where one is: about that one the reader is surer
ENDING_MARGIN = 2.0   # by which an end must lead: trained on short answers, it would stop after a few values
GAIN = 1.0            # a second round names what makes NOT_FOUND so much less likely, else nothing
CERTAIN = -0.105      # log 0.9: a document has something of the answer where log p of NOT_FOUND is below it


@dataclass
class InterleaveConfig:
    temperature: float = 0.0        # 0: greedy
    top_p: float = 1.0              # sample from the smallest set of tokens with this much probability
    # of routing scores in naming; 0: the paper's generation, 1000: routing alone. MSA-4B names by generation,
    # a chat backbone by its router
    router_weight: float = 1.0
    # retrievals before the answer; 1: no interleave; 0: nothing is named; -1: 4. A chat backbone has 1, or 2
    # if it looks twice, and 2 at most; its rounds share max_documents
    max_rounds: int = -1
    max_documents: int = -1         # named in one round; -1: 8, of a chat backbone that looks twice 2
    max_answer_tokens: int = 64     # longer answers are cut

    def __post_init__(self):
        for name, low in (("temperature", 0), ("router_weight", 0), ("max_rounds", -1), ("max_documents", -1),
                          ("max_answer_tokens", 1)):
            if not low <= getattr(self, name) <= 1e6:
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {low}, and at most "
                                "1,000,000")
        if self.max_documents == 0:
            raise UserError("max_documents is 0; it must be at least 1, or -1")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass
class Round:
    """What one retrieval round did; documents by number."""
    routed: list      # (number, score): what some memory layer selected, by mean score
    named: list       # numbers, in the order in which the model named them

    @property
    def appended(self):
        """The same in the order in which their texts are appended."""
        return sorted(self.named)


# ------------------------------------------------------------------------------------------------------------
# Small steps

def rounds_of(model, config):
    """`max_rounds` of an InterleaveConfig, for a model where it does not say how many."""
    if config.max_rounds >= 0:
        return config.max_rounds
    if model.config.prompts != "chat":
        return 4
    return 2 if model.config.second_look else 1


def documents_of(model, config):
    """`max_documents` of an InterleaveConfig, for a model where it does not say how many."""
    if config.max_documents > 0:
        return config.max_documents
    return 2 if model.config.second_look else 8  # more text costs a small backbone more than it brings


def context_of(model):
    """How many tokens a model reads at once, as its configuration says."""
    return model.others.get("max_position_embeddings", CONTEXT)


def most_tokens(model):
    """How many tokens a question or a document may have: half of the context."""
    return context_of(model) // 2


def too_long(model, tokenizer, questions):
    """The questions of more than `most_tokens`: {place: tokens}."""
    lengths = map(len, tokenizer.encode_batch(questions))
    return {i: length for i, length in enumerate(lengths) if length > most_tokens(model)}


def check_lengths(model, tokenizer, questions, where=None):
    """Raises UserError for a question that is `too_long`; where: file and line of each, or None."""
    for i, length in too_long(model, tokenizer, questions).items():
        raise UserError(f"{f'{where[i]}: ' if where else ''}a question has {length:,} tokens, "
                        f"{questions[i][:50]!r} and so on; this model takes {most_tokens(model):,} at most: "
                        "shorten it")


def fits(model, message, config):
    """Whether a model can read a message, a list of ids, and answer it."""
    most = context_of(model)
    return len(message) + min(config.max_answer_tokens, most // 4) <= most


def reluctant(model, tokenizer, logits, margin):
    """Logits (..., V) of an answer's next token, of a chat backbone that has learned to refuse: it does so
    only where NOT_FOUND leads by `margin`, in nats. None: the answer has begun, and ends only where a token
    that ends it leads by ENDING_MARGIN."""
    if model.config.prompts == "chat" and model.config.second_look:
        logits = logits.clone()
        for token in tokenizer.ends if margin is None else tokenizer.refusal[:1]:
            logits[..., token] -= ENDING_MARGIN if margin is None else margin
    return logits


def second_look(model, tokenizer, question, ranked, texts, numbers, weight, look, count, before=()):
    """A part of a loop that reranks the first `look` documents of a ranking: the model reads each behind the
    documents `before`, and log(1 - p(NOT_FOUND)) + weight * score / tau orders them. Returns the ranking, and
    their log p(NOT_FOUND) in this order.

    The first term is at most 0, so the second one bounds the sum. Best first, as many are read as are needed
    to know the first `count`; the others stand where their bound puts them, with a log p of 0.

    texts: ids by document; numbers: document -> number.
    """
    first, others = ranked[:look], ranked[look:]
    scores = weight / model.config.router_temperature * np.array([score for _, score in first])
    log_p, read = np.zeros(len(first)), np.zeros(len(first), bool)
    documents = lambda own: [(numbers(d), tokenizer.decode(texts[d])) for d in own]
    while (unread := np.flatnonzero(~read & (scores >= np.sort(scores)[-count:][:1]))).size:
        # They rank among the first `count`, and only their bounds are known
        prompts = [tokenizer.message(question, documents([*before, first[i][0]])) for i in unread]
        log_p[unread] = yield Likelihood(prompts, tokenizer.refusal)
        scores[unread] += np.log(-np.expm1(np.minimum(log_p[unread], -1e-6)))
        read[unread] = True
    order = np.argsort(-scores, kind="stable").tolist()
    return [first[i] for i in order] + others, log_p[order].tolist()


def answer(tokenizer, limit, one_line=False, documents=0):
    """A part of a loop: pieces of the text that comes next, of at most `limit` tokens, up to one that ends an
    answer. documents: how many stand before it; of one alone the reader knows best whether it answers.

    A character may be spread over several tokens. one_line: up to the first line end behind a word, since a
    chat model may write on after its answer.
    """
    found, said, shown = [], "", ""
    margin = ALONE_MARGIN if documents == 1 else REFUSAL_MARGIN
    for _ in range(limit):
        if found:
            yield Read(found[-1:])
        token = yield Pick(margin=None if found else margin)
        if token in tokenizer.ends:
            break
        found.append(token)
        text = tokenizer.decode(found)
        said, ended = first_line(text) if one_line else (text, False)
        if not text.endswith("\ufffd") and said != shown:
            yield said[len(shown):]
            shown = said
        if ended:
            return
    if said != shown:  # it ends inside a character
        yield said[len(shown):]


def first_line(text):
    """A text's first line that is not empty, and whether it has ended."""
    line, end, _ = text.lstrip().partition("\n")
    return line, end != ""


# ------------------------------------------------------------------------------------------------------------
# The loops. They ask for reads, see batches.py, and yield what `interleave` does.

def interleave(model, tokenizer, memory, texts, question, config):
    """Answer one question (section 3.5). Yields a Round after each retrieval, then the answer as pieces of
    text.

    memory: what `MSA.encode` returned, a ParallelMemory, or None; texts: token ids of the documents' texts,
    by position in the memory; question: str. With a ParallelMemory over several ranks all of them call this
    with the same question, and rank 0 chooses.
    """
    loop = loop_of(model, tokenizer, memory, texts, question, config)
    for _, event in run(model, tokenizer, [loop], config, 1, memory):
        yield event


def loop_of(model, tokenizer, memory, texts, question, config):
    """The loop of one question, for `run`: what `interleave` takes."""
    config = replace(config, max_rounds=rounds_of(model, config), max_documents=documents_of(model, config))
    loop = dict(nanomsa=interleave_own, msa=interleave_msa, chat=interleave_chat)[model.config.prompts]
    return loop(model, tokenizer, memory, texts, question, config)


@torch.no_grad()
def run(model, tokenizer, loops, config, batch, memory=None):
    """Serves loops, `batch` at a time: yields (place of the loop, event). memory: whose ranks agree."""
    loops = [*loops]
    ranks = dict(agree=memory.ranks.agree) if isinstance(memory, ParallelMemory) else {}
    # A vocabulary may be padded
    prepare = lambda logits, margin: reluctant(model, tokenizer, logits, margin)[:, :tokenizer.vocab_size]
    pick = partial(choose, temperature=config.temperature, top_p=config.top_p)
    yield from serve(loops, Server(model, min(batch, len(loops)), pick, prepare, **ranks))


def interleave_own(model, tokenizer, memory, texts, question, config):
    """In a round the model alone decides between another document, stop, and end of retrieval. For another
    document the candidates are those that some memory layer selected and that are not yet named or appended;
    the highest `log p(number | candidates) + router_weight * score / tau` wins, so that the model cannot cite
    what it did not see.
    """
    prompt, seen = tokenizer.routed(question)[0], set()
    segments = [1] * len(prompt)  # of the question and of each appended text, which route
    number_of = lambda d: int(memory.numbers[d])
    weight = config.router_weight / model.config.router_temperature
    for rounds in range(config.max_rounds + 1):
        # Generated tokens never route
        ranked = yield Prompt([*prompt, tokenizer.retrieve], memory, segments + [0])
        named = []
        while rounds < config.max_rounds:
            candidates = [(d, score) for d, score in ranked if d not in seen and d not in named]
            choices = (tokenizer.stop if named else tokenizer.end_of_retrieval,)
            if candidates and len(named) < config.max_documents:
                choices += (tokenizer.open_bracket,)
            if (yield Pick(choices)) != tokenizer.open_bracket:
                break
            spelled = [tokenizer.number(number_of(d)) for d, _ in candidates]
            best = yield Name(spelled, [weight * score for _, score in candidates])
            named.append(candidates[best][0])
            yield Read(spelled[best])
        if rounds < max(config.max_rounds, 1):
            yield Round([(number_of(d), score) for d, score in ranked], list(map(number_of, named)))
        if not named:
            break
        seen.update(named)
        for d in sorted(named):
            text = tokenizer.appended(number_of(d), texts[d])
            prompt = prompt + text
            segments = segments + [segments[-1] + 1] * len(text)
    yield Read([tokenizer.end_of_retrieval])
    yield from answer(tokenizer, config.max_answer_tokens)


def look_again(model, tokenizer, question, rankings, texts, numbers, weight, most, look):
    """A part of a loop: of the rankings of rounds, which share `most` documents, what is named: a list of
    (ranking, how many of its first documents).

    look: at how many documents a round takes a `second_look`. Then the first round names one document, behind
    which the second one reads its candidates; it names those that bring GAIN, each by itself. A single
    round names only documents with a log p(NOT_FOUND) below CERTAIN, and at least one; but `most` of them
    where that is `look` or more.
    """
    named, rounds, before = [], [], 0.0
    for nth, ranked in enumerate(rankings, 1):
        left = [(document, score) for document, score in ranked if document not in named]
        if nth == len(rankings):
            count = most - len(named)
        else:
            count = 1 if look else -(-most // len(rankings))
        if look:
            left, log_p = yield from second_look(model, tokenizer, question, left, texts, numbers,
                                                 0 if named else weight, look, count, named)
            if named:
                count = min(count, sum(before - p >= GAIN for p in log_p))
            elif len(rankings) == 1 and most < look:
                count = min(count, max(1, sum(p < CERTAIN for p in log_p)))
            before = log_p[0] if log_p else 0.0
        rounds.append((left, count))
        named += [document for document, _ in left[:count]]
    return rounds


def interleave_chat(model, tokenizer, memory, texts, question, config):
    """Rounds share `max_documents`. What they name stands in the message that the backbone answers, round by
    round, in order of the numbers; what would be more than it can read is not named."""
    rankings, number_of = [], lambda d: int(memory.numbers[d])
    if config.max_rounds and memory is not None:
        tokens, routes = tokenizer.routed(question)
        count = min(config.max_rounds, config.max_documents)
        rankings = yield Find(tokens, memory, routes, len(tokenizer.head), count)
    look = model.config.second_look
    if len(rankings) == 1 and config.max_documents >= look:  # all are named
        look = 0
    rounds = yield from look_again(model, tokenizer, question, rankings, texts, number_of,
                                   config.router_weight, config.max_documents, look)
    named = [[d for d, _ in ranked[:count]] for ranked, count in rounds]
    message = lambda: tokenizer.message(question, [(number_of(d), tokenizer.decode(texts[d]))
                                                   for part in named for d in sorted(part)])
    while not fits(model, prompt := message(), config) and any(named):  # without the last in rank
        next(part for part in reversed(named) if part).pop()
    for (ranked, _), part in zip(rounds, named):
        yield Round([(number_of(d), score) for d, score in ranked], list(map(number_of, part)))
    yield Prompt(prompt)
    yield from answer(tokenizer, config.max_answer_tokens, True, sum(map(len, named)))


def interleave_msa(model, tokenizer, memory, texts, question, config):
    """The authors' protocol: what the model writes up to <|object_ref_end|> names documents, every `[n]` in
    it; their texts are appended, and all is read again, until it writes <End-of-Retrieve>.

    `max_rounds` and `max_documents` are ours, theirs has no cap. Where theirs would go on for ever, after a
    round that names nothing, retrieval ends too. The text behind <End-of-Retrieve> is read causally, like all
    text; in theirs its tokens see each other in both directions.
    """
    numbers = np.asarray([] if memory is None else memory.numbers, int)
    context, routes = [], []
    end, closing = tokenizer.encode_template(END_OF_RETRIEVE), tokenizer.end_of_retrieval_prompt(question)
    for rounds in range(config.max_rounds + 1):
        prompt, own = tokenizer.routed(question, later=rounds > 0)
        mask, written, unread = [*map(int, own), *routes], [], []
        prompt = prompt + context
        retrieving = rounds < config.max_rounds
        if not retrieving:
            prompt += end + closing
        mask += [0] * (len(prompt) - len(mask))
        ranked = yield Prompt(prompt, memory, mask, len(tokenizer.head))
        if not retrieving:
            break
        while len(written) < NAMING_TOKENS and END_OF_RETRIEVE not in tokenizer.decode(written):
            if unread:
                yield Read(unread)
                unread = []
            token = yield Pick()
            if token in tokenizer.ref_end:
                break
            written, unread = written + [token], [token]
        text = tokenizer.decode(written)
        ended, said = END_OF_RETRIEVE in text, [int(n) for n in re.findall(r"\[(\d{1,18})\]", text)]
        named = [] if ended else [n for n in dict.fromkeys(said) if n in numbers][:config.max_documents]
        yield Round([(int(numbers[d]), score) for d, score in ranked], named)
        if not named:
            yield Read([*unread, *([] if ended else end), *closing])
            break
        appended = tokenizer.appended_texts([(n, tokenizer.decode(texts[int(np.searchsorted(numbers, n))]))
                                             for n in sorted(named)])
        routes = [0] * (len(context) + len(written) + 1) + [2] * len(appended) + [0]
        context = context + written + tokenizer.ref_end + appended + tokenizer.ref_end
    yield from answer(tokenizer, config.max_answer_tokens)


def answer_questions(model, tokenizer, memory, texts, questions, config, batch):
    """(answer, rounds) of each question, as `interleave` has them; `batch` questions at a time."""
    loops = (loop_of(model, tokenizer, memory, texts, question, config) for question in questions)
    return gather(run(model, tokenizer, loops, config, batch, memory), len(questions))


def gather(events, count):
    """(answer, rounds) of `count` questions, of all their events."""
    answers = [("", [])] * count
    for place, event in events:
        answer, rounds = answers[place]
        answers[place] = (answer + event, rounds) if isinstance(event, str) else (answer, [*rounds, event])
    return answers


def answer_question(model, tokenizer, memory, texts, question, config):
    """`interleave` to its end: (answer, rounds)."""
    return answer_questions(model, tokenizer, memory, texts, [question], config, 1)[0]


def loop_from_text(model, tokenizer, question, appended, config, cut=None):
    """A loop: the answer to a question behind which stand the texts `appended`, pairs (number, ids), with
    nothing retrieved. cut: is called where a chat backbone cannot read the last of them."""
    prompts, documents = model.config.prompts, [(number, tokenizer.decode(text)) for number, text in appended]
    if prompts == "nanomsa":
        prompt = tokenizer.routed(question)[0]
        for number, text in appended:
            prompt = prompt + tokenizer.appended(number, text)
        prompt = [*prompt, tokenizer.retrieve, tokenizer.end_of_retrieval]
    elif prompts == "chat":
        while not fits(model, prompt := tokenizer.message(question, documents), config) and documents:
            documents = documents[:-1]
        if cut and len(documents) < len(appended):
            cut()
    else:
        named = tokenizer.encode("".join(f"[{number}]" for number, _ in documents))
        read_before = [*named, *tokenizer.ref_end, *tokenizer.appended_texts(documents),
                       *tokenizer.ref_end] if documents else []
        prompt = [*tokenizer.routed(question)[0], *read_before, *tokenizer.encode_template(END_OF_RETRIEVE),
                  *tokenizer.end_of_retrieval_prompt(question)]
    yield Prompt(prompt)
    yield from answer(tokenizer, config.max_answer_tokens, prompts == "chat", len(documents))


def answers_from_texts(model, tokenizer, asked, config, batch, cut=None):
    """The answers to `asked`, pairs (question, appended), as of `loop_from_text`."""
    loops = (loop_from_text(model, tokenizer, *pair, config, cut) for pair in asked)
    return [answer for answer, _ in gather(run(model, tokenizer, loops, config, batch), len(asked))]
