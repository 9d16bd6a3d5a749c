"""Lines of a JSON Lines file that are no preference pairs."""

import gzip
import json
import pickle
from typing import Any

from tests.hostile.case import Case, Scene, Values

GOOD = {"prompt": "Name a sea.", "chosen": "The Baltic.", "rejected": "Paris."}
USER = {"role": "user", "content": "Name a sea."}
ASSISTANT = {"role": "assistant", "content": "The Baltic."}
SYSTEM = {"role": "system", "content": "Be brief."}
JSON_LINE, UTF8 = "one JSON object a line", "UTF-8"
TURNS = "an optional system message, then user and assistant in turns"


def answer(text: Any) -> list[dict[str, Any]]:
    return [{"role": "assistant", "content": text}]


def said(role: Any, content: Any = "x") -> dict[str, Any]:
    return {"role": role, "content": content}


# No JSON object, or none that can be read: line, reason, what is found, what is expected.
LINES: dict[str, tuple[bytes, str, str, str]] = {
    "cut in a string": (b'{"prompt": "a', "malformed_json", "Unterminated string", JSON_LINE),
    "cut behind a key": (b'{"prompt": "a", "chosen"', "malformed_json", "malformed JSON", JSON_LINE),
    "cut behind a comma": (b'{"prompt": "a",', "malformed_json", "malformed JSON", JSON_LINE),
    "only a brace": (b"{", "malformed_json", "malformed JSON", JSON_LINE),
    "an empty object": (b"{}", "missing_field", "no such field", "a value"),
    "a list": (b'[{"prompt": "a"}]', "not_an_object", "JSON of type list", JSON_LINE),
    "a string": (b'"prompt"', "not_an_object", "JSON of type str", JSON_LINE),
    "a number": (b"17", "not_an_object", "JSON of type int", JSON_LINE),
    "null": (b"null", "not_an_object", "JSON of type NoneType", JSON_LINE),
    "true": (b"true", "not_an_object", "JSON of type bool", JSON_LINE),
    "NaN": (b"NaN", "not_an_object", "JSON of type float", JSON_LINE),
    "infinity": (b"-Infinity", "not_an_object", "JSON of type float", JSON_LINE),
    "lists without end": (b"[" * 100_000, "malformed_json", "JSON that cannot be read", JSON_LINE),
    "objects without end": (b'{"a":' * 100_000, "malformed_json", "JSON that cannot be read", JSON_LINE),
    "a number of 5000 digits": (b'{"id": ' + b"1" * 5000 + b"}", "malformed_json", "cannot be read", JSON_LINE),
    "two objects": (b'{"prompt": "a"} {"prompt": "b"}', "malformed_json", "Extra data", JSON_LINE),
    "a comma at the end": (b'{"prompt": "a",}', "malformed_json", "malformed JSON", JSON_LINE),
    "single quotes": (b"{'prompt': 'a'}", "malformed_json", "malformed JSON", JSON_LINE),
    "a key without quotes": (b'{prompt: "a"}', "malformed_json", "malformed JSON", JSON_LINE),
    "a comment": (b'{"prompt": "a"} // sea', "malformed_json", "Extra data", JSON_LINE),
    "a NUL byte": (b'{"prompt": "a\x00"}', "malformed_json", "Invalid control character", JSON_LINE),
    "NUL bytes alone": (b"\x00" * 64, "malformed_json", "malformed JSON", JSON_LINE),
    "an escape byte": (b'{"prompt": "\x1b[2J"}', "malformed_json", "Invalid control character", JSON_LINE),
    "a tab in a string": (b'{"prompt": "a\tb"}', "malformed_json", "Invalid control character", JSON_LINE),
    "an unknown escape": (rb'{"prompt": "\x41"}', "malformed_json", "Invalid \\escape", JSON_LINE),
    "a short escape": (rb'{"prompt": "\u12"}', "malformed_json", "malformed JSON", JSON_LINE),
    "a mark in mid-file": (b"\xef\xbb\xbf" + b'{"prompt": "a"}', "malformed_json", "BOM", JSON_LINE),
    "Latin-1": (b'{"prompt": "\xe9"}', "invalid_utf8", "the byte 0xe9 at byte 12", UTF8),
    "a continuation byte alone": (b'{"prompt": "\x80"}', "invalid_utf8", "the byte 0x80", UTF8),
    "a slash of two bytes": (b'{"prompt": "\xc0\xaf"}', "invalid_utf8", "the byte 0xc0", UTF8),
    "a surrogate in UTF-8": (b'{"prompt": "\xed\xa0\x80"}', "invalid_utf8", "the byte 0xed", UTF8),
    "beyond Unicode": (b'{"prompt": "\xf4\x90\x80\x80"}', "invalid_utf8", "the byte 0xf4", UTF8),
    "cut in a character": ('{"prompt": "日"}'.encode()[:14], "invalid_utf8", "the byte 0xe6", UTF8),
    "UTF-16": (json.dumps(GOOD).encode("utf-16-le"), "malformed_json", "malformed JSON", JSON_LINE),
    "UTF-16 with its mark": (json.dumps(GOOD).encode("utf-16"), "invalid_utf8", "the byte 0xff at byte 0", UTF8),
    "gzip": (gzip.compress(b"{}", mtime=0), "invalid_utf8", "the byte 0x8b at byte 1", UTF8),
    "a pickle": (pickle.dumps(GOOD, protocol=4), "invalid_utf8", "the byte 0x80 at byte 0", UTF8),
    "the head of a Parquet file": (b"PAR1\x15\x04", "malformed_json", "malformed JSON", JSON_LINE),
    "a page of a web server": (b"<!DOCTYPE html><html>", "malformed_json", "malformed JSON", JSON_LINE),
    "a pointer of Git LFS": (b"version https://git-lfs.github.com/spec/v1", "malformed_json", "malformed", JSON_LINE),
    "comma-separated values": (b"prompt,chosen,rejected", "malformed_json", "malformed JSON", JSON_LINE),
}

# Objects that are no pair: the row, reason, field, what is found, what is expected.
FIELDS: dict[str, tuple[dict[str, Any], str, str, str, str]] = {
    "no chosen": ({"prompt": "a", "rejected": "b"}, "missing_field", "chosen", "no such field", "a value"),
    "no rejected": ({"prompt": "a", "chosen": "b"}, "missing_field", "rejected", "no such field", "a value"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "missing_field", "prompt", "no such field", "a value"),
    "another schema": ({"question": "a", "answer": "b"}, "missing_field", "chosen", "no such field", "a value"),
    "chosen is null": ({**GOOD, "chosen": None}, "missing_field", "chosen", "null", "a value"),
    "prompt is null": ({**GOOD, "prompt": None}, "missing_field", "prompt", "null", "a value"),
    "chosen is a number": ({**GOOD, "chosen": 3}, "wrong_type", "chosen", "a number", "a string or a list"),
    "chosen is a fraction": ({**GOOD, "chosen": 0.5}, "wrong_type", "chosen", "a number", "a string or a list"),
    "chosen is not a number": ({**GOOD, "chosen": float("nan")}, "wrong_type", "chosen", "a number", "a string"),
    "chosen is true": ({**GOOD, "chosen": True}, "wrong_type", "chosen", "a boolean", "a string or a list"),
    "chosen is an object": ({**GOOD, "chosen": {"text": "a"}}, "wrong_type", "chosen", "an object", "a string or"),
    "chosen is one message of the user": (
        {**GOOD, "chosen": USER},
        "last_turn_not_assistant",
        "chosen",
        "role 'user'",
        "'assistant'",
    ),
    "chosen is numbers": ({**GOOD, "chosen": [1, 2]}, "wrong_type", "chosen[0]", "a number", "a message"),
    "chosen is strings": ({**GOOD, "chosen": ["a"]}, "wrong_type", "chosen[0]", "a string", "a message"),
    "messages in a list": ({**GOOD, "chosen": [[ASSISTANT]]}, "wrong_type", "chosen[0]", "a list", "a message"),
    "chosen is empty": ({**GOOD, "chosen": ""}, "empty_field", "chosen", "no text", "text"),
    "chosen is blank": ({**GOOD, "chosen": " \n\t"}, "empty_field", "chosen", "white space only", "text"),
    "chosen is wide blanks": ({**GOOD, "chosen": "\u00a0\u3000\u2003"}, "empty_field", "chosen", "white space", "text"),
    "no messages": ({**GOOD, "chosen": []}, "empty_field", "chosen", "no messages", "at least one message"),
    "an empty message": ({**GOOD, "chosen": answer("")}, "empty_field", "chosen[0]", "no text", "text"),
    "from and value": (
        {**GOOD, "prompt": [{"from": "human", "value": "a"}]},
        "wrong_type",
        "prompt[0]",
        "an object with 'from': a string, 'value': a string",
        "a message",
    ),
    "no role": ({**GOOD, "prompt": [{"content": "a"}]}, "wrong_type", "prompt[0]", "'content': a string", "a message"),
    "no content": ({**GOOD, "prompt": [{"role": "user"}]}, "wrong_type", "prompt[0]", "'role': a string", "a message"),
    "content is null": ({**GOOD, "chosen": answer(None)}, "wrong_type", "chosen[0]", "'content': null", "a message"),
    "content is a picture": (
        {**GOOD, "chosen": answer([{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {"url": "x"}}])},
        "unread_part",
        "chosen[0].content[1]",
        "a part of type 'image_url'",
        "parts of type 'text'",
    ),
    "content is strings": (
        {**GOOD, "chosen": answer(["a"])},
        "unread_part",
        "chosen[0].content[0]",
        "a string",
        "parts of type 'text'",
    ),
    "content is parts without text": (
        {**GOOD, "chosen": answer([{"type": "text"}])},
        "unread_part",
        "chosen[0].content[0]",
        "a part of text with no text",
        "a string `text`",
    ),
    "content is no parts": ({**GOOD, "chosen": answer([])}, "empty_field", "chosen[0]", "no text", "text"),
    "a role that is a number": ({**GOOD, "prompt": [said(1)]}, "wrong_type", "prompt[0]", "'role': a number", "a mess"),
    "a tool speaks": ({**GOOD, "prompt": [USER, said("tool")]}, "unknown_role", "prompt[1]", "role 'tool'", "'system'"),
    "a role in capitals": ({**GOOD, "prompt": [said("User")]}, "unknown_role", "prompt[0]", "role 'User'", "'user'"),
    "a role of no letters": ({**GOOD, "prompt": [said("")]}, "unknown_role", "prompt[0]", "role ''", "'user'"),
    "a role of a million letters": (
        {**GOOD, "prompt": [said("a" * 1_000_000)]},
        "unknown_role",
        "prompt[0]",
        "(1,000,007 characters)",
        "'user'",
    ),
    "a role that clears the screen": (
        {**GOOD, "prompt": [said("\x1b[2J\x07")]},
        "unknown_role",
        "prompt[0]",
        r"role '\x1b[2J\x07'",
        "'user'",
    ),
    "a field that clears the screen": (
        {**GOOD, "prompt": [{"\x1b]0;a\x07": 1, "\u202e": 2}]},
        "wrong_type",
        "prompt[0]",
        r"'\x1b]0;a\x07': a number",
        "a message",
    ),
    "the user has the last word": (
        {"chosen": [USER, ASSISTANT, USER], "rejected": [USER, ASSISTANT]},
        "last_turn_not_assistant",
        "chosen",
        "role 'user' in the last turn",
        "'assistant'",
    ),
    "the system has the last word": (
        {"chosen": [USER, ASSISTANT], "rejected": [USER, SYSTEM]},
        "last_turn_not_assistant",
        "rejected",
        "role 'system' in the last turn",
        "'assistant'",
    ),
    "prompt is a number": ({**GOOD, "prompt": 7}, "wrong_type", "prompt", "a number", "a string or a list"),
    "prompt is an object": ({**GOOD, "prompt": {}}, "wrong_type", "prompt", "an object", "a string or a list"),
    "prompt is no messages": ({**GOOD, "prompt": []}, "empty_field", "prompt", "no messages", "at least one"),
    "prompt is empty": ({**GOOD, "prompt": ""}, "empty_field", "prompt", "no text", "text"),
    "prompt is blank": ({**GOOD, "prompt": "\r\n"}, "empty_field", "prompt", "white space only", "text"),
    "system behind user": ({**GOOD, "prompt": [USER, SYSTEM]}, "role_order", "prompt", "roles user, system", TURNS),
    "system alone": ({**GOOD, "prompt": [SYSTEM]}, "role_order", "prompt", "roles system", TURNS),
    "two users": ({**GOOD, "prompt": [USER, USER]}, "role_order", "prompt", "roles user, user", TURNS),
    "assistant first": ({**GOOD, "prompt": [ASSISTANT, USER]}, "role_order", "prompt", "roles assistant, user", TURNS),
    "assistant last": ({**GOOD, "prompt": [USER, ASSISTANT]}, "role_order", "prompt", "roles user, assistant", TURNS),
    "system twice": (
        {**GOOD, "system": "Hm.", "prompt": [SYSTEM, USER]},
        "role_order",
        "prompt",
        "roles system, system, user",
        TURNS,
    ),
    "equal responses": ({**GOOD, "rejected": "The Baltic."}, "equal_responses", "rejected", "the text of", "two diff"),
    "equal responses in two forms": (
        {**GOOD, "rejected": answer("The Baltic.")},
        "equal_responses",
        "rejected",
        "the text of `chosen`",
        "two different responses",
    ),
    "two prompts": (
        {"chosen": [USER, *answer("a")], "rejected": [said("user", "Other?"), *answer("b")]},
        "prompt_mismatch",
        "rejected",
        "other turns before the last one",
        "one shared prompt",
    ),
    "a prompt of another pair": (
        {"prompt": "Name a city.", "chosen": [USER, *answer("a")], "rejected": [USER, *answer("b")]},
        "prompt_mismatch",
        "prompt",
        "a text that is not in the conversations",
        "the turns that",
    ),
    "system is a number": ({**GOOD, "system": 3}, "wrong_type", "system", "a number", "a string"),
    "system is a message": ({**GOOD, "system": SYSTEM}, "wrong_type", "system", "an object", "a string"),
    "id is true": ({**GOOD, "id": True}, "wrong_type", "id", "a boolean", "a string or a number"),
    "id is a list": ({**GOOD, "id": ["a"]}, "wrong_type", "id", "a list", "a string or a number"),
    "id is an object": ({**GOOD, "id": {}}, "wrong_type", "id", "an object", "a string or a number"),
    "id is empty": ({**GOOD, "id": ""}, "empty_field", "id", "no text", "text"),
    "id is blank": ({**GOOD, "id": " "}, "empty_field", "id", "white space only", "text"),
    "a surrogate in prompt": (
        {**GOOD, "prompt": "ab\ud800"},
        "lone_surrogate",
        "prompt",
        "U+D800 at character 2",
        "Un",
    ),
    "a surrogate in chosen": ({**GOOD, "chosen": "\udfffa"}, "lone_surrogate", "chosen", "U+DFFF at character 0", "Un"),
    "a surrogate in rejected": (
        {**GOOD, "rejected": answer("a\udc00b")},
        "lone_surrogate",
        "rejected[0]",
        "U+DC00",
        "",
    ),
    "a surrogate in system": ({**GOOD, "system": "\ud83d"}, "lone_surrogate", "system", "U+D83D", "Unicode text"),
    "a surrogate in id": ({**GOOD, "id": "\ud83d"}, "lone_surrogate", "id", "U+D83D", "Unicode text"),
}


def _written(scene: Scene, line: bytes) -> Values:
    """A file whose second line is the bad one."""
    first, last = ({**GOOD, "id": name} for name in ("first", "last"))
    path = scene.folder / "pairs.jsonl"
    path.write_bytes(b"\n".join([json.dumps(first).encode(), line, json.dumps(last).encode(), b""]))
    return {"data": {"train": [str(path)]}}


def _case(name: str, line: bytes, reason: str, field: str, found: str, expected: str) -> Case:
    place = "pairs.jsonl:2" + (f", field '{field}'" if field else "")
    return Case(name, "rows", lambda scene: _written(scene, line), place, found, expected, skipped=reason)


def row_cases() -> list[Case]:
    lines = [
        _case(name, line, reason, "chosen" if line == b"{}" else "", found, expected)
        for name, (line, reason, found, expected) in LINES.items()
    ]
    fields = [
        _case(name, json.dumps(row).encode(), reason, field, found, expected)
        for name, (row, reason, field, found, expected) in FIELDS.items()
    ]
    return lines + fields
