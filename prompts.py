"""How pretrained models are asked: the chat template of a backbone, and the prompts of the authors' MSA-4B.

A chat backbone has not learned to name documents. Its router finds them, their texts stand in the message:

    routing    <head>What is it?                                                the question's tokens route
    answer     <head>Answer ...\\n\\n[7]. text\\n\\n[12]. text\\n\\nQuestion: What is it?<tail>    head, tail: of the chat template

MSA-4B names documents, reads them, and goes on until it has enough (section 3.5):

    document   <|im_start|>[7]. text[7]<|im_end|>
    question   <|im_start|>user\\n | \\nPlease answer ...\\n\\nWhat is it?\\nPlease return ... question\\n | <|im_end|>\\n<|im_start|>
    a round    [7][12]<|object_ref_end|>[7]. text\\n[12]. text\\n<|object_ref_end|>        written by the model | appended by us
    the end    <End-of-Retrieve><|im_start|>The user's question is: What is it?\\n<|object_ref_end|>It is this.<|im_end|>

Text between two special tokens is encoded as a whole, as the authors do it: "[7]. " and what follows share tokens. Users' text is never
parsed for special tokens.
"""
import re
from pathlib import Path

import torch

from checkpoint import find, read_json
from common import UserError, atomic_file
from model import MSA
from tokenizer import Tokenizer
from tokenizer_json import read_tokenizer_json

FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
MARK = "\ue000"  # stands for the message while a template is rendered
MSA_HEAD, MSA_TAIL = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>"
MSA_TOKENS = ("<|im_start|>", "<|im_end|>", "<|object_ref_end|>")
END_OF_RETRIEVE = "<End-of-Retrieve>"


def load_tokenizer(folder, config):
    """The tokenizer of a checkpoint folder; config: its ModelConfig. Raises UserError where they do not belong together."""
    tokenizer = dict(nanomsa=Tokenizer, msa=MSATokenizer, chat=ChatTokenizer)[config.prompts].load(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model only {config.vocab_size}; "
                        "they do not belong together")
    tokenizer.check_number_chunk(config.number_chunk)
    return tokenizer


class ChatTokenizer(Tokenizer):
    """The tokenizer of a chat backbone. Methods return plain lists of token ids."""

    def __init__(self, encoding, template=("", "\n"), end=None):
        """template: what stands before and behind a message, special tokens in it; end: the special token that ends an answer."""
        self.encoding, self.vocab_size, self.first_number, self.files = encoding, encoding.n_vocab, None, {}
        self.template, self.ends = tuple(template), {encoding._special_tokens[end]} if end else set()
        self.head, self.tail = map(self.encode_template, template)

    @classmethod
    def load(cls, folder):
        """Reads tokenizer.json, tokenizer_config.json and chat_template.jinja, where there is one. Raises UserError."""
        encoding, path = read_tokenizer_json(Path(folder) / "tokenizer.json"), Path(folder) / "tokenizer_config.json"
        about = read_json(path, "a tokenizer's configuration") if path.exists() else {}
        name_of = lambda token: token.get("content") if isinstance(token, dict) else token
        end = name_of(about.get("eos_token"))
        if end is not None and (not isinstance(end, str) or end not in encoding._special_tokens):
            raise UserError(f"{path}: eos_token is {end!r}, which is not a special token of tokenizer.json")
        tokens = {key: name_of(about.get(key)) or "" for key in ("bos_token", "eos_token")}
        tokenizer = cls(encoding, cls.read_template(folder, about, tokens), end)
        tokenizer.files = {path.name: path.read_bytes() for path in map(Path(folder).joinpath, FILES) if path.exists()}
        return tokenizer

    @staticmethod
    def read_template(folder, about, tokens):
        """(head, tail) of the chat template; of a base model without one: nothing, and a line's end."""
        from jinja2.sandbox import ImmutableSandboxedEnvironment  # torch brings it

        path, template = Path(folder) / "chat_template.jinja", about.get("chat_template")
        try:
            if path.exists():
                template = path.read_text(encoding="utf-8")
            if isinstance(template, list):
                template = next((entry["template"] for entry in template if entry.get("name") == "default"), None)
            if template is None:
                return "", "\n"
            environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
            rendered = environment.from_string(template).render(
                messages=[{"role": "user", "content": MARK}], add_generation_prompt=True, **tokens)
            head, tail = rendered.split(MARK)
            return head, tail
        except Exception as error:  # a template may do anything but what is asked of it here
            raise UserError(f"{folder}: its chat template cannot be used ({type(error).__name__}: {error})") from None

    def encode_template(self, text):
        """The ids of text of a template's, never of a user's: special tokens in it are parsed."""
        special = self.encoding._special_tokens
        parts = re.split("(" + "|".join(map(re.escape, sorted(special, key=len, reverse=True))) + ")", text) if special else [text]
        return [token for part in parts if part for token in ([special[part]] if part in special else self.encode(part))]

    def number(self, number):
        return self.encode(f"[{number}]")

    def document(self, number, text):
        """`[n]. text[n]`; `text` is a list of ids."""
        return self.encode(f"[{number}]. {self.decode(text)}[{number}]")

    def question(self, text):
        """(ids, which of them route) of what is routed."""
        own = self.encode(text)
        return self.head + own, [False] * len(self.head) + [True] * len(own)

    def message(self, text, appended=()):
        """The ids of a question behind documents, pairs (number, text), up to where the answer begins."""
        if appended:
            documents = "".join(f"[{number}]. {document}\n\n" for number, document in appended)
            text = f"Answer the question from these documents, in few words.\n\n{documents}Question: {text}"
        return [*self.head, *self.encode(text), *self.tail]

    def save(self, folder):
        """Write the files that `load` has read, as they were."""
        for name, data in self.files.items():
            with atomic_file(Path(folder) / name, "wb") as file:
                file.write(data)


class MSATokenizer(ChatTokenizer):
    """The tokenizer of the authors' MSA-4B."""

    def __init__(self, encoding, template=(MSA_HEAD, MSA_TAIL), end="<|im_end|>"):
        missing = [token for token in MSA_TOKENS if token not in encoding._special_tokens]
        if missing:
            raise UserError(f"encoding {encoding.name}: it lacks the special tokens {', '.join(missing)}")
        super().__init__(encoding, template, end)
        self.im_start, self.im_end, self.ref_end = ([encoding._special_tokens[token]] for token in MSA_TOKENS)

    @staticmethod
    def read_template(folder, about, tokens):
        return MSA_HEAD, MSA_TAIL

    def document(self, number, text):
        """`<|im_start|>[n]. text[n]<|im_end|>`; `text` is a list of ids."""
        return [*self.im_start, *super().document(number, text), *self.im_end]

    def question(self, text, later=False):
        """(ids, which of them route) of a question as it stands before a round's documents, template and all.

        later: from the second round on the last line's end does not route.
        """
        own = self.encode(f"\nPlease answer the question based on the above historical document information\n\n{text}\n"
                          "Please return all documents related to the question\n")
        return ([*self.head, *own, *self.tail],
                [False] * len(self.head) + [True] * (len(own) - later) + [False] * (len(self.tail) + later))

    def appended(self, documents):
        """The texts of documents, pairs (number, text), that are appended after a round; all of these tokens route in the next."""
        return self.encode("".join(f"[{number}]. {text}\n" for number, text in documents))

    def end_of_retrieval_prompt(self, text):
        return [*self.im_start, *self.encode(f"The user's question is: {text}\n"), *self.ref_end]


def load_checkpoint(name, device, dtype=torch.float32):
    """(model, tokenizer) of a checkpoint, a folder or a name on the Hugging Face Hub; weights in `dtype`.

    Raises UserError when they do not belong together.
    """
    folder = find(name)
    model = MSA.from_pretrained(folder, device, dtype)
    return model, load_tokenizer(folder, model.config)
