"""ALM (arXiv:2503.20083): a student that writes bytes learns from a teacher that writes syllables.

The text that both share is scarce, 480 words, so that the student learns it by heart if it has nothing else. With
three times as much, the chunk likelihoods alone did neither better nor worse than the text (0.002 ± 0.009 bits a byte),
and both together still did better.
"""

from __future__ import annotations

import math

import potstill as ps
import torch
from common import Source, better, cross_entropy, draw, pretrained, report, shows, train
from plots import bars
from potstill.xtok import Aligner, VocabBytes
from potstill.xtok.alm import linear_alm_loss, next_token_log_probs
from torch import Tensor

CLAIM = "A byte student of a subword teacher's chunk likelihoods codes held-out text better than one of the text alone"
ALPHABET = b" abdegiklmnoprstu"
BYTES, WORDS = len(ALPHABET), 48
SYLLABLES = [a + b for a in "bdgklmnprst" for b in "aeiou"][:40]
PIECES = [" " + s for s in SYLLABLES] + SYLLABLES  # a syllable begins a word, or goes on
TEACHER_CONTEXT, STUDENT_CONTEXT = 6, 12


def text(source: Source, words: list[list[int]], n: int, seed: int) -> list[list[int]]:
    """n rows of twelve words as the teacher's ids."""
    rows = draw(source, n, 12, seed)[:, 3:].tolist()
    return [[piece for word in row for piece in words[word]] for row in rows]


def as_bytes(row: list[int]) -> list[int]:
    return [ALPHABET.index(c) for piece in row for c in PIECES[piece].encode()]


def flat(rows: list[list[int]], context: int, pad: int) -> tuple[Tensor, Tensor]:
    """All ids [n] and the context [n, C] that ends with each."""
    joined = [torch.tensor([pad] * (context - 1) + row).unfold(0, context, 1) for row in rows]
    return torch.cat([torch.tensor(row) for row in rows]), torch.cat(joined)


def followed(rows: list[list[int]], context: int, pad: int) -> tuple[Tensor, Tensor]:
    """The contexts that are followed by an id of their row, and that id."""
    pairs = [flat([row], context, pad) for row in rows]
    return torch.cat([c[:-1] for _, c in pairs]), torch.cat([ids[1:] for ids, _ in pairs])


def experiment(seed: int, smoke: bool) -> dict:
    steps = 4 if smoke else 300
    g = torch.Generator().manual_seed(seed)
    words = []
    for _ in range(WORDS):
        first, *rest = torch.randint(0, 40, (int(torch.randint(1, 4, (1,), generator=g)),), generator=g).tolist()
        words.append([first, *(40 + r for r in rest)])
    source = Source(seed, WORDS, order=1, rank=16, sharpness=7.0)
    teacher_data = followed(text(source, words, 20 if smoke else 800, seed), TEACHER_CONTEXT, len(PIECES))
    few = text(source, words, 10 if smoke else 40, seed + 100)
    unseen = text(source, words, 10 if smoke else 60, seed + 200)
    teacher = pretrained(seed, teacher_data, len(PIECES) + 1, 64, 4 if smoke else 600, context=TEACHER_CONTEXT)
    aligner = Aligner(
        VocabBytes.from_callback(BYTES, lambda i: ALPHABET[i : i + 1]),
        VocabBytes.from_callback(len(PIECES), lambda i: PIECES[i].encode()),
    )
    head = ps.Head(teacher.head.detach())
    batches = []
    for start in range(0, len(few), 10):
        rows = few[start : start + 10]
        alignment = aligner([as_bytes(row) for row in rows], rows)
        ids, contexts = flat(rows, TEACHER_CONTEXT, len(PIECES))
        with torch.no_grad():
            wanted = next_token_log_probs(teacher.hidden(contexts), head, ids, alignment.teacher_ptr)
        batches.append((alignment, wanted, *flat([as_bytes(row) for row in rows], STUDENT_CONTEXT, BYTES)))
    labelled = followed([as_bytes(row) for row in few], STUDENT_CONTEXT, BYTES)
    held_out = followed([as_bytes(row) for row in unseen], STUDENT_CONTEXT, BYTES)
    found: dict = {}
    for name in ("text", "chunk likelihoods", "both"):
        # as in the paper, the student can read and write before it is handed to the teacher
        student = pretrained(seed + 50, labelled, BYTES + 1, 48, steps // 3, context=STUDENT_CONTEXT)

        def loss(step, i, student=student, name=name):
            total = torch.zeros(())
            if name != "chunk likelihoods":
                total = total + cross_entropy(student, labelled[0][i], labelled[1][i])
            if name != "text":
                alignment, wanted, ids, contexts = batches[step % len(batches)]
                chunks = linear_alm_loss(student.hidden(contexts), student.head, ids, wanted, alignment)
                total = total + 100.0 * chunks  # about what tau = 100 divides it by
            return total

        train(student, loss, len(labelled[0]), steps, seed=seed, batch=384)
        nats = float(cross_entropy(student, *held_out).detach())
        found[f"{name}: bits a byte"] = nats / math.log(2)
    return found


def verdict(runs: list[dict]) -> tuple[bool, str]:
    alone = better(runs, "chunk likelihoods: bits a byte", "text: bits a byte")
    both = better(runs, "both: bits a byte", "text: bits a byte")
    return shows(alone), (
        f"chunk likelihoods alone code a byte in {alone[0]:.3f} ± {alone[1]:.3f} bits less than the text, "
        f"both together in {both[0]:.3f} ± {both[1]:.3f} less"
    )


def picture(axis, runs) -> None:
    bars(axis, runs, {f"{n}: bits a byte": n for n in ("text", "chunk likelihoods", "both")}, "held-out bits a byte")


def main(argv=None) -> dict:
    return report(__file__, CLAIM, experiment, verdict, picture, argv=argv)


if __name__ == "__main__":
    main()
