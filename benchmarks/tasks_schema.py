"""The task `schema`: prompts of other tasks, to be answered by JSON of ten schemas of kinds that programs ask for."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from specbranch.text.prompts import Prompt

Schema = dict[str, Any]
TEXT: Schema = {"type": "string"}
PROMPTS = 4  # of each schema


def record(required: Schema, optional: Schema | None = None) -> Schema:
    """An object with these keys and no others."""
    properties = {**required, **(optional or {})}
    return {
        "type": "object",
        "properties": properties,
        "required": list(required),
        "additionalProperties": False,
    }


def array(items: Schema, least: int, most: int) -> Schema:
    return {"type": "array", "items": items, "minItems": least, "maxItems": most}


def one_of(*values: str) -> Schema:
    return {"enum": list(values)}


@dataclass(frozen=True)
class Kind:
    """A schema. source: the task whose prompts it is asked about. about: what the JSON is to be."""

    name: str
    source: str
    about: str
    schema: Schema


FLAT = record(
    {
        "question": TEXT,
        "topic": TEXT,
        "answer": TEXT,
        "answer_type": TEXT,
        "is_about_a_person": {"type": "boolean"},
    }
)
NESTED = record(
    {
        "unknown": TEXT,
        "steps": array(
            record(
                {
                    "description": TEXT,
                    "calculation": record({"expression": TEXT, "result": {"type": "number"}}),
                    "units": array(TEXT, 1, 2),
                }
            ),
            2,
            5,
        ),
        "answer": {"type": "number"},
    }
)
ENUMS = record(
    {
        "category": one_of("writing", "roleplay", "reasoning", "math", "coding", "extraction", "science", "humanities"),
        "difficulty": one_of("very easy", "easy", "medium", "hard", "very hard"),
        "needs": array(one_of("facts", "creativity", "arithmetic", "code", "common sense", "long context"), 1, 3),
        "tone": one_of("formal", "neutral", "friendly", "humorous"),
        "language": one_of("English", "German", "French", "Spanish", "Chinese", "other"),
        "is_safe": {"type": "boolean"},
    }
)
OPTIONAL = record(
    {"headline": TEXT, "summary": TEXT},
    {
        "people": array(record({"name": TEXT}, {"role": TEXT, "age": {"type": "integer"}}), 0, 4),
        "places": array(TEXT, 0, 4),
        "organisations": array(TEXT, 0, 4),
        "quotation": record({"speaker": TEXT, "words": TEXT}),
        "published": TEXT,
    },
)
BOUNDS = record(
    {
        "answer": {"type": "integer", "minimum": 0, "maximum": 1_000_000},
        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
        "steps": {"type": "integer", "minimum": 1, "maximum": 20},
        "ratings": record(
            {
                name: {"type": "integer", "minimum": 1, "maximum": 5}
                for name in ("clarity", "difficulty", "realism", "length", "ambiguity")
            }
        ),
    }
)
PATTERNS = record(
    {
        "function": {"type": "string", "pattern": "^[a-z_][a-z0-9_]{2,40}$"},
        "ticket": {"type": "string", "pattern": "^[A-Z]{2,4}-[0-9]{3}$"},
        "version": {"type": "string", "pattern": "^[0-9]\\.[0-9]{1,2}\\.[0-9]{1,2}$"},
        "parameters": array(
            record(
                {
                    "name": {"type": "string", "pattern": "^[a-z_][a-z0-9_]{0,30}$"},
                    "type": {"type": "string", "pattern": "^(int|float|str|bool|List\\[[a-z]+\\]|Any)$"},
                }
            ),
            1,
            4,
        ),
        "returns": {"type": "string", "pattern": "^(int|float|str|bool|None|List\\[[a-z]+\\]|Any)$"},
        "reviewed": {"type": "string", "pattern": "^20[0-9]{2}-[01][0-9]-[0-3][0-9]$"},
    }
)
TREE: Schema = {
    "$defs": {
        "section": record(
            {"title": TEXT, "words": {"type": "integer", "minimum": 1, "maximum": 999}},
            {"sections": array({"$ref": "#/$defs/section"}, 1, 4)},
        )
    },
    **record({"title": TEXT, "sections": array({"$ref": "#/$defs/section"}, 2, 4)}),
}
TOOL_CALL = record(
    {
        "thought": TEXT,
        "tool": one_of("search_web", "search_documents", "read_page", "calculator", "translate", "ask_user"),
        "arguments": record(
            {"query": TEXT, "max_results": {"type": "integer", "minimum": 1, "maximum": 50}},
            {"language": one_of("en", "de", "fr"), "newer_than": TEXT},
        ),
        "stop_after": {"type": "boolean"},
    }
)
UNION = record(
    {
        "source": TEXT,
        "result": {
            "anyOf": [
                record(
                    {
                        "kind": {"const": "translation"},
                        "text": TEXT,
                        "confidence": {"type": "number", "minimum": 0, "maximum": 1},
                    }
                ),
                record({"kind": {"const": "not_translatable"}, "reason": TEXT}),
                record({"kind": {"const": "already_english"}, "corrected": TEXT}),
            ]
        },
    }
)
AREAS = ("editor", "window", "search", "terminal", "debug", "files", "git", "network", "privacy", "keyboard")
SETTINGS = ("enabled", "color", "font_size", "theme", "timeout", "limit", "mode", "path", "level", "shortcut")
VALUES: tuple[Schema, ...] = (
    {"type": "boolean"},
    one_of("red", "green", "blue", "black", "white"),
    {"type": "integer", "minimum": 6, "maximum": 72},
    one_of("light", "dark", "system"),
    {"type": "integer", "minimum": 0, "maximum": 3600},
    {"type": "integer", "minimum": 1, "maximum": 1000},
    one_of("off", "basic", "full"),
    TEXT,
    one_of("debug", "info", "warning", "error"),
    TEXT,
)
LARGE = record(
    {"profile": TEXT, "editor_theme": one_of("light", "dark", "system"), "editor_font_size": VALUES[2]},
    {
        f"{area}_{setting}{suffix}": value
        for suffix in ("", "_default")
        for area in AREAS
        for setting, value in zip(SETTINGS, VALUES, strict=True)
        if f"{area}_{setting}{suffix}" not in ("editor_theme", "editor_font_size")
    },
)

KINDS = (
    Kind("flat", "qa", "a record of this question and its answer", FLAT),
    Kind("nested", "gsm8k", "the solution of this problem, step by step", NESTED),
    Kind("enums", "mt_bench", "a classification of this request", ENUMS),
    Kind("optional", "summarization", "a record of this article", OPTIONAL),
    Kind("bounds", "math_reasoning", "the answer to this problem with an assessment of it", BOUNDS),
    Kind(
        "patterns",
        "humaneval",
        "the signature of this Python function, with a made-up ticket, version and date",
        PATTERNS,
    ),
    Kind("tree", "mt_bench", "an outline of the text that this request asks for, with sections in sections", TREE),
    Kind("tool_call", "qa", "a call of the tool that helps to answer this question best", TOOL_CALL),
    Kind("union", "translation", "the result of this translation", UNION),
    Kind("large", "gsm8k", "made-up settings of an editor for the main person in this story: a dozen of them", LARGE),
)


def answers(tasks: Mapping[str, Sequence[Prompt]]) -> Iterator[Prompt]:
    """The first prompts of each kind's task, each with its schema; kinds of one task get others."""
    used: dict[str, int] = {}
    for kind in KINDS:
        first = used.get(kind.source, 0)
        used[kind.source] = first + PROMPTS
        for number, prompt in enumerate(tasks[kind.source][first : first + PROMPTS]):
            yield Prompt(
                id=f"schema/{kind.name}/{number}",
                text=question(kind, str(prompt.text)),
                chat=True,
                task="schema",
                constraint=("json_schema", kind.schema),
            )


def question(kind: Kind, text: str) -> str:
    return (
        f"{text.strip()}\n\nAnswer with {kind.about}, as one JSON object without spaces or line breaks between its "
        f"parts, that follows this JSON schema:\n{json.dumps(brief(kind.schema), separators=(',', ':'))}"
    )


def brief(schema: Schema, most: int = 40) -> Schema:
    """The schema as the prompt has it: of an object with many keys the first ones."""
    properties = schema.get("properties", {})
    if len(properties) <= most:
        return schema
    return {**schema, "properties": dict(list(properties.items())[:most])}
