"""How pretrained models are asked: the chat template of a backbone, and the prompts of the authors' MSA-4B.

A chat backbone has not learned to name documents. Its router finds them, their texts stand in the message
(head and tail are the chat template's):

    routing    <head>What is it?                                                the question's tokens route
    answer     <head>[7]. text\\n\\n[12]. text\\n\\nQuestion: What is it?\\nAnswer:<tail>Answer:

MSA-4B names documents, reads them, and goes on until it has enough (section 3.5):

    document   <|im_start|>[7]. text[7]<|im_end|>
    question   <|im_start|>user\\n
               \\nPlease answer ...\\n\\nWhat is it?\\nPlease return ... question\\n   these tokens route
               <|im_end|>\\n<|im_start|>
    a round    [7][12]<|object_ref_end|>                                        written by the model
               [7]. text\\n[12]. text\\n<|object_ref_end|>                      appended by us
    the end    <End-of-Retrieve><|im_start|>The user's question is: What is it?\\n<|object_ref_end|>
               It is this.<|im_end|>

Text between two special tokens is encoded as a whole, as the authors do it: "[7]. " and what follows share
tokens. Users' text is never parsed for special tokens.
"""
import json
import re
from datetime import datetime
from functools import cached_property, partial
from pathlib import Path

import torch
from jinja2 import TemplateError  # torch brings it
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from checkpoint import find
from common import UserError, atomic_file, detect_device, read_json, read_text
from model import MSA
from tokenizer import HubEncoding, Tokenizer

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json")
MARK = "\ue000"  # stands for the message while a template is rendered
MSA_HEAD, MSA_TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>"
MSA_TOKENS = ("<|im_start|>", "<|im_end|>", "<|object_ref_end|>")
END_OF_RETRIEVE = "<End-of-Retrieve>"
NOT_FOUND = "Not in these documents."  # what a trained chat backbone answers where no document does


def load_tokenizer(folder, config):
    """The tokenizer of a checkpoint folder; config: its ModelConfig. Raises UserError if they do not fit."""
    tokenizer = dict(nanomsa=Tokenizer.load, msa=MSATokenizer, chat=ChatTokenizer)[config.prompts](folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only "
                        f"{config.vocab_size}; they do not belong together")
    tokenizer.check_number_chunk(config.number_chunk)
    return tokenizer


class ChatTokenizer(Tokenizer):
    """The tokenizer of a chat backbone; what is spelled is a plain list of token ids.

    template: (text before a message, behind it, whether it strips the message). ends: ids that end an answer.
    """

    template = None

    def __init__(self, folder):
        """Reads FILES and config.json, of which only tokenizer.json must be there. Raises UserError."""
        folder = Path(folder)
        self.encoding = HubEncoding(folder / "tokenizer.json")
        self.encode_template = self.encoding.encode_template
        self.vocab_size = self.encoding.n_vocab
        self.special_tokens, self.first_number = {}, None  # ours: none
        about = read_optional(folder / "tokenizer_config.json")
        self.ends = end_tokens(folder, about, self.encoding)
        self.turn_end = self.encoding.ids.get(token_text(about.get("eos_token")))  # None: it names none
        self.template = self.template or read_template(folder, about)
        self.start = []  # a template writes the BOS itself
        if self.template is None:
            self.start = self.encoding.start()
            self.template = ("", "\n", False)
        self.head = [*self.start, *self.encode_template(self.template[0])]
        self.files = {name: (folder / name).read_bytes() for name in FILES if (folder / name).exists()}

    def document(self, number, text):
        """`[n]. text[n]`; `text` is a list of ids."""
        return self.encode(f"[{number}]. {self.decode(text)}[{number}]")

    def routed(self, text):
        """(ids, which of them route) of what is routed."""
        own = self.encode(text)
        return self.head + own, [False] * len(self.head) + [True] * len(own)

    def message(self, question, appended=()):
        """The ids of a question behind documents, pairs (number, text), up to where a short answer begins."""
        documents = "".join(f"[{number}]. {document}\n\n" for number, document in appended)
        return self.templated(f"{documents}Question: {question}\nAnswer:", "Answer:")

    def answer(self, text):
        """The ids of an answer that continues a `message`, and of its end."""
        if not self.ends:
            raise UserError(f"{self.encoding.path.parent}: no token ends an answer; name one as eos_token in "
                            "tokenizer_config.json")
        begun = self.encode("Answer:")  # alone, a first word may be spelled in another way
        end = min(self.ends) if self.turn_end is None else self.turn_end
        return [*self.encode(f"Answer: {text}")[len(begun):], end]

    @cached_property
    def refusal(self):
        """The ids of NOT_FOUND as an answer: every token that is written asks for them."""
        return self.answer(NOT_FOUND)

    def templated(self, text, begun=""):
        """The ids of a user's message in the chat template, and of an answer that has `begun`."""
        head, tail, strips = self.template
        return [*self.start, *self.encode_template(head, text.strip() if strips else text, tail + begun)]

    def save(self, folder):
        """Write the files that were read, as they were."""
        for name, data in self.files.items():
            with atomic_file(Path(folder) / name, "wb") as file:
                file.write(data)
        for name in {*FILES, "tokenizer.tiktoken", "tokenizer_msa.json"} - {*self.files}:  # an earlier one's
            (Path(folder) / name).unlink(missing_ok=True)


class MSATokenizer(ChatTokenizer):
    """The tokenizer of the authors' MSA-4B."""

    template = (MSA_HEAD, MSA_TAIL, False)

    def __init__(self, folder):
        super().__init__(folder)
        missing = [token for token in MSA_TOKENS if token not in self.encoding.ids]
        if missing:
            raise UserError(f"{folder}/tokenizer.json: it lacks the special tokens {', '.join(missing)}")
        self.im_start, self.im_end, self.ref_end = ([self.encoding.ids[token]] for token in MSA_TOKENS)
        self.tail = self.encode_template(MSA_TAIL)
        self.ends |= {*self.im_end}

    def document(self, number, text):
        """`<|im_start|>[n]. text[n]<|im_end|>`; `text` is a list of ids."""
        return [*self.im_start, *super().document(number, text), *self.im_end]

    def routed(self, text, later=False):
        """(ids, which of them route) of a question as it stands before a round's documents, template and all.

        later: from the second round on the last line's end does not route.
        """
        own = self.encode("\nPlease answer the question based on the above historical document information\n"
                          f"\n{text}\nPlease return all documents related to the question\n")
        routes = [True] * (len(own) - later) + [False] * (len(self.tail) + later)
        return [*self.head, *own, *self.tail], [False] * len(self.head) + routes

    def appended_texts(self, documents):
        """The texts of documents, pairs (number, text), appended after a round; all route in the next."""
        return self.encode("".join(f"[{number}]. {text}\n" for number, text in documents))

    def end_of_retrieval_prompt(self, text):
        return [*self.im_start, *self.encode(f"The user's question is: {text}\n"), *self.ref_end]


def read_optional(path):
    """The values of a JSON file, {} without one. Raises UserError for a damaged one."""
    return read_json(path, "a JSON object") if path.exists() else {}


def end_tokens(folder, about, encoding):
    """The ids that end an answer: of tokenizer_config.json, config.json and generation_config.json, all."""
    ends, name = set(), token_text(about.get("eos_token"))
    if name is not None:
        if not isinstance(name, str) or name not in encoding.ids:
            raise UserError(f"{folder}/tokenizer_config.json: eos_token is {name!r}, "
                            "which is not in tokenizer.json")
        ends.add(encoding.ids[name])
    for path in (folder / "config.json", folder / "generation_config.json"):
        found = read_optional(path).get("eos_token_id")
        if found is None:
            continue
        listed = found if isinstance(found, list) else [found]
        if any(type(i) is not int or i < 0 for i in listed):
            raise UserError(f"{path}: eos_token_id is {found!r}; it must be a token's id, or a list of ids")
        ends |= {i for i in listed if i < encoding.n_vocab}  # no other is ever written
    return ends


def token_text(token):
    """A token of tokenizer_config.json is its text, or an object that has it."""
    return token.get("content") if isinstance(token, dict) else token


# ------------------------------------------------------------------------------------------------------------
# Chat templates, rendered as transformers does it

def raise_exception(message):
    raise TemplateError(message)


def render(template, message, tokens):
    """A chat template with one message of a user's, up to where the answer begins; tokens: bos_token, ..."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
    environment.filters["tojson"] = partial(json.dumps, ensure_ascii=False)  # jinja's own escapes HTML
    environment.globals["raise_exception"] = raise_exception
    environment.globals["strftime_now"] = lambda form: datetime.now().strftime(form)
    # {% generation %} marks an answer for training: for us it is a block like any other
    template = re.sub(r"(\{%[-+]?\s*(?:end)?)generation(\s*[-+]?%\})", r"\1with\2", template)
    return environment.from_string(template).render(
        messages=[{"role": "user", "content": message}], tools=None, documents=None,
        add_generation_prompt=True, enable_thinking=False, **tokens)


def read_template(folder, about):
    """`template` of a ChatTokenizer, from a folder's chat template; None without one.

    about: tokenizer_config.json. Raises UserError for a template that cannot be used.
    """
    path, template = folder / "chat_template.jinja", about.get("chat_template")
    try:
        if path.exists():
            template = read_text(path)
        if isinstance(template, list):
            template = {entry["name"]: entry["template"] for entry in template}["default"]
        if template is None:
            return None
        tokens = dict(bos_token="", eos_token="")
        for key, token in about.items():
            if key.endswith("_token") and isinstance(token_text(token), str):
                tokens[key] = token_text(token)
        rendered = render(template, MARK, tokens)
        parts = rendered.split(MARK)
        if len(parts) != 2:
            raise ValueError(f"it writes the user's message {len(parts) - 1} times; it must be once")
        head, tail = parts
        if "<think>" in tail.rpartition("</think>")[2]:  # it always thinks: the thought is empty
            tail = f"{tail.rstrip()}\n\n</think>\n\n"
        return head, tail, rendered == render(template, f" {MARK} ", tokens)
    except Exception as error:  # a template may do anything but what is asked of it here
        what = f"{type(error).__name__}: {error}"
        raise UserError(f"{folder}: its chat template cannot be used ({what})") from None


def load_checkpoint(folder, device, dtype=torch.float32):
    """(model, tokenizer) of a checkpoint folder; weights in `dtype`. Raises UserError when they do not belong
    together."""
    model = MSA.from_pretrained(folder, device, dtype)
    return model, load_tokenizer(folder, model.config)


def open_checkpoint(name, device, dtype):
    """(model, tokenizer, "cpu (why)") of a checkpoint, a folder, a .gguf file or a name on the Hub, where and
    as the flags --device and --dtype say."""
    folder = find(name)
    device, dtype, reason = detect_device(device, dtype, MSA.read_config(folder)[0].hidden_size)
    return *load_checkpoint(folder, device, dtype), f"{device} ({reason})"
