"""The tensors that the sampling kernels work on."""

import dataclasses

import torch

from kernels.checks import check_dtype, check_last_axis_dense, check_same_device, check_shape

RUN = 64
"""Logits that share one summary. A power of two."""
CANDIDATES = 1024
"""Room for likely tokens of a row, which one program holds in registers. A power of two."""
ROOM = 4096
"""Tokens of a row that are gathered at most. A power of two, at least as many as CANDIDATES."""
SPLITS = 1024
"""Buckets that a row is cut into, at most half of them. A power of two."""
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
    samples: torch.Tensor
    """`[row, run]` float32: the first logit of each run."""
    changed: torch.Tensor
    """`[row, vocabulary]` float32: changed logits; no columns where none are changed."""
    found: torch.Tensor
    """`[row]` int32: candidates gathered."""
    equal_found: torch.Tensor
    """`[row]` int32: equal tokens gathered."""
    first: torch.Tensor
    """`[row]` int32: number of the first of them among its equals."""
    values: torch.Tensor
    """`[row, ROOM]` float32: their logits."""
    tokens: torch.Tensor
    """`[row, ROOM]` int32: which they are."""
    members: torch.Tensor
    """`[row, ROOM]` int32: their buckets."""
    equals: torch.Tensor
    """`[row, ROOM]` int32: tokens that equal a splitter."""
    equal_members: torch.Tensor
    """`[row, ROOM]` int32: their buckets."""
    splitters: torch.Tensor
    """`[row, split]` float32: sorted samples, the rest infinite."""
    counts: torch.Tensor
    """`[row, bucket]` int32: tokens in it."""
    bucket_masses: torch.Tensor
    """`[row, bucket]` int64: their mass."""
    moments: torch.Tensor
    """`[row, bucket]` int64: sum of mass times how far a scaled logit is below the largest."""
    flags: torch.Tensor
    """`[row, bucket]` int32: which of them are gathered."""

    @property
    def splits(self) -> int:
        """Number of splitters."""
        return self.splitters.shape[1]

    @classmethod
    def allocate(cls, row_count: int, vocabulary: int, device: torch.device, *, changes: bool = False) -> "Workspace":
        """Returns a workspace for up to `row_count` rows of `vocabulary` logits, which may be changed or not."""
        run_count = -(-vocabulary // RUN)
        # One more than there are samples, so that the last one is infinite.
        splits = min(SPLITS, 2 ** run_count.bit_length())
        runs = torch.empty(5, row_count, run_count, dtype=torch.float32, device=device)
        changed = torch.empty(row_count, vocabulary if changes else 0, dtype=torch.float32, device=device)
        gathered = torch.empty(5, row_count, ROOM, dtype=torch.int32, device=device)
        words = torch.empty(2, row_count, 2 * splits, dtype=torch.int32, device=device)
        sums = torch.empty(2, row_count, 2 * splits, dtype=torch.int64, device=device)
        found = torch.empty(3, row_count, dtype=torch.int32, device=device)
        return cls(
            heads=runs[0],
            masses=runs[1],
            plain_heads=runs[2],
            plain_masses=runs[3],
            samples=runs[4],
            changed=changed,
            found=found[0],
            equal_found=found[1],
            first=found[2],
            values=gathered[0].view(torch.float32),
            tokens=gathered[1],
            members=gathered[2],
            equals=gathered[3],
            equal_members=gathered[4],
            splitters=torch.empty(row_count, splits, dtype=torch.float32, device=device),
            counts=words[0],
            bucket_masses=sums[0],
            moments=sums[1],
            flags=words[1],
        )
