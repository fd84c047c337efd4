"""`quire generate` and `quire chat`: text from a running gateway."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import Annotated

from rich.text import Text
import typer

from quire.cli import options, sampling
from quire.cli.output import notices, print_error, print_json, print_text
from quire.client import DEFAULT_TIMEOUT, Client, Stream
from quire.errors import InvalidRequestError, PromptTooLongError, QuireError, SessionNotFoundError
from quire.generation import Delta, Generation, Message, Options

_FORGET_SECONDS = 2.0
_POLL_SECONDS = 0.05


def _given(**values: object) -> Options:
    """Returns the options that have a value."""
    given: Options = {}
    given.update({name: value for name, value in values.items() if value is not None})  # type: ignore[typeddict-item]
    return given


def _prompt(text: str) -> str:
    """Returns the prompt; "-" stands for what stdin has."""
    if text != "-":
        return text
    try:
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        message = f"standard input is not UTF-8: {error}"
        raise InvalidRequestError(message, field="text") from error


def generate(
    *,
    text: Annotated[str, typer.Argument(metavar="TEXT", help='What to continue; "-" reads it from standard input.')],
    n: Annotated[int, typer.Option("--n", "-n", help="Samples of the same prompt, 1 .. 64.")] = 1,
    best_of: sampling.BestOf = None,
    beam_width: sampling.BeamWidth = None,
    length_penalty: sampling.LengthPenalty = None,
    early_stopping: sampling.EarlyStopping = False,
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    min_p: sampling.MinP = None,
    typical_p: sampling.TypicalP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    presence_penalty: sampling.PresencePenalty = None,
    frequency_penalty: sampling.FrequencyPenalty = None,
    logit_bias: sampling.LogitBias = None,
    seed: sampling.Seed = None,
    max_tokens: sampling.MaxTokens = None,
    min_tokens: sampling.MinTokens = None,
    priority: sampling.Priority = None,
    time_limit: sampling.TimeLimit = None,
    stop: sampling.Stop = None,
    include_stop: sampling.IncludeStop = False,
    echo: sampling.Echo = False,
    guided_json: sampling.GuidedJson = None,
    guided_regex: sampling.GuidedRegex = None,
    guided_choice: sampling.GuidedChoice = None,
    guided_grammar: sampling.GuidedGrammar = None,
    logprobs: sampling.Logprobs = None,
    prompt_logprobs: sampling.PromptLogprobs = None,
    model: sampling.ModelName = "",
    timeout: sampling.Timeout = DEFAULT_TIMEOUT,
    address: options.Address = options.GATEWAY_ADDRESS,
    json: options.Json = False,
) -> None:
    """Continue a text; it is printed as it comes.

    For example:

        quire generate "The capital of France is" --max-tokens 32

        quire generate "Once upon a time" --n 3 --temperature 0.8 --seed 7

        quire generate - --json < prompt.txt | jq -r '.completions[0].text'
    """
    wanted = _given(
        n=n,
        best_of=best_of,
        beam_width=beam_width,
        length_penalty=length_penalty,
        early_stopping=early_stopping or None,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=sampling.logit_bias(logit_bias),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        time_limit=time_limit,
        priority=priority,
        stop=stop,
        include_stop_str_in_output=include_stop or None,
        echo=echo or None,
        guided_json=sampling.text_or_file(guided_json, "guided_json"),
        guided_regex=guided_regex,
        guided_choice=guided_choice or None,
        guided_grammar=sampling.text_or_file(guided_grammar, "guided_grammar"),
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        model=model,
    )
    prompt = _prompt(text)
    with Client(address, timeout=timeout) as client, client.stream(prompt, **wanted) as stream:
        if json:
            print_json(stream.result())
        elif n == 1:
            _print_stream(stream)
        else:
            _print_samples(stream)


def _print_stream(stream: Stream) -> Generation:
    """Prints the text of a single sample as it comes, ends the line, and returns the whole."""
    ended_line = True
    for piece in stream.text():
        print_text(piece)
        ended_line = piece.endswith("\n")
    if not ended_line:
        print_text("\n")
    return stream.result()


def _print_samples(stream: Stream) -> None:
    """Prints each of several samples once it is whole."""
    pieces: dict[int, list[str]] = {}
    for event in stream:
        if not isinstance(event, Delta):
            continue
        pieces.setdefault(event.index, []).append(event.text)
        if event.finish_reason is not None:
            text = "".join(pieces[event.index])
            print_text(f"--- {event.index} ({event.finish_reason.value})\n{text}\n")


def chat(
    *,
    system: Annotated[str, typer.Option(help="System prompt: who the model should be.")] = "",
    temperature: sampling.Temperature = None,
    top_p: sampling.TopP = None,
    top_k: sampling.TopK = None,
    min_p: sampling.MinP = None,
    typical_p: sampling.TypicalP = None,
    repetition_penalty: sampling.RepetitionPenalty = None,
    presence_penalty: sampling.PresencePenalty = None,
    frequency_penalty: sampling.FrequencyPenalty = None,
    logit_bias: sampling.LogitBias = None,
    seed: sampling.Seed = None,
    max_tokens: sampling.MaxTokens = None,
    min_tokens: sampling.MinTokens = None,
    priority: sampling.Priority = None,
    time_limit: sampling.TimeLimit = None,
    stop: sampling.Stop = None,
    model: sampling.ModelName = "",
    timeout: sampling.Timeout = DEFAULT_TIMEOUT,
    address: options.Address = options.GATEWAY_ADDRESS,
) -> None:
    """Talk with the model; each line is a turn. The server keeps the conversation, and computes what a turn adds.

    `/clear` forgets the conversation, `/exit` or Ctrl-D ends, Ctrl-C interrupts an answer.

    For example:

        quire chat --temperature 0

        quire chat --system "You answer in one sentence."

        echo "What is a quire?" | quire chat
    """
    wanted = _given(
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        typical_p=typical_p,
        repetition_penalty=repetition_penalty,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        logit_bias=sampling.logit_bias(logit_bias),
        seed=seed,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        time_limit=time_limit,
        priority=priority,
        stop=stop,
        model=model,
    )
    with Client(address, timeout=timeout) as client:
        _Conversation(client, system, wanted).run()


class _Conversation:
    """A conversation at the terminal, or over a pipe."""

    def __init__(self, client: Client, system: str, wanted: Options) -> None:
        """Starts with the system prompt alone."""
        self._client = client
        self._wanted = wanted
        self._start = [Message("system", system)] if system else []
        self._messages = list(self._start)
        self._session_id = ""
        self._at_terminal = sys.stdin.isatty()

    def run(self) -> None:
        """Answers turn after turn until the input ends. Over a pipe the first failure ends it."""
        try:
            self._talk()
        finally:
            self._forget()

    def _forget(self) -> None:
        """Ends the session, if there is one and the server can be reached."""
        session_id, self._session_id = self._session_id, ""
        if session_id:
            with contextlib.suppress(QuireError):
                self._client.delete_session(session_id, timeout=_FORGET_SECONDS)

    def _talk(self) -> None:
        """Answers turn after turn."""
        if self._at_terminal:
            with contextlib.suppress(ImportError):
                import readline  # noqa: F401, PLC0415 - gives input() history and editing
            notices().print(Text("/clear forgets the conversation, /exit or Ctrl-D ends", "dim"))
        while (turn := self._read()) is not None:
            match turn.strip():
                case "":
                    continue
                case "/exit":
                    return
                case "/clear":
                    self._forget()
                    self._messages = list(self._start)
                case command if command.startswith("/"):
                    print_error(f"{command.split()[0]} is not a command", "there are /clear and /exit")
                case said:
                    self._answer(said)

    def _read(self) -> str | None:
        """Returns the next line, None at the end of the input."""
        try:
            return input("you> " if self._at_terminal else "")
        except EOFError:
            if self._at_terminal:
                print_text("\n")
            return None

    def _answer(self, said: str) -> None:
        """Prints the answer to one turn. A turn that failed or was interrupted is forgotten."""
        messages = [*self._messages, Message("user", said)]
        try:
            with self._stream(messages) as stream:
                answer = _print_stream(stream)
        except KeyboardInterrupt:
            if not self._at_terminal:
                raise
            print_text("\n")
            notices().print(Text("interrupted; that turn is forgotten", "dim"))
        except QuireError as error:
            if not self._at_terminal:
                raise
            hint = "/clear starts a new conversation" if isinstance(error, PromptTooLongError) else ""
            print_error(error.message, hint)
        else:
            self._messages = [*messages, Message("assistant", answer.text)]

    def _stream(self, messages: list[Message]) -> Stream:
        """Starts the answer to a conversation, whose last message the server does not know yet."""
        new = messages[-1:]
        if self._session_id:
            try:
                session = self._client.session(self._session_id)
                deadline = time.monotonic() + _FORGET_SECONDS
                while session.busy and time.monotonic() < deadline:
                    # The turn that was interrupted is on its way out.
                    time.sleep(_POLL_SECONDS)
                    session = self._client.session(self._session_id)
                new = messages if session.turn_count == 0 else new
            except SessionNotFoundError:
                # It has expired, or the server was started anew: we know what was said.
                self._session_id = ""
        if not self._session_id:
            self._session_id = self._client.create_session(model=self._wanted.get("model", "")).session_id
            new = messages
        return self._client.append_chat(self._session_id, new, **self._wanted)
