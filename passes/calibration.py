"""Token sequences held in memory, as the data Olive's passes read."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from olive.data.component.dataset import BaseDataset
from olive.data.config import DataComponentConfig, DataConfig
from olive.data.registry import Registry


@Registry.register_dataset("token_sequences")
def token_sequences(
    sequences: Sequence[Sequence[int]], labels: Sequence[Sequence[int]] | None = None
) -> BaseDataset:
    """Make the dataset: item i is ({"input_ids", "attention_mask"}, labels), int64 of shape (T_i,).

    Without `labels` every token is its own label, as in language modelling.
    """
    items = []
    for ids, label in zip(sequences, labels or sequences, strict=True):
        tokens = torch.tensor(ids)
        inputs = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        items.append((inputs, torch.tensor(label)))
    return BaseDataset(items)


def data_config(
    sequences: Sequence[Sequence[int]],
    labels: Sequence[Sequence[int]] | None = None,
    batch_size: int = 1,
) -> DataConfig:
    """Describe token sequences to a pass: Olive's `data_config` or `train_data_config`.

    Args:
        sequences: token ids, one list a sequence.
        labels: as `sequences`, with -100 where no loss is taken.
        batch_size: sequences in a batch of the dataloader; more than 1 needs equal lengths.

    Raises:
        ValueError: there are no sequences, or one is empty.
    """
    if not sequences or not all(sequences):
        raise ValueError("no calibration tokens: every sequence must hold at least one token")
    return DataConfig(
        name="token_sequences",
        load_dataset_config=DataComponentConfig(
            type="token_sequences", params={"sequences": sequences, "labels": labels}
        ),
        pre_process_data_config=DataComponentConfig(type="skip_pre_process"),
        post_process_data_config=DataComponentConfig(type="skip_post_process"),
        dataloader_config=DataComponentConfig(params={"batch_size": batch_size}),
    )


def pack(documents: Sequence[Sequence[int]], samples: int, length: int) -> list[list[int]]:
    """Join the documents and cut out `samples` sequences of `length` tokens, evenly spaced.

    Raises:
        ValueError: the documents hold fewer than `samples * length` tokens.
    """
    tokens = [token for document in documents for token in document]
    available = len(tokens) // length
    if available < samples:
        raise ValueError(
            f"{len(tokens)} tokens are too few for {samples} sequences of {length}; "
            f"they hold {available}"
        )
    starts = [i * available // samples * length for i in range(samples)]
    return [tokens[start : start + length] for start in starts]
