"""Teaches a student the original's scores."""

from __future__ import annotations

import math
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import XLMRobertaForSequenceClassification

from training.labels import Labels
from training.original import MAX_LENGTH, Ids
from training.student import BOS, EOS, PAD


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """How to train.

    Attributes:
        num_pairs: Pairs to see, over as many rounds as that takes.
        learning_rate: At its highest; it rises over the first twentieth and falls to 0 along a cosine.
        max_batch_tokens: Most tokens in one step, padding included.
        seed: Of the order.
    """

    num_pairs: int
    learning_rate: float
    max_batch_tokens: int = 3072
    seed: int = 1


def distill(
    student: XLMRobertaForSequenceClassification,
    labels: Labels,
    remapped: tuple[Sequence[Ids], Sequence[Ids]],
    schedule: Schedule,
    *,
    guide: XLMRobertaForSequenceClassification | None = None,
    guide_layers: Sequence[int] = (),
) -> None:
    """Train all of the student's weights in bfloat16 arithmetic, in place.

    The loss is the squared error of the logits and, where there is a guide, of each token's hidden
    state after each of the student's layers as well: a short student learns much faster from those.

    Args:
        student: What to train.
        labels: The original's logits.
        remapped: The labels' queries and passages in the student's ids.
        schedule: How long and how fast.
        guide: A model of the same vocabulary and layout that is close to the original.
        guide_layers: Which of the guide's layers each of the student's layers is to match.
    """
    student.train(True)
    optimizer = torch.optim.AdamW(
        student.parameters(), lr=schedule.learning_rate, weight_decay=0.0, betas=(0.9, 0.99), fused=True
    )
    seen, recent = 0, 0.0
    with tqdm(total=schedule.num_pairs, unit="pair", mininterval=10) as bar:
        for chosen in _batches(labels, schedule):
            progress = seen / schedule.num_pairs
            warm, cold = min(progress * 20, 1.0), 0.5 + 0.5 * math.cos(math.pi * progress)
            for group in optimizer.param_groups:
                group["lr"] = schedule.learning_rate * warm * cold
            ids, mask = _pad([_sequence(remapped[0][i], remapped[1][i]) for i in chosen])
            wanted = torch.from_numpy(labels.logits[chosen])
            with torch.autocast("cpu", torch.bfloat16):
                output = student(input_ids=ids, attention_mask=mask, output_hidden_states=guide is not None)
                loss = F.mse_loss(output.logits[:, 0].float(), wanted)
                error = loss.item()
                if guide is not None:
                    loss = 0.05 * loss + _hidden_loss(output, guide, guide_layers, ids, mask)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
            optimizer.step()
            seen += len(chosen)
            recent = error if not recent else 0.98 * recent + 0.02 * error
            bar.update(len(chosen))
            bar.set_postfix(mse=f"{recent:.3f}", loss=f"{loss.item():.3f}", refresh=False)
    student.train(False)


def _hidden_loss(
    output: object,
    guide: XLMRobertaForSequenceClassification,
    guide_layers: Sequence[int],
    ids: Tensor,
    mask: Tensor,
) -> Tensor:
    with torch.no_grad():
        guided = guide.roberta(input_ids=ids, attention_mask=mask, output_hidden_states=True)
    own: tuple[Tensor, ...] = output.hidden_states  # type: ignore[attr-defined]
    tokens = mask.bool()
    total = torch.zeros(())
    for index, layer in enumerate(guide_layers, start=1):
        target = guided.hidden_states[layer + 1][tokens].float()
        error = F.mse_loss(own[index][tokens].float(), target)
        total = total + error / target.pow(2).mean()
    return total


def _batches(labels: Labels, schedule: Schedule) -> Iterator[list[int]]:
    """Give batches of pairs of like lengths, in random order, until enough were given."""
    rng = random.Random(schedule.seed)
    lengths = [len(q) + len(p) + 4 for q, p in zip(labels.queries, labels.passages, strict=True)]
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
            yield batch


def _sequence(query: Ids, passage: Ids) -> Ids:
    passage = passage[: MAX_LENGTH - 4 - len(query)]
    return np.concatenate([[BOS], query, [EOS, EOS], passage, [EOS]])


def _pad(sequences: Sequence[Ids]) -> tuple[Tensor, Tensor]:
    longest = max(map(len, sequences))
    ids = np.full((len(sequences), longest), PAD, np.int64)
    for row, sequence in zip(ids, sequences, strict=True):
        row[: len(sequence)] = sequence
    return torch.from_numpy(ids), torch.from_numpy((ids != PAD).astype(np.int64))
