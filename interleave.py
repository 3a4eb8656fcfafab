"""The interleave loop (section 3.5): in a round the model names documents or ends the retrieval; the system
appends the text of the named ones to the question, and the next round begins, with new routing.

    for event in interleave(model, tokenizer, memory, texts, question, config): ...  # Rounds, then the answer

Three loops stand behind one function, and the checkpoint's `prompts` chooses: `nanomsa` for models that
train.py made, `msa` for the authors' MSA-4B, `chat` for a backbone of which only the router was made. How
each of them spells its questions: tokenizer.py and prompts.py.
"""
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

from common import UserError
from memory import Cache, padded_batches, rank_documents
from memory_parallel import ParallelMemory
from prompts import END_OF_RETRIEVE, NOT_FOUND

NAMING_TOKENS = 256   # that MSA-4B writes in one round at most
REFUSAL_MARGIN = 3.0  # in nats: of held-out questions that have an answer .03 are refused, .36 without it


@dataclass
class InterleaveConfig:
    temperature: float = 0.0        # 0: greedy
    top_p: float = 1.0              # sample from the smallest set of tokens with this much probability
    router_weight: float = 1.0      # of routing scores in naming; 0: the paper's generation, 1000: routing
                                    # alone. MSA-4B names by generation, a chat backbone by its router
    max_rounds: int = -1            # retrievals before the answer; 1: no interleave; 0: nothing is named;
                                    # -1: 4, of a chat backbone 1 (2 at most, which share max_documents)
    max_documents: int = 8          # documents named in one round
    max_answer_tokens: int = 64     # longer answers are cut

    def __post_init__(self):
        for name, low in (("temperature", 0), ("router_weight", 0), ("max_rounds", -1), ("max_documents", 1),
                          ("max_answer_tokens", 1)):
            if not low <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass
class Round:
    """What one retrieval round did; documents by number."""
    routed: list      # (number, score): what some memory layer selected, by mean score
    named: list       # numbers, in the order in which the model named them
    appended: list    # the same, in the order of appending


# ------------------------------------------------------------------------------------------------------------
# Small steps

def rounds_of(model, config):
    """`max_rounds` of an InterleaveConfig, for a model where it does not say how many."""
    return config.max_rounds if config.max_rounds >= 0 else 1 if model.config.prompts == "chat" else 4


def choose(logits, temperature, top_p):
    """An index of `logits` (n,): the largest at temperature 0, else a sample from the top_p part of the
    distribution."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1)])


def reluctant(model, tokenizer, logits):
    """Logits (V,) of what a chat backbone's answer goes on with. One that has learned to refuse does so only
    where NOT_FOUND leads by REFUSAL_MARGIN."""
    if model.config.prompts == "chat" and model.config.second_look:
        logits = logits.clone()
        logits[tokenizer.answer(NOT_FOUND)[0]] -= REFUSAL_MARGIN
    return logits


def ranking(selections):
    """`rank_documents` of one question: a list of pairs (document index, score)."""
    selections = [selection for selection in selections if selection.documents.numel()]
    if not selections:
        return []
    documents, scores = rank_documents(selections)
    return [(d, score) for d, score in zip(documents[0].tolist(), scores[0].tolist()) if d >= 0]


def read(model, tokens, **kwargs):
    """`model.read` of one sequence of ids; returns the logits of what follows it (V,)."""
    tokens = torch.tensor([tokens], device=model.device)
    last = torch.arange(tokens.size(1), device=model.device)[None] == tokens.size(1) - 1
    return model.read(tokens, positions=last, **kwargs).logits[0]


def number_log_probabilities(model, tokenizer, cache, numbers):
    """log p(number | numbers) (n,): the probability that the model writes each `[n]` next when it can write
    only these.

    At each token the model's distribution is renormalised over the tokens that lead to one of them, as in
    constrained decoding. (Renormalising whole numbers instead would favour short ones by several nats for
    each digit they lack.) All are scored in one batch that continues copies of the cache.
    """
    spelled = [tokenizer.number(n) for n in numbers]
    tokens = torch.zeros(len(spelled), max(map(len, spelled)), dtype=torch.long)
    following = {}  # prefix -> tokens that may follow it
    for row, number in enumerate(spelled):
        tokens[row, :len(number)] = torch.tensor(number)
        for t in range(1, len(number)):
            following.setdefault(tuple(number[:t]), set()).add(number[t])
    logits = model.read(tokens.to(model.device), cache=cache.expand(len(spelled))).logits.cpu()
    log_p = torch.zeros(len(spelled))
    for row, number in enumerate(spelled):
        for t in range(1, len(number)):
            allowed = list(following[tuple(number[:t])])
            log_p[row] += logits[row, t - 1, number[t]] - logits[row, t - 1, allowed].logsumexp(0)
    return log_p


@torch.no_grad()
def refusals(model, tokenizer, question, documents):
    """log p(NOT_FOUND) (n,) of a trained chat backbone that reads each of `documents`, pairs (number, text),
    alone with the question."""
    target = tokenizer.answer(NOT_FOUND)
    rows = [torch.tensor(tokenizer.message(question, [document]) + target) for document in documents]
    log_p = torch.zeros(len(rows))
    for batch, tokens in padded_batches(rows, 2048):
        ends = torch.tensor([[len(rows[i])] for i in batch])
        place = torch.arange(tokens.size(1))
        says = (place >= ends - len(target) - 1) & (place < ends - 1)  # the token before predicts
        logits = model.read(tokens.to(model.device), positions=says.to(model.device)).logits.cpu()
        spoken = logits.log_softmax(-1).view(len(batch), len(target), -1)
        log_p[batch] = spoken.gather(2, torch.tensor(target).expand(len(batch), -1)[..., None]).sum((1, 2))
    return log_p


def second_look(model, tokenizer, question, ranked, texts, numbers, weight):
    """A `ranking` of which the first `second_look` documents are ordered anew: by how unlikely NOT_FOUND is
    when the model reads one of them alone, log(1 - p) + weight * score / tau.

    texts: ids by document; numbers: document -> number. Without `second_look` the ranking stays as it is.
    """
    first, others = ranked[:model.config.second_look], ranked[model.config.second_look:]
    if not first:
        return ranked
    documents = [(numbers(d), tokenizer.decode(texts[d])) for d, _ in first]
    found = torch.log(-torch.expm1(refusals(model, tokenizer, question, documents).clamp(max=-1e-6)))
    scores = found + weight / model.config.router_temperature * torch.tensor([score for _, score in first])
    order = scores.argsort(descending=True, stable=True).tolist()
    return [first[i] for i in order] + others


def generate(model, tokens, cache, stop, limit, pick, **first):
    """Read `tokens`, then yield at most `limit` tokens that continue them, up to one of `stop`, which is not
    yielded.

    pick: logits (V,) -> token; first: what the first read needs besides, a memory and its routing_mask.
    """
    for _ in range(limit):
        token = pick(read(model, tokens, cache=cache, **first))
        if token in stop:
            return
        yield token
        tokens, first = [token], {}


def spell(tokenizer, tokens):
    """Tokens as pieces of text; a character may be spread over several of them."""
    found, shown = [], ""
    for token in tokens:
        found.append(token)
        text = tokenizer.decode(found)
        if not text.endswith("\ufffd"):
            yield text[len(shown):]
            shown = text
    if found and tokenizer.decode(found) != shown:
        yield tokenizer.decode(found)[len(shown):]


def first_line(pieces):
    """Pieces of text up to the first line end behind a word: a chat model may write on after its answer."""
    begun = False
    for piece in pieces:
        line, end, _ = (piece if begun else piece.lstrip()).partition("\n")
        begun = begun or line != ""
        if line:
            yield line
        if begun and end:
            return


# ------------------------------------------------------------------------------------------------------------
# The loops. All take what `interleave` takes, and `pick`: logits -> index, the same on every rank.

@torch.no_grad()
def interleave(model, tokenizer, memory, texts, question, config):
    """Answer one question (section 3.5). Yields a Round after each retrieval, then the answer as pieces of
    text.

    memory: what `MSA.encode` returned, a ParallelMemory, or None; texts: token ids of the documents' texts,
    by position in the memory; question: str. With a ParallelMemory over several ranks all of them call this
    with the same question, and rank 0 chooses.
    """
    agree = memory.ranks.agree if isinstance(memory, ParallelMemory) else int
    # A vocabulary may be padded
    pick = lambda logits: agree(choose(logits[:tokenizer.vocab_size], config.temperature, config.top_p))
    config = replace(config, max_rounds=rounds_of(model, config))
    loop = dict(nanomsa=interleave_own, msa=interleave_msa, chat=interleave_chat)[model.config.prompts]
    yield from loop(model, tokenizer, memory, texts, question, config, pick)


def interleave_own(model, tokenizer, memory, texts, question, config, pick):
    """In a round the model alone decides between another document, stop, and end of retrieval. For another
    document the candidates are those that some memory layer selected and that are not yet named or appended;
    the highest `log p(number | candidates) + router_weight * score / tau` wins, so that the model cannot cite
    what it did not see.
    """
    prompt, seen = tokenizer.question(tokenizer.encode(question)), set()
    segments = [1] * len(prompt)  # of the question and of each appended text, which route
    number_of = lambda d: int(memory.numbers[d])
    for rounds in range(config.max_rounds + 1):
        cache = Cache()
        # Generated tokens never route
        mask = torch.tensor([segments + [0]], device=model.device)
        logits = read(model, [*prompt, tokenizer.retrieve], memory=memory, routing_mask=mask, cache=cache)
        ranked = ranking(cache.selections)
        named = []
        while rounds < config.max_rounds:
            candidates = [(d, score) for d, score in ranked if d not in seen and d not in named]
            choices = [tokenizer.stop if named else tokenizer.end_of_retrieval]
            if candidates and len(named) < config.max_documents:
                choices.append(tokenizer.open_bracket)
            if choices[pick(logits[choices])] != tokenizer.open_bracket:
                break
            log_p = number_log_probabilities(model, tokenizer, cache, [number_of(d) for d, _ in candidates])
            scores = torch.tensor([score for _, score in candidates]) / model.config.router_temperature
            named.append(candidates[pick(log_p + config.router_weight * scores)][0])
            logits = read(model, tokenizer.number(number_of(named[-1])), cache=cache)
        if rounds < max(config.max_rounds, 1):
            yield Round([(number_of(d), score) for d, score in ranked], list(map(number_of, named)),
                        list(map(number_of, sorted(named))))
        if not named:
            break
        seen.update(named)
        for d in sorted(named):
            text = tokenizer.appended(number_of(d), texts[d])
            prompt = prompt + text
            segments = segments + [segments[-1] + 1] * len(text)
    yield from spell(tokenizer, generate(model, [tokenizer.end_of_retrieval], cache, {tokenizer.end},
                                         config.max_answer_tokens, pick))


def route_rounds(model, memory, tokens, routes, prefix_length, count):
    """What routing finds for a question: the rankings of one round, or in shared mode of `count`, at most
    two; in the second one the best of the first route too. tokens, routes: lists (T,); the rest as for
    `model.read`. Returns lists of pairs (document index, score), best first."""
    tokens, routes = (torch.tensor([row], device=model.device) for row in (tokens, routes))
    if not model.config.routing_layers:
        cache = Cache()
        model.read(tokens, memory, routes, cache, prefix_length, torch.zeros_like(routes))
        return [ranking(cache.selections)]
    found = []
    while len(memory) and len(found) < min(count, 2):
        found.append(model.find(tokens, memory, routes, prefix_length, *found))
    return [ranking([selection]) for selection in found]


def look_again(model, tokenizer, rankings, texts, numbers, question, weight, count):
    """The rankings of rounds as a `second_look` orders them; all documents differ. The rounds share `count`:
    every round but the last has no more than its part."""
    named, rounds = set(), []
    for ranked in rankings:
        left = [(document, score) for document, score in ranked if document not in named]
        left = second_look(model, tokenizer, question, left, texts, numbers, weight)
        rounds.append(left[:-(-count // len(rankings))] if len(rounds) + 1 < len(rankings) else left)
        named |= {document for document, _ in rounds[-1]}
    return rounds


def interleave_chat(model, tokenizer, memory, texts, question, config, pick):
    """Rounds share `max_documents`. What they name stands in the message that the backbone answers, round by
    round, in order of the numbers."""
    rounds, found, number_of = [], [], lambda d: int(memory.numbers[d])
    if config.max_rounds and memory is not None:
        rounds = route_rounds(model, memory, *tokenizer.question(question), len(tokenizer.head),
                              config.max_rounds)
    if len(rounds) > 1 or config.max_documents < model.config.second_look:  # else all are named
        rounds = look_again(model, tokenizer, rounds, texts, number_of, question, config.router_weight,
                            config.max_documents)
    for ranked in rounds:
        named = sorted(d for d, _ in ranked[:config.max_documents - len(found)])
        numbers, found = list(map(number_of, named)), found + named
        yield Round([(number_of(d), score) for d, score in ranked], numbers, numbers)
    message = tokenizer.message(question, [(number_of(d), tokenizer.decode(texts[d])) for d in found])
    choice = lambda logits: pick(reluctant(model, tokenizer, logits))
    answer = generate(model, message, Cache(), tokenizer.ends, config.max_answer_tokens, choice)
    yield from first_line(spell(tokenizer, answer))


def interleave_msa(model, tokenizer, memory, texts, question, config, pick):
    """The authors' protocol: what the model writes up to <|object_ref_end|> names documents, every `[n]` in
    it; their texts are appended, and all is read again, until it writes <End-of-Retrieve>.

    `max_rounds` and `max_documents` are ours, theirs has no cap. Where theirs would go on for ever, after a
    round that names nothing, retrieval ends too. The text behind <End-of-Retrieve> is read causally, like all
    text; in theirs its tokens see each other in both directions.
    """
    numbers, context, routes = (np.asarray(memory.numbers) if memory is not None
                                else np.zeros(0, int)), [], []
    end, closing = tokenizer.encode_template(END_OF_RETRIEVE), tokenizer.end_of_retrieval_prompt(question)
    for rounds in range(config.max_rounds + 1):
        prompt, own = tokenizer.question(question, later=rounds > 0)
        prompt, cache, written = prompt + context, Cache(), []
        retrieving = rounds < config.max_rounds
        if not retrieving:
            prompt += end + closing
        mask = [*map(int, own), *routes, *[0] * (len(prompt) - len(own) - len(routes))]
        about = dict(memory=memory, routing_mask=torch.tensor([mask], device=model.device),
                     prefix_length=len(tokenizer.head))
        if not retrieving:
            break
        for token in generate(model, prompt, cache, tokenizer.ref_end, NAMING_TOKENS, pick, **about):
            written.append(token)
            if END_OF_RETRIEVE in tokenizer.decode(written):
                break
        text, ranked = tokenizer.decode(written), ranking(cache.selections)
        ended, said = END_OF_RETRIEVE in text, [int(n) for n in re.findall(r"\[(\d{1,18})\]", text)]
        named = [] if ended else [n for n in dict.fromkeys(said) if n in numbers][:config.max_documents]
        yield Round([(int(numbers[d]), score) for d, score in ranked], named, sorted(named))
        if not named:
            unread = written[cache.length - len(prompt):]
            prompt, about = [*unread, *([] if ended else end), *closing], {}
            break
        appended = tokenizer.appended([(n, tokenizer.decode(texts[int(np.searchsorted(numbers, n))]))
                                       for n in sorted(named)])
        routes = [0] * (len(context) + len(written) + 1) + [2] * len(appended) + [0]
        context = context + written + tokenizer.ref_end + appended + tokenizer.ref_end
    yield from spell(tokenizer, generate(model, prompt, cache, tokenizer.ends, config.max_answer_tokens, pick,
                                         **about))


def answer_question(model, tokenizer, memory, texts, question, config):
    """`interleave` to its end: (answer, rounds)."""
    events = list(interleave(model, tokenizer, memory, texts, question, config))
    return "".join(e for e in events if isinstance(e, str)), [e for e in events if isinstance(e, Round)]


def answer_from_text(model, tokenizer, question, appended, config, context=None):
    """The answer to a question behind which stand the texts `appended`, pairs (number, ids), with nothing
    retrieved.

    context: a Cache that the question continues, for the full-attention baseline.
    """
    cache, prompts = context.expand(1) if context else Cache(), model.config.prompts
    if prompts == "nanomsa":
        prompt, stop = tokenizer.question(tokenizer.encode(question)), {tokenizer.end}
        for number, text in appended:
            prompt = prompt + tokenizer.appended(number, text)
        prompt = [*prompt, tokenizer.retrieve, tokenizer.end_of_retrieval]
    else:
        documents, stop = [(number, tokenizer.decode(text)) for number, text in appended], tokenizer.ends
        if prompts == "chat":
            prompt = tokenizer.message(question, documents)
        else:
            named = tokenizer.encode("".join(f"[{number}]" for number, _ in documents))
            read_before = [*named, *tokenizer.ref_end, *tokenizer.appended(documents),
                           *tokenizer.ref_end] if documents else []
            prompt = [*tokenizer.question(question)[0], *read_before,
                      *tokenizer.encode_template(END_OF_RETRIEVE),
                      *tokenizer.end_of_retrieval_prompt(question)]
    pick = lambda logits: choose(reluctant(model, tokenizer, logits)[:tokenizer.vocab_size],
                                 config.temperature, config.top_p)
    answer = spell(tokenizer, generate(model, prompt, cache, stop, config.max_answer_tokens, pick))
    return "".join(first_line(answer) if prompts == "chat" else answer)
