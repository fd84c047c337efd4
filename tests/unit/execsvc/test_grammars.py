"""What a grammar allows, and that nothing else is ever sampled."""

from __future__ import annotations

import dataclasses
import json
import random
from typing import Any

import pytest
from tokenizers import Tokenizer

from execsvc.grammars import Grammars
from gateway.constraint import check_constraint
from protos.execsvc.v1 import execsvc_pb2 as pb
from protos.gateway.v1 import gateway_pb2
from quire import columns
from quire.errors import InvalidRequestError
from tests.simulation.oracle_executor import tokenizer_files
from tests.unit.execsvc import tiny
from tests.unit.execsvc.tiny import Driver, start

EOS_TOKEN = 256


def _with_end_token(tokenizer_json: str) -> str:
    """Returns a tokenizer with a token behind its 256 bytes that is in no text."""
    tokenizer = Tokenizer.from_str(tokenizer_json)
    tokenizer.add_special_tokens(["<end>"])
    assert tokenizer.token_to_id("<end>") == EOS_TOKEN
    return tokenizer.to_str()


JSON = _with_end_token(tokenizer_files().tokenizer_json.decode())
PROMPT = [5, 6, 7]
SMALL = dataclasses.replace(tiny.CONFIG, num_layers=1)
SCHEMAS: list[dict[str, Any]] = [
    {"type": "object", "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer"}}},
    {
        "type": "object",
        "properties": {"tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 1, "maxItems": 4}},
        "required": ["tags"],
        "additionalProperties": False,
    },
    {"type": "array", "items": {"type": "number", "minimum": -5, "maximum": 5}, "minItems": 2, "maxItems": 3},
    {
        "type": "object",
        "properties": {
            "kind": {"const": "point"},
            "at": {
                "type": "object",
                "properties": {"x": {"type": "boolean"}, "y": {"type": ["null", "boolean"]}},
                "required": ["x", "y"],
                "additionalProperties": False,
            },
        },
        "required": ["kind", "at"],
        "additionalProperties": False,
    },
    {"anyOf": [{"type": "string", "pattern": "^[a-f0-9]{4,6}$"}, {"type": "integer", "minimum": 10, "maximum": 99}]},
]
SCHEMAS[0] |= {"required": ["name", "age"], "additionalProperties": False}
SCHEMAS[0]["properties"]["age"] |= {"minimum": 0, "maximum": 150}
TEXT = tokenizer_files()


async def grammar_of(**constraint: Any) -> str:
    """Returns the grammar that a gateway makes of a constraint."""
    return await check_constraint(gateway_pb2.GenerationSpec(constraint=gateway_pb2.Constraint(**constraint)))


def text_of(tokens: list[int]) -> str:
    """Returns the text of tokens without the one that ends it."""
    from gateway.tokenize import ModelTokenizer

    assert tokens[-1] == EOS_TOKEN
    return ModelTokenizer(TEXT, add_bos_token=False).token_bytes.text(tokens[:-1])


def generate(driver: Driver, grammars: dict[int, str], *, interrupt: random.Random) -> dict[int, list[int]]:
    """Generates until every table has ended; now and then a sequence is dropped and begins again with what it has."""
    driver.engine.grammars = Grammars(JSON, SMALL.vocab_size, [EOS_TOKEN])
    said: dict[int, list[int]] = {table: [] for table in grammars}
    waiting, running = list(grammars), {}
    rows = [list(range(1 + 7 * row, 8 + 7 * row)) for row in range(8)]
    free = list(range(8))
    while waiting or running:
        added, scheduled, removed = [], {}, []
        for table in list(running):
            if interrupt.random() < 0.02:
                removed.append(table)
                free.append(running.pop(table))
                waiting.append(table)
        while free and waiting:
            table = waiting.pop(0)
            running[table] = free.pop()
            known = PROMPT + said[table]
            first = start(table, known, rows[running[table]], temperature=1.5, seed=table, prompt_token_count=3)
            first.sampling.grammar = grammars[table]
            added.append(first)
            scheduled[table] = len(known)
        scheduled |= {table: 1 for table in running if table not in scheduled}
        result = driver.run(scheduled, added=added, removed=removed)
        assert not result.errors, result.errors
        tables, tokens = (columns.unpack_list(column, "") for column in (result.sampled_tables, result.sampled_tokens))
        for table, token in zip(tables, tokens, strict=True):
            said[table].append(token)
            assert len(said[table]) < 105
            if token == EOS_TOKEN:
                # One more step is in flight behind the last token; what it samples is nobody's.
                assert not driver.run({table: 1}).errors
                driver.run(removed=[table])
                free.append(running.pop(table))
    return said


async def test_a_hundred_documents_of_five_schemas_are_valid() -> None:
    """Whoever asked for JSON parses it without looking: no document may be broken, interrupted or not."""
    import jsonschema  # kernel tests use this module's grammars where it is not installed

    texts = [await grammar_of(json_schema=json.dumps(schema)) for schema in SCHEMAS]
    driver = Driver(tiny.engine_of(SMALL, blocks=64, max_num_seqs=8))
    said = generate(driver, {table: texts[table % 5] for table in range(100)}, interrupt=random.Random(1))
    documents = [text_of(tokens) for tokens in said.values()]
    for table, document in enumerate(documents):
        jsonschema.validate(json.loads(document), SCHEMAS[table % 5])
    assert len(set(documents)) > 60, "they were meant to differ"


@pytest.mark.parametrize("device", ["host", "device"])
async def test_a_choice_a_regular_expression_and_a_grammar_are_kept(device: str) -> None:
    """Whatever says what may come, nothing else does."""
    make = tiny.engine_of if device == "host" else tiny.gpu_engine_of
    driver = Driver(make(SMALL, blocks=64, max_num_seqs=8))
    grammars = {
        1: await grammar_of(choice=gateway_pb2.Choice(texts=["yes", 'a "no"\n', "né"])),
        2: await grammar_of(regex=r"[0-9]{3}-[a-z]{2}"),
        3: await grammar_of(grammar='start: ("ab" | "ba")~2..4 "!"'),
    }
    said = {table: text_of(tokens) for table, tokens in generate(driver, grammars, interrupt=random.Random(2)).items()}
    assert said[1] in {"yes", 'a "no"\n', "né"}
    assert len(said[2]) == 6 and said[2][:3].isdigit() and said[2][3] == "-"
    assert said[3].endswith("!") and set(said[3][:-1]) == {"a", "b"}


def test_a_sequence_that_is_not_of_its_grammar_fails_alone() -> None:
    """A gateway's mistake must not take the step of the others with it."""
    driver = Driver(tiny.engine_of(SMALL, blocks=64))
    bystander, bad, wrong = (start(table, PROMPT, [table], prompt_token_count=2) for table in (1, 2, 3))
    driver.engine.grammars = Grammars(JSON, SMALL.vocab_size, [EOS_TOKEN])
    bad.sampling.grammar, wrong.sampling.grammar = "start: nothing", 'start: "x"'
    result = driver.run({1: 3}, added=[bystander, bad, wrong])
    assert {error.table: error.reason for error in result.errors} == {2: "INVALID_GRAMMAR", 3: "INVALID_REQUEST"}
    assert columns.unpack_list(result.sampled_tables, "") == [1]


def test_tokens_beyond_the_tokenizer_are_never_allowed() -> None:
    """Models have more rows than their tokenizers have tokens; those have no text."""
    matcher = Grammars(JSON, 320, [EOS_TOKEN]).matcher("start: /.+/", [])
    allowed = matcher.allowed()
    assert allowed is not None and allowed.shape == (320,) and allowed.any() and not allowed[257:].any()


@pytest.mark.parametrize(
    ("fields", "field", "words"),
    [
        ({"json_schema": "{"}, "constraint.json_schema", "Expecting property name"),
        ({"json_schema": "[]"}, "constraint.json_schema", "a JSON object"),
        ({"json_schema": '{"type": "nonsense"}'}, "constraint.json_schema", "nonsense"),
        ({"regex": "["}, "constraint.regex", "regex parse error"),
        ({"regex": ""}, "constraint.regex", "0 characters"),
        ({"grammar": "start: nothing"}, "constraint.grammar", "nothing"),
        ({"grammar": "x" * 65_537}, "constraint.grammar", "65537 characters"),
        ({"choice": gateway_pb2.Choice()}, "constraint.choice.texts", "0 texts"),
        ({"choice": gateway_pb2.Choice(texts=["a", ""])}, "constraint.choice.texts[1]", "0 characters"),
    ],
)
async def test_what_cannot_be_kept_is_refused_before_it_is_queued(
    fields: dict[str, Any], field: str, words: str
) -> None:
    """The user must learn what is wrong with a schema at once, not from a failed stream."""
    with pytest.raises(InvalidRequestError) as caught:
        await grammar_of(**fields)
    assert caught.value.field == field
    assert words in caught.value.message


@pytest.mark.parametrize("stopping", [{"ignore_eos": True}, {"min_tokens": 3}])
async def test_a_constraint_and_a_put_off_end_exclude_each_other(stopping: dict[str, Any]) -> None:
    """What must end and must not end would hang, or write what is not of the schema."""
    spec = gateway_pb2.GenerationSpec(constraint=gateway_pb2.Constraint(regex="a"), stopping=stopping)
    with pytest.raises(InvalidRequestError, match="constraint"):
        await check_constraint(spec)
    assert pb.SamplingParams().grammar == ""
