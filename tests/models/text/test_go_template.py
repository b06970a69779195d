"""Chat templates in Go's language: the texts of Jinja's, rendered by Go where it is installed."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from pyloss.models.text.go_template import find_turns, go_template

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe \"kind\".<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
# Llama 2: the system prompt is in the first question; the end of text is between turns.
IN_QUESTION = (
    "{% if messages[0].role == 'system' %}{% set system = '<<SYS>>\n' + messages[0].content + "
    "'\n<</SYS>>\n\n' %}{% set messages = messages[1:] %}{% else %}{% set system = '' %}{% endif %}"
    "{% for m in messages %}{% if m.role == 'user' %}"
    "{{ bos_token + '[INST] ' + (system if loop.first else '') + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_SYSTEM = (
    "{% if messages[0].role == 'system' %}{{ raise_exception('no system prompt') }}{% endif %}"
    "{% for m in messages %}{{ '[' + m.role + ']' + m.content }}{% endfor %}{{ '[assistant]' }}"
)
TEMPLATES = {
    "chatml": CHATML,
    "default system": DEFAULT_SYSTEM,
    "in question": IN_QUESTION,
    "no system": NO_SYSTEM,
}
CONVERSATIONS = [
    (system, texts)
    for system in (None, "Answer in {{ verse }}.")
    for texts in (["Hi"], ["Hi", "Hello <b>", 'What "is" this?'], ["a", "b", "c\n", "d", "ä"])
]

# The interface that Ollama's template package gives to templates, in Go's own language.
PROGRAM = """package main

import ("encoding/json"; "os"; "strings"; "text/template")

type Message struct{ Role, Content string }
type Input struct {
    Template string
    System string
    Messages []*Message
}

func main() {
    var inputs []Input
    if err := json.NewDecoder(os.Stdin).Decode(&inputs); err != nil { panic(err) }
    found := []string{}
    for _, in := range inputs {
        parsed, err := template.New("").Option("missingkey=zero").Parse(in.Template)
        if err != nil { panic(err) }
        var out strings.Builder
        values := map[string]any{"System": in.System, "Messages": in.Messages, "Response": ""}
        if err := parsed.Execute(&out, values); err != nil { panic(err) }
        found = append(found, out.String())
    }
    json.NewEncoder(os.Stdout).Encode(found)
}
"""


def tokenizer_of(template):
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def messages_of(system, texts):
    found = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return found + [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def rendered(tokenizer, system, texts):
    text = tokenizer.apply_chat_template(
        messages_of(system, texts), add_generation_prompt=True, tokenize=False
    )
    # llama.cpp adds the begin token itself, as the tokenizer does
    adds = tokenizer.encode("x")[0] == tokenizer.bos_token_id
    return text.removeprefix(tokenizer.bos_token) if adds else text


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_turns_are_those_of_the_jinja_template(name):
    tokenizer = tokenizer_of(TEMPLATES[name])
    turns = find_turns(tokenizer)
    assert (turns.system is None) == (name == "no system")
    for system, texts in CONVERSATIONS:
        if system is None or turns.system:
            assert turns.render(system, texts) == rendered(tokenizer, system, texts)


def go():
    found = shutil.which("go")
    beside = Path(sys.executable).parent / "go"
    return found or (str(beside) if beside.exists() else None)


@pytest.mark.skipif(go() is None, reason="renders with Go's text/template")
def test_go_renders_what_jinja_renders(tmp_path):
    (tmp_path / "main.go").write_text(PROGRAM)
    inputs, expected = [], []
    for name, template in TEMPLATES.items():
        tokenizer = tokenizer_of(template)
        for system, texts in CONVERSATIONS:
            if system is not None and name == "no system":
                continue
            messages = messages_of(system, texts)
            inputs.append(
                {"Template": go_template(tokenizer), "System": system or "", "Messages": messages}
            )
            expected.append(rendered(tokenizer, system, texts))
    done = subprocess.run(
        [go(), "run", "main.go"],
        cwd=tmp_path,
        input=json.dumps(inputs),
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == expected


def test_a_base_model_gets_the_prompt_alone():
    assert go_template(tokenizer_of(None)) == "{{ .Prompt }}"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{{ messages[-1].content }}", "a message occurs not once in the prompt"),
        (
            "{% for m in messages %}{{ loop.index }}{{ m.content }}{% endfor %}",
            "changes the texts around later messages",
        ),
        (
            "{% for m in messages %}{% if loop.index > 3 %}!{% endif %}{{ '|' + m.content }}"
            "{% if loop.index == 1 and m.role == 'system' %}{{ raise_exception('no') }}{% endif %}"
            "{% endfor %}",
            "texts around a message depend on its place",
        ),
    ],
)
def test_templates_that_are_no_texts_around_messages(template, message):
    with pytest.raises(ValueError, match=f"cannot be written in Ollama's language: .*({message})"):
        go_template(tokenizer_of(template))
