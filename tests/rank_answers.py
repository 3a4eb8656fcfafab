"""Answers of a bank as several ranks give them, for tests/test_memory_parallel.py and longer runs by hand.

    torchrun --nproc_per_node=4 tests/rank_answers.py CHECKPOINT BANK QUESTIONS.json OUT.json

QUESTIONS is a list of strings. Rank 0 writes for each the answer and what every round routed to (number,
score), named and appended. --routing-keys int8: as the devices hold them. --stall R: rank R sleeps before the
second question. --kill R: it ends there. --batch N: all questions, N side by side.
"""
import argparse
import json
import os
import signal
import sys
import time
import weakref
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from common import main  # noqa: E402
from interleave import InterleaveConfig, answer_question, answer_questions  # noqa: E402
from memory_bank import Bank  # noqa: E402
from memory_parallel import ParallelMemory, Ranks  # noqa: E402
from prompts import load_checkpoint  # noqa: E402


def script():
    parser = argparse.ArgumentParser()
    for name in ("checkpoint", "bank", "questions", "out"):
        parser.add_argument(name)
    parser.add_argument("--routing-keys", default="bfloat16")
    parser.add_argument("--timeout", type=float, default=60)
    parser.add_argument("--batch", type=int, default=0)
    parser.add_argument("--stall", type=int, default=-1)
    parser.add_argument("--kill", type=int, default=-1)
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cpu")
    ranks = Ranks(device, args.timeout)
    model, tokenizer = load_checkpoint(args.checkpoint, device)
    memory = ParallelMemory(Bank(args.bank), device, ranks, args.routing_keys)
    found, config = [], InterleaveConfig(max_rounds=4)  # of a chat backbone two
    questions = json.loads(Path(args.questions).read_text())
    if args.batch:
        asked, questions = questions, []
        found = [[answer, [[r.routed, r.named, r.appended] for r in rounds]] for answer, rounds in
                 answer_questions(model, tokenizer, memory, memory.texts, asked, config, args.batch)]
    for i, question in enumerate(questions):
        if i == 1 and ranks.rank == args.stall:
            time.sleep(1000)
        if i == 1 and ranks.rank == args.kill:
            os.kill(os.getpid(), signal.SIGKILL)
        answer, rounds = answer_question(model, tokenizer, memory, memory.texts, question, config)
        found.append([answer, [[r.routed, r.named, r.appended] for r in rounds]])
    if ranks.rank == 0:
        Path(args.out).write_text(json.dumps(found))
    group = weakref.ref(dist.group.WORLD)
    ranks.end()
    assert group() is None, "the group outlives Ranks.end(): its threads may abort when the interpreter ends"


if __name__ == "__main__":
    main(script)
