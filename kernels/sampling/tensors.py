"""The tensors that the sampling kernels work on."""

import dataclasses

import torch

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape

RUN = 64
"""Logits that share one summary. A power of two."""
CANDIDATES = 1024
"""Room for likely tokens of a row, which one program holds in registers. A power of two."""
REPORTED = 20
"""Most likely tokens that are reported at most."""
REPORT_WORDS = 2 + 2 * REPORTED
"""Words of a report: the token's rank, its log-probability, the most likely tokens, theirs; floats as their bits."""
WITHHELD = -(2**31)
"""Bit of an entry's token: it is impossible at positions below the row's `withheld_until`."""


@dataclasses.dataclass(frozen=True, slots=True)
class Choice:
    """How to choose, a row each; all on the device. The order is temperature, top_k, top_p, min_p, typical_p."""

    temperature: torch.Tensor
    """`[row]` float32; 0 takes the most likely token, and then the rest has no effect."""
    top_k: torch.Tensor
    """`[row]` int32: keep this many most likely tokens; 0 keeps all."""
    top_p: torch.Tensor
    """`[row]` float32: keep the most likely tokens whose probabilities reach this sum; 1 keeps all."""
    min_p: torch.Tensor
    """`[row]` float32: drop tokens less likely than this times the most likely one; 0 drops none."""
    seed_low: torch.Tensor
    """`[row]` int32: low word of the key of the draws."""
    seed_high: torch.Tensor
    """`[row]` int32: high word."""
    typical_p: torch.Tensor
    """`[row]` float32: keep the tokens whose surprise is nearest to the expected one and whose probabilities reach this
    share of the rest; 1 keeps all."""

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """All of them by name."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


@dataclasses.dataclass(frozen=True, slots=True)
class Changes:
    """State by which logits are changed, and whose is whose; all on the device."""

    seen: torch.Tensor
    """`[row, vocabulary]` int16 or int32: twice how often the token was produced, plus one if the prompt has it."""
    entry_tokens: torch.Tensor
    """`[row, entry]` int32, distinct and ascending in a row without the bit WITHHELD."""
    entry_bias: torch.Tensor
    """`[row, entry]` float32: added to the token's logit."""
    entry_counts: torch.Tensor
    """`[row]` int32: entries in use; what is behind them is never read."""
    rows: torch.Tensor
    """`[place]` int32: the row of the above at each place; -1 for padding, which has none of it."""
    mask_places: torch.Tensor
    """`[place]` int32: which mask restricts the place; -1 for none."""
    masks: torch.Tensor
    """`[mask, word]` int32: a bit for each token, the lowest first; 0 makes it impossible."""

    def check(self, place_count: int, vocabulary: int) -> None:
        """Checks shapes, types, strides and devices.

        Raises:
            ValueError: one does not fit.
        """
        check_shape("changes.seen", self.seen, (None, vocabulary))
        check_dtype("changes.seen", self.seen, (torch.int16, torch.int32))
        row_count = self.seen.shape[0]
        check_shape("changes.entry_tokens", self.entry_tokens, (row_count, None))
        check_shape("changes.entry_bias", self.entry_bias, self.entry_tokens.shape)
        check_dtype("changes.entry_bias", self.entry_bias, (torch.float32,))
        if self.entry_bias.stride() != self.entry_tokens.stride():
            message = f"changes.entry_bias: strides of entry_tokens expected, found {self.entry_bias.stride()}"
            raise ValueError(message)
        check_shape("changes.entry_counts", self.entry_counts, (row_count,))
        check_shape("changes.rows", self.rows, (place_count,))
        check_shape("changes.mask_places", self.mask_places, (place_count,))
        check_shape("changes.masks", self.masks, (None, None))
        if self.masks.shape[0] and self.masks.shape[1] * 32 < vocabulary:
            message = (
                f"changes.masks: a bit for each of {vocabulary} tokens expected, found {self.masks.shape[1]} words"
            )
            raise ValueError(message)
        for name in ("entry_tokens", "entry_counts", "rows", "mask_places", "masks"):
            check_dtype(f"changes.{name}", getattr(self, name), (torch.int32,))
        for field in dataclasses.fields(self):
            check_last_axis_dense(f"changes.{field.name}", getattr(self, field.name))
        check_same_device(**{field.name: getattr(self, field.name) for field in dataclasses.fields(self)})


@dataclasses.dataclass(frozen=True, slots=True)
class Penalties:
    """What is taken off tokens that a row has seen, a place each; all on the device."""

    repetition: torch.Tensor
    """`[place]` float32: logits of tokens seen are divided by it if positive, else multiplied; 1: none."""
    frequency: torch.Tensor
    """`[place]` float32: taken off for each time that the token was produced; 0: none."""
    presence: torch.Tensor
    """`[place]` float32: taken off if it was; 0: none."""
    withheld_until: torch.Tensor
    """`[place]` int32: position from which withheld tokens are possible."""

    def check(self, place_count: int) -> None:
        """Checks shapes, types, strides and devices.

        Raises:
            ValueError: one does not fit.
        """
        for field in dataclasses.fields(self):
            tensor = getattr(self, field.name)
            check_shape(f"penalties.{field.name}", tensor, (place_count,))
            wanted = torch.int32 if field.name == "withheld_until" else torch.float32
            check_dtype(f"penalties.{field.name}", tensor, (wanted,))
            check_last_axis_dense(f"penalties.{field.name}", tensor)


@dataclasses.dataclass(frozen=True, slots=True)
class Workspace:
    """What the kernels leave for each other; never read by anyone else."""

    heads: torch.Tensor
    """`[row, run]` float32: the largest logit of each run."""
    masses: torch.Tensor
    """`[row, run]` float32: sum of exp((logit - head) / temperature)."""
    plain_heads: torch.Tensor
    """Heads of the logits that the model gave, for log-probabilities."""
    plain_masses: torch.Tensor
    """The same of masses, without temperature."""
    values: torch.Tensor
    """`[row, candidate]` float32."""
    tokens: torch.Tensor
    """`[row, candidate]` int32."""
    changed: torch.Tensor
    """`[row, vocabulary]` float32: changed logits; no columns where none are changed."""

    @classmethod
    def allocate(cls, row_count: int, vocabulary: int, device: torch.device, *, changes: bool = False) -> "Workspace":
        """Returns a workspace for up to `row_count` rows of `vocabulary` logits, which may be changed or not."""
        runs = torch.empty(4, row_count, -(-vocabulary // RUN), dtype=torch.float32, device=device)
        values = torch.empty(row_count, CANDIDATES, dtype=torch.float32, device=device)
        changed = torch.empty(row_count, vocabulary if changes else 0, dtype=torch.float32, device=device)
        return cls(runs[0], runs[1], runs[2], runs[3], values, torch.empty_like(values, dtype=torch.int32), changed)
