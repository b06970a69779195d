"""Layouts of records: recognized by their keys, and converted to the forms that datasets take.

The forms are `{"messages": [...]}`, `{"prompt", "completion"}` and `{"text"}`, with "tools" where
there are any.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pyloss.io.files import kind_of
from pyloss.models.text.chat_template import render_record
from pyloss.tuner.data.records import Record, Records, field, keys_of

PROMPTS = ("prompt", "instruction", "question", "query", "input", "problem")
ANSWERS = ("completion", "response", "answer", "output", "solution", "answers")
_CONVERSATIONS = ("conversations", "conversation")
_SYSTEM = ("system", "system_prompt")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
    "function_response": "tool",
    "function_call": "assistant",
}

#: the layouts as error messages list them
KNOWN = (
    "one of these layouts: OpenAI: messages; ShareGPT: conversations; "
    "Alpaca: instruction, input, output; a prompt "
    f"({', '.join(PROMPTS)}) with an answer ({', '.join(ANSWERS)}), and context if there is any; "
    "preference pairs: prompt, chosen, rejected; plain text: text; "
    "for others --map prompt=KEY,completion=KEY, messages=KEY or text=KEY"
)
#: what `--map` may name: the forms' keys, and those that are added to them
TARGETS = ("prompt", "completion", "messages", "text", "system", "context", "tools")


@dataclass(frozen=True)
class Layout:
    """How the records of a dataset are laid out.

    Attributes:
        name: such as "Alpaca".
        keys: the keys that are read.
        form: "messages", "completion" or "text": the dataset that takes the records.
        convert: turns a record, with its origin for errors, into that form; None: it has it.
        chosen: of preference pairs, the `--map` that trains on the chosen answers; only with it
            are they trained on. Otherwise "".
    """

    name: str
    keys: tuple[str, ...]
    form: str
    convert: Callable[[Record, str], Record] | None = None
    chosen: str = ""

    @property
    def note(self) -> str:
        """What a user of preference pairs has to know; "" for other layouts."""
        return self.chosen and (
            "there is no training on preferences; with "
            f"--map {self.chosen} the chosen answers are trained on"
        )

    def __str__(self) -> str:
        return f"{self.name}: {', '.join(self.keys)}"


class Converted(Sequence[Record]):
    """The records of a sequence, converted when they are read.

    Attributes:
        layout: that of the given records.
    """

    def __init__(self, data: Any, layout: Layout):
        self._data = data
        self.layout = layout

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, index: Any) -> Any:
        record = self._data[index]
        assert self.layout.convert is not None
        return self.layout.convert(record, self.where(index))

    def where(self, index: int) -> str:
        """The origin of a record, for error messages."""
        return place_of(self._data, index)

    def given(self, index: int) -> Record:
        """The record before its conversion."""
        record: Record = self._data[index]
        return record

    def select(self, indices: Sequence[int]) -> Converted:
        """Some of the records."""
        return Converted(self._data.select(indices), self.layout)


def place_of(data: Any, index: int) -> str:
    """The origin of a record, for error messages."""
    return data.where(index) if isinstance(data, (Records, Converted)) else f"record {index}"


#: the comma before the next name; a template may have other commas
_NEXT = re.compile(rf",(?=\s*(?:{'|'.join(TARGETS)})\s*=)")


def _is_template(key: str) -> bool:
    return "{{" in key or "{%" in key


def read_map(value: Any) -> dict[str, str]:
    """`--map` as a mapping of `TARGETS` to the records' keys; text is "prompt=KEY,completion=KEY".

    Raises `ValueError` that says what is allowed.
    """
    allowed = (
        "prompt=KEY,completion=KEY or messages=KEY or text=KEY, where KEY is a key of the records; "
        "system=KEY, context=KEY and tools=KEY may be added; a Jinja template such as "
        "'{{ title }}: {{ body }}' may stand for a KEY"
    )
    if isinstance(value, str):
        parts = _NEXT.split(value) if _is_template(value) else value.split(",")
        pairs = [part.partition("=") for part in parts]
        if len({name for name, _, _ in pairs}) != len(pairs):
            raise ValueError(allowed)
        value = {name.strip(): key.strip() for name, _, key in pairs}
    if not isinstance(value, Mapping) or not all(
        name in TARGETS and isinstance(key, str) and key for name, key in value.items()
    ):
        raise ValueError(allowed)
    forms = set(value) & {"prompt", "completion", "messages", "text"}
    if forms not in ({"prompt", "completion"}, {"messages"}, {"text"}):
        raise ValueError(allowed)
    more = set(value) - forms
    if ("text" in forms and more) or ("messages" in forms and "context" in more):
        raise ValueError(allowed)
    return dict(value)


def mapped(mapping: Mapping[str, str], first: Record) -> Layout:
    """The layout that `--map` says. Raises `ValueError` if the first record lacks a key of it.

    Templates become keys of the records before these are read.
    """
    templates = {name: key for name, key in mapping.items() if _is_template(key)}
    if templates:
        keys_made = {name: f"the template of {name}" for name in templates}

        def made(record: Record, at: str) -> Record:
            try:
                texts = {
                    keys_made[name]: render_record(template, record, keys_made[name])
                    for name, template in templates.items()
                }
            except ValueError as error:
                raise ValueError(f"{at}{error}") from None
            return {**record, **texts}

        layout = mapped({**mapping, **keys_made}, made(first, ""))
        convert = layout.convert
        assert convert is not None
        return replace(
            layout, convert=lambda record, where: convert(made(record, f"{where}: "), where)
        )
    for key in mapping.values():
        if key not in first:
            raise ValueError(f"--map names the key {key!r}; the record's keys are {keys_of(first)}")
    keys = tuple(mapping.values())
    if "text" in mapping:
        text = mapping["text"]
        return Layout(
            "mapped to text",
            keys,
            "text",
            lambda record, where: {"text": field(record, text, str, where, repr(text))},
        )
    tools, system = mapping.get("tools"), mapping.get("system")
    if "messages" in mapping:
        return _conversation("mapped to messages", mapping["messages"], system, tools)
    if set(mapping) == {"prompt", "completion"} and isinstance(first[mapping["prompt"]], list):
        return continued(mapping["prompt"], mapping["completion"])
    parts = [mapping[name] for name in ("context", "prompt") if name in mapping]
    return _pair("mapped to a pair", parts, mapping["completion"], system, tools, must=parts)


def recognized(first: Record, keys: Collection[str]) -> Layout:
    """The layout of records, by the first of them and by the keys that any of them has.

    Raises `ValueError` that names the keys found and the layouts known.
    """
    if "chosen" in first and "rejected" in first:
        return _preferences(first)
    found: list[Layout] = []
    system = next((key for key in _SYSTEM if key in keys), None)
    tools = "tools" if "tools" in keys else None
    conversations = [key for key in _CONVERSATIONS if key in first]
    for key in conversations:
        name = "ShareGPT" if "from" in _first_message(first[key]) else "OpenAI"
        found.append(_conversation(name, key, system, tools))
    prompts = [key for key in PROMPTS if key in first]
    answers = [key for key in ANSWERS if key in first]
    parts = ["context"] if "context" in keys else []
    if "instruction" in prompts and answers:
        prompts = [key for key in prompts if key != "input"]
        parts += ["instruction", *(["input"] if "input" in keys else [])]
    else:
        parts += prompts
    if prompts and answers:
        name = "prompt and answer"
        if prompts == ["instruction"] and answers == ["output"] and "context" not in keys:
            name = "Alpaca"
        elif "context" in keys:
            name = "question, answer and context"
        history = "history" if name == "Alpaca" and "history" in keys else None
        pair = _pair(name, parts, answers[0], system, tools, history, prompts)
        found += [pair] * max(len(prompts), len(answers))
    if len(found) == 1:
        return found[0]
    several = ", which can be read in several ways" if found else ""
    raise ValueError(f"the record's keys are {keys_of(first)}{several}; expected {KNOWN}")


def _preferences(first: Record) -> Layout:
    """The layout of pairs of a chosen and a rejected answer, as DPO takes them.

    It reads the chosen answers, as `--map` with its `chosen` does.
    """
    prompt = next((key for key in PROMPTS if key in first), None)
    whole = _first_message(first["chosen"]).get("role", "assistant") != "assistant"
    if isinstance(first["chosen"], list) and (whole or prompt is None):
        chosen = "messages=chosen"
    elif prompt is None:
        chosen = "text=chosen"
    else:
        chosen = f"prompt={prompt},completion=chosen"
    keys = (*_some(prompt), "chosen", "rejected")
    return replace(
        mapped(read_map(chosen), first), name="preference pairs", keys=keys, chosen=chosen
    )


def chat(key: str, first: Record, keys: Collection[str]) -> Layout:
    """The layout of records whose `key` holds messages, in OpenAI's or ShareGPT's keys."""
    message = _first_message(first[key])
    if "from" in message and "role" not in message:
        system = next((name for name in _SYSTEM if name in keys), None)
        return _conversation("ShareGPT", key, system, "tools" if "tools" in keys else None)
    known = (key, *(["tools"] if "tools" in keys else []))
    if isinstance(first[key], str) and _as_list(first[key]) is not first[key]:
        return _conversation("OpenAI", key, None, "tools" if "tools" in keys else None)
    return Layout("OpenAI", known, "messages")


def continued(prompt: str, completion: str) -> Layout:
    """The layout of a prompt of messages, and a completion of messages or text, as in TRL."""

    def convert(record: Record, where: str) -> Record:
        asked = field(record, prompt, list, where, repr(prompt))
        answer = record.get(completion)
        if not isinstance(answer, str):
            answer = field(record, completion, list, where, repr(completion))
        said = [{"role": "assistant", "content": answer}] if isinstance(answer, str) else answer
        return _with_tools(record, "tools", {"messages": [*asked, *said]})

    return Layout("prompt of messages", (prompt, completion), "messages", convert)


def _as_list(value: Any) -> Any:
    """The list that a JSON text represents, as in a cell of CSV; anything else as it is."""
    if not isinstance(value, str):
        return value
    try:
        found = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return found if isinstance(found, list) else value


def _first_message(value: Any) -> Mapping[str, Any]:
    messages = _as_list(value)
    first = messages[0] if isinstance(messages, list) and messages else None
    return first if isinstance(first, Mapping) else {}


def _some(*keys: str | None) -> tuple[str, ...]:
    return tuple(key for key in keys if key is not None)


def _optional(record: Record, key: str | None, where: str) -> str:
    """The text under a key that may be missing, null or empty."""
    value = None if key is None else record.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{where}: {key!r} is {kind_of(value)}, and must be a string")
    return value or ""


def _with_tools(record: Record, tools: str | None, form: Record) -> Record:
    return form if tools is None or record.get(tools) is None else {**form, "tools": record[tools]}


def _system_message(record: Record, system: str | None, where: str) -> list[Record]:
    text = _optional(record, system, where)
    return [{"role": "system", "content": text}] if text else []


def _conversation(name: str, key: str, system: str | None, tools: str | None) -> Layout:
    def convert(record: Record, where: str) -> Record:
        given = {**record, key: _as_list(record[key])} if key in record else record
        value = field(given, key, list, where, repr(key))
        messages = [_message(item, f"{where}: {key}[{i}]") for i, item in enumerate(value)]
        first = _system_message(record, system, where)
        has_own = any(isinstance(m, Mapping) and m.get("role") == "system" for m in messages[:1])
        return _with_tools(record, tools, {"messages": messages if has_own else first + messages})

    return Layout(name, (key, *_some(system, tools)), "messages", convert)


def _message(item: Any, where: str) -> Any:
    """A message with ShareGPT's keys in OpenAI's; others stay, and are checked by the dataset."""
    if not isinstance(item, Mapping) or "from" not in item or "role" in item:
        return item
    value = item.get("value")
    if not isinstance(value, (str, list)):
        raise ValueError(f"{where}: 'value' is {kind_of(value)}, and must be a string")
    if not isinstance(item["from"], str) or item["from"] not in _ROLES:
        raise ValueError(
            f"{where}: 'from' is {item['from']!r:.80}, and must be one of {', '.join(_ROLES)}"
        )
    role = _ROLES[item["from"]]
    if item["from"] != "function_call":
        return {"role": role, "content": value}
    try:
        call = json.loads(value) if isinstance(value, str) else value
    except (ValueError, RecursionError):
        call = None
    calls = call if isinstance(call, list) else [call]
    if not calls or not all(isinstance(c, dict) and isinstance(c.get("name"), str) for c in calls):
        raise ValueError(
            f"{where}: the function_call must be JSON of an object with 'name' and 'arguments'"
        )
    return {
        "role": role,
        "content": "",
        "tool_calls": [{"type": "function", "function": c} for c in calls],
    }


def _pair(
    name: str,
    parts: Sequence[str],
    answer: str,
    system: str | None,
    tools: str | None,
    history: str | None = None,
    must: Sequence[str] = (),
) -> Layout:
    """A prompt of `parts`, of which `must` may not be missing, and its answer.

    With a system prompt or a history the form is messages.
    """
    form = "completion" if system is None and history is None else "messages"
    expected = " and ".join(map(repr, (*must, answer)))

    def convert(record: Record, where: str) -> Record:
        texts = [
            field(record, part, str, where, expected)
            if part in must
            else _optional(record, part, where)
            for part in parts
        ]
        prompt = "\n".join(text for text in texts if text)
        completion = _answer(record, answer, where, expected)
        if form == "completion":
            return _with_tools(record, tools, {"prompt": prompt, "completion": completion})
        messages = _system_message(record, system, where)
        for asked, said in [*_turns(record, history, where), (prompt, completion)]:
            messages.append({"role": "user", "content": asked})
            messages.append({"role": "assistant", "content": said})
        return _with_tools(record, tools, {"messages": messages})

    return Layout(name, (*parts, answer, *_some(system, history, tools)), form, convert)


def _answer(record: Record, key: str, where: str, expected: str) -> str:
    value = record.get(key)
    if isinstance(value, Mapping):  # as in SQuAD: several answers, each with its place
        value = value.get("text")
    if key == "answers" and isinstance(value, list) and value:
        value = value[0]
    if not isinstance(value, str):
        value = field(record, key, str, where, expected)
    return str(value)


def _turns(record: Record, key: str | None, where: str) -> list[tuple[str, str]]:
    turns = None if key is None else record.get(key)
    if not turns:
        return []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn)
        for turn in turns
    ):
        raise ValueError(f"{where}: {key!r} must be a list of [question, answer]")
    return [(asked, said) for asked, said in turns]
