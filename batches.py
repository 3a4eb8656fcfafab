"""Many questions at once: their loops (interleave.py) run side by side, and share the model's reads.

    for place, event in serve(loops, Server(model, rows, choose)): ...

A loop is a generator, written as if its question were the only one. It yields requests and is sent what they
bring; whatever else it yields is an event, and passed on. A loop that ends makes room for the next one.

    Find           which documents routing finds         -> their rankings
    Likelihood     how likely prompts go on with these   -> log p
    Prompt         begin anew with these tokens          -> the ranking of what was routed to
    Name           which of these numbers comes next     -> its index
    Read           go on with these tokens               -> nothing
    Pick           what comes next                       -> a token

Tokens and lengths stay on the device. A step waits for what was picked, once for all of its questions, and
for rankings and names where a question begins a round or names a document.

    B questions   T tokens   V vocabulary   N candidates of all questions
"""
from copy import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

from cache import Cache, Rows
from common import to_device
from memory import BATCH_TOKENS, at_once, padded_batches, rank_documents, shared_length


@dataclass(eq=False)
class Prompt:
    """Read `tokens` as a new text; routes: which of them route, as for `model.read`, in `memory`."""
    tokens: list
    memory: object = None
    routes: list = None
    prefix_length: int = 0


@dataclass(eq=False)
class Find(Prompt):
    """Which documents routing finds: a ranking, or in shared mode one for each of `count` rounds, at most
    two; in the second one the best documents of the first route, too."""
    count: int = 1


@dataclass(eq=False)
class Likelihood:
    """log p of the token ids `target` behind each of `prompts`, lists of ids, each read alone."""
    prompts: list
    target: list


@dataclass(eq=False)
class Name:
    """The highest log p(number | these numbers) + score; spelled: the tokens of each number."""
    spelled: list
    scores: list


@dataclass(eq=False)
class Read:
    """Go on with these tokens."""
    tokens: list


@dataclass(eq=False)
class Pick:
    """The token that comes next, one of `choices` where there are any. margin: nats by which a refusal
    must lead to begin an answer; None: it has begun."""
    choices: tuple = ()
    margin: float | None = None


def serve(loops, server):
    """Runs the loops, as many at a time as the server has rows. Yields (place of the loop, event)."""
    loops, running = enumerate(loops), {}  # row -> [place, loop, its request]

    def go_on(row, reply):
        """Events of a row's loop, up to its next request."""
        place, loop, _ = running[row]
        try:
            while not isinstance(event := loop.send(reply), REQUESTS):
                reply = None
                yield place, event
            running[row][2] = event
        except StopIteration:
            del running[row]

    while True:
        for row in range(server.rows):
            while row not in running and (entering := next(loops, None)):
                running[row] = [*entering, None]
                yield from go_on(row, None)
        if not running:
            return
        for kind in REQUESTS:
            asked = {row: running[row][2] for row in sorted(running) if type(running[row][2]) is kind}
            if asked:
                replies = getattr(server, kind.__name__.lower())(asked)
                for row, reply in zip(asked, replies):
                    yield from go_on(row, reply)


REQUESTS = Find, Likelihood, Prompt, Name, Read, Pick  # in the order in which a step serves them


class Server:
    """Answers requests, those of several rows in one read. A method takes {row: request}, returns replies."""

    def __init__(self, model, rows, choose, prepare=lambda logits, margin: logits,
                 agree=lambda choices: choices):
        """choose: logits (n, m) -> indices (n,); prepare: (logits (n, V) of the next token, a Pick's
        margin) -> what is chosen from; agree: rank 0's choices, on every rank."""
        self.model, self.rows, self.choose, self.prepare, self.agree = model, rows, choose, prepare, agree
        self.cache, self.logits = Rows(rows), {}     # row -> what its Pick chooses from, (m,)
        self.picked = [], None                       # (row, token) of the last picks; these on the device
        self.captured = None, 0, None                # rows' starts, space, and the graph of a token of each
        self.batch_tokens = at_once(BATCH_TOKENS, model.device)

    def together(self, asked):
        """Prompts in batches of one memory and similar length: ([row], tokens (B, T), routes (B, T))."""
        device, groups = self.model.device, {}
        for row, request in asked.items():
            groups.setdefault((id(request.memory), request.prefix_length), []).append(row)
        for rows in groups.values():
            texts = [torch.tensor([asked[row].tokens, asked[row].routes or [0] * len(asked[row].tokens)])
                     for row in rows]
            for batch, both in padded_batches([text.T for text in texts], self.batch_tokens):
                tokens, routes = to_device(both, device).unbind(2)
                yield [rows[i] for i in batch], tokens, routes

    def last(self, counts, device):
        """Where the last of each row's tokens is: (rows, columns)."""
        columns = torch.full((len(counts),), counts[0] - 1, device=device)
        if len({*counts}) > 1:
            columns = to_device(counts, device) - 1
        return torch.arange(len(counts), device=device), columns

    def find(self, asked):
        """Rankings, each a list of pairs (document index, score), best first."""
        found = {row: [] for row in asked}
        for rows, tokens, routes in self.together(asked):
            memory, prefix_length = asked[rows[0]].memory, asked[rows[0]].prefix_length
            if not self.model.config.routing_layers:
                cache = Cache()
                self.model.read(tokens, memory, routes, cache, prefix_length, positions=slice(0))
                for row, ranked in zip(rows, rankings(cache.selections)):
                    found[row].append(ranked)
                continue
            rounds = min(2, max(asked[row].count for row in rows)) if len(memory) else 0
            selections = []
            for _ in range(rounds):
                selections.append(self.model.find(tokens, memory, routes, prefix_length, *selections))
            for selection in selections:
                for row, ranked in zip(rows, rankings([selection])):
                    found[row].append(ranked)
        return [found[row][:asked[row].count] for row in asked]

    def likelihood(self, asked):
        """Lists of log p, prompt by prompt."""
        return [likelihoods(self.model, request.prompts, request.target, self.batch_tokens).tolist()
                for request in asked.values()]

    def prompt(self, asked):
        """Rankings of what each routed to, [] without a memory."""
        found = {}
        for rows, tokens, routes in self.together(asked):
            lengths, cache, first = [len(asked[row].tokens) for row in rows], Cache(), asked[rows[0]]
            output = self.model.read(tokens, memory=first.memory, routing_mask=routes, cache=cache,
                                     prefix_length=first.prefix_length,
                                     positions=self.last(lengths, tokens.device))
            self.cache.put(rows, cache, lengths)
            self.logits |= zip(rows, output.logits)
            found |= zip(rows, rankings(cache.selections) or [[]] * len(rows))
        return [found[row] for row in asked]

    def name(self, asked):
        """Indices of the numbers that win."""
        log_p = number_log_probabilities(self.model, self.cache, {row: r.spelled for row, r in asked.items()})
        scores = [score for request in asked.values() for score in request.scores]
        totals = log_p + to_device(scores, log_p.device)
        parts = totals.split([len(request.spelled) for request in asked.values()])
        return self.agree(torch.cat([self.choose(part[None]) for part in parts])).tolist()

    def read(self, asked):
        rows, counts = list(asked), [len(request.tokens) for request in asked.values()]
        told, tokens = self.picked
        if told != [(row, *request.tokens) for row, request in asked.items()]:
            texts = [torch.tensor(request.tokens) for request in asked.values()]
            tokens = to_device(pad_sequence(texts, batch_first=True), self.model.device)
        cache = self.cache.take(rows, tokens.size(1))
        if self.model.replays and tokens.size(1) == 1:
            logits = self.replay(tokens)
        else:
            logits = self.go_on(cache, tokens, counts)
        cache.advance(counts)
        self.logits |= zip(rows, logits)
        return [None] * len(rows)

    def go_on(self, cache, tokens, counts):
        """Logits (B, V) behind tokens (B, T) of the rows that `cache` has taken, of which counts[b] count."""
        return self.model.read(tokens, cache=cache, positions=self.last(counts, tokens.device)).logits

    def replay(self, tokens):
        """`go_on` with one token of each row, (B, 1). The second one of the same rows in the same space is
        captured as a CUDA graph, and from there on a token is one launch. What a graph takes of the host is
        fixed: attention looks as far as the rows' space goes."""
        (starts, space, graph), counts = self.captured, [1] * len(tokens)
        self.cache.longest = self.cache.space
        if self.cache.starts is not starts or self.cache.space != space:
            self.captured = self.cache.starts, self.cache.space, None
            return self.go_on(self.cache, tokens, counts)  # compiles all that the graph is to launch
        if graph is None:
            held = copy(self.cache)
            held.at = starts[:, None]  # `advance` moves the starts in place
            graph = capture(lambda tokens: self.go_on(held, tokens, counts), tokens)
            self.captured = starts, space, graph
        return graph(tokens)

    def pick(self, asked):
        """Tokens; the only wait of a step in which all questions write their answers."""
        groups, rows, picked = {}, [], []
        for row, request in asked.items():
            groups.setdefault((request.choices, request.margin), []).append(row)
        for (choices, margin), members in groups.items():
            logits = torch.stack([self.logits[row] for row in members])
            if choices:
                ids = to_device(choices, logits.device)
                picked.append(ids[self.choose(logits[:, ids])])
            else:
                picked.append(self.choose(self.prepare(logits, margin)))
            rows += members
        tokens = self.agree(torch.cat(picked))
        told = list(zip(rows, tokens.tolist()))
        self.picked = told, tokens[:, None]
        told = dict(told)
        return [told[row] for row in asked]


# ------------------------------------------------------------------------------------------------------------
# Steps

def capture(step, x):
    """step(x) as a CUDA graph: a function of other tensors like x, to the result, which the next call
    overwrites. What step launches is launched again as it was then, on the same tensors."""
    graph, own = torch.cuda.CUDAGraph(), x.clone()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may read a bank
        result = step(own)

    def again(x):
        own.copy_(x)
        graph.replay()
        return result
    again.step = step  # holds the tensors that the graph reads
    return again


def choose(logits, temperature, top_p):
    """Indices (n,) of `logits` (n, m): the largest at temperature 0, else samples from the top_p part of each
    row's distribution."""
    if temperature < 1e-6:  # nothing is divided by what may be 0 in float32
        return logits.argmax(-1)
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    left_out = probabilities.cumsum(-1) - probabilities >= top_p
    left_out[:, 0] = False  # the largest one stays, however small top_p is
    probabilities[left_out] = 0
    race = probabilities / torch.empty_like(probabilities).exponential_()  # each wins by its probability
    return order.gather(-1, race.argmax(-1, keepdim=True))[..., 0]


def rankings(selections):
    """`rank_documents` of B questions: for each a list of pairs (document index, score)."""
    if not selections:
        return []
    documents, scores = rank_documents(selections)
    both = torch.stack([documents, scores.view(torch.int32).long()]).cpu()  # one copy, of their bits
    pairs = zip(both[0].tolist(), both[1].int().view(torch.float32).tolist())
    return [[(d, score) for d, score in zip(*pair) if d >= 0] for pair in pairs]


def likelihoods(model, prompts, target, batch_tokens=BATCH_TOKENS):
    """log p (n,) of the token ids `target` behind each of n prompts, lists of ids. Each is read alone; what
    all of them begin with is read once."""
    log_p, cache = torch.zeros(len(prompts), device=model.device), Cache()
    texts = [torch.tensor([*prompt, *target]) for prompt in prompts]
    shared = min(shared_length(prompts), min(map(len, prompts)) - 1)
    if shared:
        model.read(to_device(texts[0][None, :shared], model.device), cache=cache, positions=slice(0))
    for batch, tokens in padded_batches([text[shared:] for text in texts], batch_tokens):
        at = [(b, len(prompts[i]) + t, token, i)
              for b, i in enumerate(batch) for t, token in enumerate(target)]
        row, column, token, text = to_device(at, model.device).T
        logits = model.read(to_device(tokens, model.device), cache=cache.expand(len(batch)),
                            positions=(row, column - 1 - shared)).logits
        spoken = logits.log_softmax(-1).gather(1, token[:, None])[:, 0]
        log_p.index_add_(0, text, spoken)
    return log_p.cpu()


def decisions(spelled):
    """Where the spellings of numbers part: {tokens up to there, as a tuple: [tokens that follow]}."""
    following = {}
    for number in spelled:
        for t in range(1, len(number)):
            following.setdefault(tuple(number[:t]), {})[number[t]] = None
    return {begun: [*tokens] for begun, tokens in following.items() if len(tokens) > 1}


def number_log_probabilities(model, cache, asked):
    """log p(number | numbers) (N,): the probability that the model writes each `[n]` next when it can write
    only these.

    cache: Rows; asked: {row: [the tokens of each number]}, whose numbers follow each other in the result. At
    each token the model's distribution is renormalised over the tokens that lead to one of the numbers, as in
    constrained decoding. (Renormalising whole numbers instead would favour short ones by several nats for
    each digit they lack.) Only where spellings part there is something to decide, and only these beginnings
    are read: as branches behind a row, which all of them share. The cache stays as it was.
    """
    rows, device = list(asked), cache.keys[0].device
    parting = [decisions(spelled) for spelled in asked.values()]
    branches = [[a for a in tree if not any(b[:len(a)] == a and b != a for b in tree)] for tree in parting]
    if not any(branches):
        return torch.zeros(sum(map(len, asked.values())), device=device)
    width = max(len(begun) for tree in parting for begun in tree)
    tokens = torch.zeros(len(rows), width * max(map(len, branches)), dtype=torch.long)
    vocabulary = sorted({token for tree in parting for follows in tree.values() for token in follows})
    column = {token: i for i, token in enumerate(vocabulary)}
    places, allowed, steps = [], [], []
    for b, (tree, ends, spelled) in enumerate(zip(parting, branches, asked.values())):
        first, nth = len(places), {begun: i for i, begun in enumerate(tree)}
        for i, branch in enumerate(ends):
            tokens[b, i * width:i * width + len(branch)] = torch.tensor(branch)
        for begun, follows in tree.items():
            branch = next(i for i, end in enumerate(ends) if end[:len(begun)] == begun)
            places.append((b, branch * width + len(begun) - 1))
            allowed += [(len(places) - 1, column[token]) for token in follows]
        for number in map(tuple, spelled):
            steps.append([(first + nth[number[:t]]) * len(vocabulary) + column[number[t]]
                          for t in range(1, len(number)) if number[:t] in nth])
    nothing, longest = len(places) * len(vocabulary), max(map(len, steps))
    steps = [own + [nothing] * (longest - len(own)) for own in steps]
    cache.take(rows, tokens.size(1), width)
    logits = model.read(to_device(tokens, device), cache=cache, positions=tuple(to_device(places, device).T),
                        vocabulary=to_device(vocabulary, device)).logits                    # (places, V')
    allowed = tuple(to_device(allowed, device).T)
    kept = torch.full_like(logits, float("-inf")).index_put(allowed, logits[allowed])
    return F.pad(kept.log_softmax(-1).flatten(), (0, 1))[to_device(steps, device)].sum(1)   # behind it a 0
