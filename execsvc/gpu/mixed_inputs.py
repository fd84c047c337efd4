"""What a step that is launched piece by piece reads."""

import dataclasses

import torch


@dataclasses.dataclass(frozen=True, slots=True)
class MixedInputs:
    """All int32 on the device."""

    batch_rows: torch.Tensor
    """`[sequence]`: its row."""
    lens: torch.Tensor
    """`[sequence]`: computed tokens after the step."""
    starts: torch.Tensor
    """`[chunk + 1]`: where the queries of each sequence with several of them begin."""
    places: torch.Tensor
    """`[sequence]`: which sample is its; -1 for none."""
    sampled_rows: torch.Tensor
    """`[sample]`: its row of the hidden states."""
    sampled_lens: torch.Tensor
    """`[sample]`: position of the token."""
    sampling_rows: torch.Tensor
    """`[sample]`: row of its sequence."""
    tokens: torch.Tensor
    """`[token]`; -1 for the last one that the device knows."""
    token_rows: torch.Tensor
    """`[token]`: row of its sequence."""
    positions: torch.Tensor
    """`[token]`."""
    slots: torch.Tensor
    """`[token]`: where its keys and values go."""
    prompt_rows: torch.Tensor
    """`[report]`: row of the hidden states that tell of a prompt's next token."""
    prompt_tokens: torch.Tensor
    """`[report]`: that token."""
    prompt_counts: torch.Tensor
    """`[report]`: most likely tokens reported besides."""
