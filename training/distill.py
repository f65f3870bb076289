"""Distillation: trains a student to imitate the original's logits and hidden states."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import XLMRobertaForSequenceClassification

from training.dataset import Pairs
from training.original import BOS, EOS, MAX_LENGTH, PAD, Ids, Original, pad
from training.student import Vocabulary

_NUM_CONTROL = 4  # `<s>`, `</s></s>`, `</s>`
# Weight of the logits' squared error relative to the hidden states' error, so that both start near 0.05.
_LOGIT_WEIGHT = 0.05

_Places = tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """The training schedule.

    Attributes:
        num_pairs: Number of pairs to train on, over as many epochs as needed.
        learning_rate: Peak learning rate. It rises over the first 5 % of the pairs and falls to 0 along a
            cosine.
        max_batch_tokens: Most tokens in one step, including padding.
        seed: Seed for the order of the pairs.
    """

    num_pairs: int
    learning_rate: float
    max_batch_tokens: int = 3072
    seed: int = 1


def distill(
    student: XLMRobertaForSequenceClassification,
    original: Original,
    layers: Sequence[int],
    vocabulary: Vocabulary,
    pairs: Pairs,
    schedule: Schedule,
) -> None:
    """Train all weights of the student in place.

    The loss is the squared error of the logits plus the squared error of each token's hidden state after each
    layer except the last, divided by the variance of each channel. The hidden states are included because
    training with one logit per pair is slow.

    Args:
        student: The model to train.
        original: The model to imitate.
        layers: For each layer of the student, the layer of the original that it imitates.
        vocabulary: Maps the original's ids to the student's ids.
        pairs: The training pairs, in the original's ids.
        schedule: The training schedule.
    """
    student.train(True)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=schedule.learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True
    )
    seen, recent = 0, np.zeros(2)
    with tqdm(total=schedule.num_pairs, unit="pair", mininterval=10) as bar:
        for chosen in _batches(pairs, schedule):
            progress = seen / schedule.num_pairs
            warm, cold = min(progress * 20, 1.0), 0.5 + 0.5 * math.cos(math.pi * progress)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * warm * cold
            losses = imitation_losses(student, original, layers, vocabulary, chosen)
            optimizer.zero_grad()
            (_LOGIT_WEIGHT * losses[0] + losses[1]).backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            seen += len(chosen)
            error = np.array([loss.item() for loss in losses])
            recent = 0.98 * recent + 0.02 * error if recent.any() else error
            bar.update(len(chosen))
            bar.set_postfix(logits=f"{recent[0]:.3f}", hidden=f"{recent[1]:.4f}", refresh=False)
    student.train(False)


def imitation_losses(
    student: XLMRobertaForSequenceClassification,
    original: Original,
    layers: Sequence[int],
    vocabulary: Vocabulary,
    pairs: Sequence[tuple[Ids, Ids]],
) -> tuple[Tensor, Tensor]:
    """Return the squared error of the logits, and the unexplained share of the hidden states' variance."""
    pairs = [(query, passage[: MAX_LENGTH - _NUM_CONTROL - len(query)]) for query, passage in pairs]
    wanted, targets = original(pairs)
    ids, mask = pad([_sequence(*map(vocabulary.remap, pair)) for pair in pairs], padding=PAD)
    output = student(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    own_places, their_places = _places(pairs)
    missed = []
    for index, layer in enumerate(layers[:-1], start=1):
        target = targets[layer + 1][their_places]
        error = (output.hidden_states[index][own_places] - target).pow(2).mean(0)
        missed.append((error / target.var(0)).mean())
    return F.mse_loss(output.logits[:, 0], wanted), torch.stack(missed).mean()


def _places(pairs: Sequence[tuple[Ids, Ids]]) -> tuple[_Places, _Places]:
    """Return rows and columns of the shared tokens: all but the student's second `</s>` after the query."""
    rows, own, theirs = [], [], []
    for row, (query, passage) in enumerate(pairs):
        columns = np.arange(len(query) + len(passage) + _NUM_CONTROL - 1)
        rows.append(np.full(len(columns), row))
        theirs.append(columns)
        own.append(columns + (columns > len(query) + 1))
    shared_rows = np.concatenate(rows)
    return (shared_rows, np.concatenate(own)), (shared_rows, np.concatenate(theirs))


def _batches(pairs: Pairs, schedule: Schedule) -> Iterator[list[tuple[Ids, Ids]]]:
    """Yield batches of pairs with similar lengths, in random order, until `schedule.num_pairs` is reached."""
    rng = random.Random(schedule.seed)
    lengths = [
        min(len(query) + len(passage) + _NUM_CONTROL, MAX_LENGTH)
        for query, passage in zip(pairs.queries, pairs.passages, strict=True)
    ]
    given = 0
    while True:
        order = sorted(range(len(lengths)), key=lambda i: lengths[i] + rng.uniform(-8, 8))
        batches: list[list[int]] = [[]]
        for index in order:
            longest = max(lengths[index], max((lengths[i] for i in batches[-1]), default=0))
            if longest * (len(batches[-1]) + 1) > schedule.max_batch_tokens:
                batches.append([])
            batches[-1].append(index)
        rng.shuffle(batches)
        for batch in batches:
            if given >= schedule.num_pairs:
                return
            given += len(batch)
            yield [(pairs.queries[index], pairs.passages[index]) for index in batch]


def _sequence(query: Ids, passage: Ids) -> Ids:
    return np.concatenate([[BOS], query, [EOS, EOS], passage, [EOS]])
