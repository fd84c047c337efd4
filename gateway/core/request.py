"""A request: what a client asked, checked, and what became of it."""

from __future__ import annotations

from array import array
import dataclasses

from gateway.core.beam import BeamSettings
from gateway.core.sequence import Sequence, SequenceState


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingSettings:
    """How to choose tokens; ranges as in `quire.gateway.v1.Sampling`."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    typical_p: float = 1.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token, what is added to its logit), by token."""


@dataclasses.dataclass(frozen=True, slots=True)
class RequestSettings:
    """What a client asked, with every default filled in."""

    request_id: str
    model: str
    prompt: array[int]
    max_tokens: int
    sampling: SamplingSettings
    sample_count: int = 1
    """Samples that are generated."""
    answer_count: int = 0
    """Samples that are answered, the most likely ones; 0 for all."""
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop_str: bool = False
    """Whether what ended a sample is part of its text."""
    eos_token_ids: frozenset[int] = frozenset()
    """The model's end-of-sequence tokens; none if the request ignores them."""
    tenant: str = ""
    cache_salt: str = ""
    skip_cache_read: bool = False
    skip_cache_write: bool = False
    max_queue_time: float = 0.0
    """Seconds."""
    time_limit: float = 0.0
    """Seconds from arrival after which it ends with what it has; 0 for none."""
    priority: int = 0
    """Lower goes first; see `gateway.core.precedence`."""
    logprobs: int | None = None
    """Most likely tokens to answer the log-probabilities of, beside each token's own; None for nothing."""
    prompt_logprobs: int | None = None
    """The same for the prompt."""
    echo: bool = False
    grammar: str = ""
    """What the completion must look like; see `quire.execsvc.v1.SamplingParams`."""
    beam: BeamSettings | None = None
    """Of a beam search; None for none."""
    session_id: str = ""
    """Session whose turn it is; its blocks are retained."""
    retention_ttl: int = 0
    """Seconds for which the session's blocks are retained after a turn."""

    @property
    def selects(self) -> bool:
        """Whether what is answered is known at the end only: the best of more samples, or of a search."""
        return 0 < self.answer_count < self.sample_count or self.beam is not None

    @property
    def logprob_count(self) -> int | None:
        """Most likely tokens that the executor has to report beside each token's own; None for nothing."""
        if self.beam is not None:
            return self.beam.candidate_count(len(self.eos_token_ids))
        return 0 if self.logprobs is None and self.selects else self.logprobs


class Request:
    """A live request and its samples."""

    __slots__ = (
        "admitted_at",
        "aged_priority",
        "answered_token_count",
        "arrival_no",
        "arrived_at",
        "cached_token_count",
        "cancelled",
        "first_token_at",
        "known_prompt_logprobs",
        "max_model_len",
        "peak_block_count",
        "samples",
        "settings",
    )

    def __init__(self, settings: RequestSettings, max_model_len: int, arrived_at: float, ageing: float = 0.0) -> None:
        """Makes the samples, all waiting.

        Args:
            settings: the request.
            max_model_len: longest sequence of the model, tokens.
            arrived_at: monotonic seconds.
            ageing: seconds of age that are worth one step of priority; 0 for none.
        """
        self.settings = settings
        self.max_model_len = max_model_len
        self.arrived_at = arrived_at
        # Who is a step less urgent but came so many seconds earlier is equal, now and later.
        self.aged_priority = settings.priority + (arrived_at / ageing if ageing else 0.0)
        self.arrival_no = 0
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None
        self.cached_token_count = 0
        self.peak_block_count = 0
        self.cancelled = False
        self.known_prompt_logprobs = 0
        """Tokens of the prompt whose log-probabilities are known, from the second on."""
        limit = min(len(settings.prompt) + settings.max_tokens, max_model_len)
        self.samples = [Sequence(self, index, settings.prompt, limit) for index in range(settings.sample_count)]
        if len(self.samples) > 1:
            # The others begin where the prompt ends, on the same blocks.
            self.samples[0].hold()
        self.answered_token_count = 0
        """Tokens of what a search has found."""
        if settings.beam is not None:
            self.samples[0].stepwise = True
            self.samples[0].hold()

    @property
    def wants_prompt_logprobs(self) -> bool:
        """Whether log-probabilities of the prompt are still to be computed."""
        wanted = self.settings.prompt_logprobs is not None
        return wanted and self.known_prompt_logprobs < len(self.settings.prompt) - 1

    @property
    def completion_token_count(self) -> int:
        """Tokens generated by all samples; of a search those that are answered."""
        if self.settings.beam is not None:
            return self.answered_token_count
        return sum(sample.completion_length for sample in self.samples)

    @property
    def preemption_count(self) -> int:
        """Preemptions of all samples."""
        return sum(sample.preemption_count for sample in self.samples)

    @property
    def shared_block_count(self) -> int:
        """Blocks that the samples had from others when they began."""
        return sum(sample.shared_block_count for sample in self.samples)

    @property
    def stored_token_count(self) -> int:
        """Tokens of the blocks that the samples filled and left in the prefix cache."""
        return 0 if self.settings.skip_cache_write else sum(sample.stored_token_count for sample in self.samples)

    @property
    def recomputed_token_count(self) -> int:
        """Tokens that the samples computed again."""
        return sum(sample.recomputed_token_count for sample in self.samples)

    @property
    def swap_count(self) -> int:
        """Preemptions of all samples whose content went to host memory."""
        return sum(sample.swap_count for sample in self.samples)

    @property
    def swapped_block_count(self) -> int:
        """Blocks of all samples that went to host memory and back."""
        return sum(sample.swapped_block_count for sample in self.samples)

    def block_seconds(self, now: float) -> float:
        """Returns blocks held times seconds, of all samples, up to `now`."""
        return sum(
            sample.block_seconds + sample.held_block_count * (now - sample.counted_at) for sample in self.samples
        )

    @property
    def ended(self) -> bool:
        """Whether every sample has its last token, though blocks may still be on their way back."""
        return all(sample.ended for sample in self.samples)

    @property
    def released(self) -> bool:
        """Whether no sample holds anything any more."""
        return all(sample.state is SequenceState.FINISHED for sample in self.samples)

    def note_blocks(self) -> None:
        """Keeps the most blocks that the tables named at one time."""
        count = sum(sample.held_block_count for sample in self.samples)
        self.peak_block_count = max(self.peak_block_count, count)
