"""Ask a memory: encode a folder of documents, then answer questions and name the sources.

    python sample.py --documents examples "What is the special magic number for gentle-otter?"
    python sample.py --checkpoint out/demo --documents examples          # no question: asks for them
    python sample.py --documents examples --trace "..."                  # what was routed to, named, appended

The interleave loop of the paper (section 3.5) lives here: `interleave`. In a round the model names documents or ends the
retrieval; the system appends the text of the named ones to the question and the next round begins, with new routing.
"""
from dataclasses import dataclass, field
from typing import Annotated, Literal

import torch
import tyro
from tqdm import tqdm

from common import UserError, autocast, command_line, detect_device, keep_freed_memory, main
from model import MSA, Cache
from prepare_data import read_folder
from tokenizer import Tokenizer


@dataclass
class InterleaveConfig:
    temperature: float = 0.0        # 0: greedy
    top_p: float = 1.0              # sample from the smallest set of tokens with this much probability
    router_weight: float = 1.0      # how much routing scores count in naming; 0: the paper's pure generation, 1000: router alone
    max_rounds: int = 4             # retrievals before the answer is forced; 1: no interleave; 0: nothing is named or appended
    max_documents: int = 8          # documents named in one round
    max_answer_tokens: int = 64     # longer answers are cut

    def __post_init__(self):
        for name, low in (("temperature", 0), ("router_weight", 0), ("max_rounds", 0), ("max_documents", 1), ("max_answer_tokens", 1)):
            if not low <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} is {getattr(self, name)}; it must be at least {low}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must be above 0 and at most 1")


@dataclass
class SampleConfig:
    question: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="[QUESTION]")] = ""  # without one, they are read from the terminal
    checkpoint: str = "checkpoints/demo"                 # folder that train.py wrote
    documents: str = ""                                  # folder of .txt and .md files, required
    max_document_tokens: int = 128                       # longer files are split at paragraphs; the demo model knows short ones
    trace: bool = False                                  # print each round: routed to, named, appended
    seed: int = 1337                                     # of sampling
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"  # auto: cuda, else mps, else cpu
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"  # of the matrix products; weights stay float32
    interleave: tyro.conf.OmitArgPrefixes[InterleaveConfig] = field(default_factory=InterleaveConfig)

    def __post_init__(self):
        if self.max_document_tokens < 1:
            raise UserError(f"max_document_tokens is {self.max_document_tokens}; it must be at least 1")
        if self.seed < 0:
            raise UserError(f"seed is {self.seed}; it must be at least 0")


@dataclass
class Round:
    """What one retrieval round did; documents by number."""
    routed: list      # (number, score): what some memory layer selected, by mean score
    named: list       # numbers, in the order in which the model named them
    appended: list    # the same, in the order of appending


# ---------------------------------------------------------------------------------------------------------------------
# Small steps

def choose(logits, temperature, top_p):
    """An index of `logits` (n,): the largest at temperature 0, else a sample from the top_p part of the distribution."""
    if temperature == 0:
        return int(logits.argmax())
    probabilities, order = (logits / temperature).softmax(-1).sort(descending=True, stable=True)
    probabilities[probabilities.cumsum(-1) - probabilities >= top_p] = 0
    return int(order[torch.multinomial(probabilities, 1)])


def rank_documents(selections):
    """What the memory layers selected for one question, best first: a list of (document index, mean score).

    A layer that did not select a document counts its own k-th score for it. Ties go to the lower number.
    """
    layers = [{d: s for d, s in zip(selection.documents[0].tolist(), selection.scores[0].tolist()) if d >= 0}
              for selection in selections]
    layers = [layer for layer in layers if layer]
    found = {d for layer in layers for d in layer}
    means = {d: sum(layer.get(d, min(layer.values())) for layer in layers) / len(layers) for d in found}
    return sorted(means.items(), key=lambda pair: (-pair[1], pair[0]))


def read(model, tokens, **kwargs):
    """`model.read` of one sequence of ids; returns the logits of all its positions (T, V)."""
    return model.read(torch.tensor([tokens], device=model.device), **kwargs).logits[0]


def number_log_probabilities(model, tokenizer, cache, numbers):
    """log p(number | numbers) (n,): the probability that the model writes each `[n]` next when it can write only these.

    At each token the model's distribution is renormalised over the tokens that lead to one of them, as in constrained
    decoding. (Renormalising whole numbers instead would favour short ones by several nats for each digit they lack.)
    All are scored in one batch that continues copies of the cache.
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


# ---------------------------------------------------------------------------------------------------------------------
# The interleave loop

@torch.no_grad()
def interleave(model, tokenizer, memory, texts, question, config):
    """Answer one question (section 3.5). Yields a Round after each retrieval, then the answer as pieces of text.

    memory: what `MSA.encode` returned, or None; texts: token ids of the documents' texts, by position in the memory; question: str.
    In a round the model alone decides between another document, stop, and end of retrieval. For another document the
    candidates are those that some memory layer selected and that are not yet named or appended; the highest
    `log p(number | candidates) + router_weight * score / tau` wins, so that the model cannot cite what it did not see.
    """
    prompt, seen = tokenizer.question(tokenizer.encode(question)), set()
    for rounds in range(config.max_rounds + 1):
        cache = Cache()
        mask = torch.tensor([[True] * len(prompt) + [False]], device=model.device)  # generated tokens never route
        logits = read(model, [*prompt, tokenizer.retrieve], memory=memory, routing_mask=mask, cache=cache)[-1]
        ranked = rank_documents(cache.selections)
        named = []
        while rounds < config.max_rounds:
            candidates = [(d, score) for d, score in ranked if d not in seen and d not in named]
            choices = [tokenizer.stop if named else tokenizer.end_of_retrieval]
            if candidates and len(named) < config.max_documents:
                choices.append(tokenizer.open_bracket)
            if choices[choose(logits[choices], config.temperature, config.top_p)] != tokenizer.open_bracket:
                break
            log_p = number_log_probabilities(model, tokenizer, cache, [memory.numbers[d] for d, _ in candidates])
            scores = torch.tensor([score for _, score in candidates]) / model.config.router_temperature
            named.append(candidates[choose(log_p + config.router_weight * scores, config.temperature, config.top_p)][0])
            logits = read(model, tokenizer.number(memory.numbers[named[-1]]), cache=cache)[-1]
        if rounds < max(config.max_rounds, 1):
            yield Round([(memory.numbers[d], score) for d, score in ranked], [memory.numbers[d] for d in named],
                        [memory.numbers[d] for d in sorted(named)])
        if not named:
            break
        seen.update(named)
        for d in sorted(named):
            prompt = prompt + tokenizer.appended(memory.numbers[d], texts[d])
    yield from generate_answer(model, tokenizer, cache, config)


def generate_answer(model, tokenizer, cache, config):
    """Continue a cache, which ends with `<|retrieve|>`, by the end of retrieval and an answer; yields it as pieces of text."""
    token, answer, shown = tokenizer.end_of_retrieval, [], ""
    for _ in range(config.max_answer_tokens):
        logits = read(model, [token], cache=cache)[-1, :tokenizer.vocab_size]  # a model's vocabulary may be padded
        token = choose(logits, config.temperature, config.top_p)
        if token == tokenizer.end:
            break
        answer.append(token)
        text = tokenizer.decode(answer)
        if not text.endswith("\ufffd"):  # a character may be spread over several tokens
            yield text[len(shown):]
            shown = text
    if answer and tokenizer.decode(answer) != shown:
        yield tokenizer.decode(answer)[len(shown):]


def answer_question(model, tokenizer, memory, texts, question, config):
    """`interleave` to its end: (answer, rounds)."""
    events = list(interleave(model, tokenizer, memory, texts, question, config))
    return "".join(e for e in events if isinstance(e, str)), [e for e in events if isinstance(e, Round)]


@torch.no_grad()
def encode_texts(model, tokenizer, texts, numbers=None):
    """Encode documents given as token ids of their texts, with a progress bar. Returns (Memory, tokens per second)."""
    numbers = range(len(texts)) if numbers is None else numbers
    spelled = [torch.tensor(tokenizer.document(n, text)) for n, text in zip(numbers, texts)]
    with tqdm(desc="encoding", total=sum(map(len, spelled)), unit=" tokens", unit_scale=True, delay=1) as bar:
        memory = model.encode(spelled, numbers, progress=bar.update)
        return memory, bar.n / max(bar.format_dict["elapsed"], 1e-9)


def load_checkpoint(folder, device):
    """(model, tokenizer) of a checkpoint folder. Raises UserError when they do not belong together."""
    model, tokenizer = MSA.load(folder, device), Tokenizer.load(folder)
    if tokenizer.vocab_size > model.config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {model.config.vocab_size}; "
                        "they do not belong together")
    tokenizer.check_number_chunk(model.config.number_chunk)
    return model, tokenizer


# ---------------------------------------------------------------------------------------------------------------------

def show(model, tokenizer, memory, documents, texts, question, config):
    """Stream one answer to the terminal, then its sources."""
    place = dict(zip(memory.numbers, documents))
    used, first, answering = [], None, False
    for event in interleave(model, tokenizer, memory, texts, question, config.interleave):
        if isinstance(event, str):
            print(event, end="", flush=True)
            answering = True
            continue
        used += event.appended
        first = next((n for n, _ in event.routed), None) if first is None else first
        if config.trace:
            print("round: routed to " + ", ".join(f"[{n}] {score:.3f}" for n, score in event.routed))
            print("       named " + (", ".join(f"[{n}]" for n in event.named) or "nothing: end of retrieval"))
            for n in event.appended:
                print(f"       appended [{n}] {place[n].where()}: {place[n].text}")
    print("" if answering else "(no answer)")
    for n in used:
        print(f"  [{n}] {place[n].where()}")
    if not used and first is not None:
        print(f"  [{first}] {place[first].where()} (read in the memory; no text was appended)")


def script():
    config = command_line(SampleConfig, __doc__, takes_file=False)
    if not config.documents:
        raise UserError("--documents is missing; give a folder of .txt or .md files, such as --documents examples")
    keep_freed_memory()
    device, dtype, reason = detect_device(config.device, config.dtype)
    torch.manual_seed(config.seed)
    model, tokenizer = load_checkpoint(config.checkpoint, device)
    if model.config.full_attention:
        raise UserError(f"{config.checkpoint}: trained with full_attention, it has no memory; only eval.py --baseline full reads it")
    documents = read_folder(config.documents, lambda text: len(tokenizer.encode(text)), config.max_document_tokens)
    texts = [tokenizer.encode(document.text) for document in documents]
    with autocast(device, dtype):
        memory, speed = encode_texts(model, tokenizer, texts)
        print(f"{len(documents)} documents, {sum(map(len, texts)):,} tokens, encoded at {speed:,.0f} tokens/s on {device} ({reason})")
        if config.question:
            return show(model, tokenizer, memory, documents, texts, config.question, config)
        while True:
            try:
                question = input("question> ").strip()
            except (EOFError, KeyboardInterrupt):
                return print()
            if question:
                show(model, tokenizer, memory, documents, texts, question, config)


if __name__ == "__main__":
    main(script)
