"""The pages' examples run, and their tables hold."""

import ast
import json
import re
import shutil
from pathlib import Path

import pytest
from named import codes, is_known, rows
from tiny import load_tiny

import pyloss
from pyloss.cli import main
from pyloss.errors import size_text
from pyloss.tuner import linear_to_lora_layers, unfreeze_layers
from pyloss.tuner.run.plan import estimate_memory

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
if not DOCS.is_dir():
    pytest.skip("the pages are not part of the package", allow_module_level=True)


def text(page):
    return (DOCS / page).read_text(encoding="utf-8")


def blocks(page, language):
    return re.findall(rf"^ *```{language}\n(.*?)^ *```$", text(page), re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def real():
    try:
        return pyloss.models.resolve_model("smollm2-135m")
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    "page",
    [
        "getting_started.md",
        "chat_data.md",
        "resuming.md",
        "notebooks.md",
        "repeating.md",
        "coming_from_peft.md",
        "coming_from_trl.md",
    ],
)
def test_examples_run(page, real, tmp_path, monkeypatch, capsys):
    shutil.copytree(ROOT / "examples" / "data", tmp_path / "examples" / "data")
    monkeypatch.chdir(tmp_path)
    threads = pyloss.get_num_threads()
    names: dict = {}
    try:
        for code in blocks(page, "python"):
            exec(compile(code, page, "exec"), names)
    finally:
        pyloss.set_num_threads(threads)
    said = capsys.readouterr().out
    # What a line prints stands in its comment.
    for expected in re.findall(r"^ *print\(.*\)  # (.*)$", text(page), re.MULTILINE):
        assert expected in said.splitlines()


def preview(record, folder, capsys, model="smollm2-135m"):
    (folder / "a.jsonl").write_text(record, encoding="utf-8")
    line = ["train", "--data", str(folder / "a.jsonl"), "--valid-split", "0", "--model", str(model)]
    assert main([*line, "--train-on", "assistant", "--preview"]) == 0
    return capsys.readouterr().out


def test_the_preview_of_a_conversation(real, tmp_path, capsys):
    (record,) = blocks("chat_data.md", "json")
    (shown,) = blocks("chat_data.md", "text")
    assert preview(record, tmp_path, capsys).strip() == shown.strip()


def test_the_preview_of_tool_calls(real, tmp_path, capsys):
    record, short = blocks("tool_calls.md", "json")
    assert set(json.loads(short)) == {"prompt", "completion"}
    (shown,) = blocks("tool_calls.md", "text")
    folder = tmp_path / "model"
    _, tokenizer = pyloss.load("smollm2-135m")
    load_tiny(folder, vocab_size=tokenizer.vocab_size)
    tokenizer.save(folder)
    # As Qwen3's template writes tools, calls and responses.
    template = (
        "{% for m in messages %}"
        "{% if m.role == 'tool' %}<|im_start|>user\n<tool_response>\n{{ m.content }}\n"
        "</tool_response><|im_end|>\n"
        "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for call in m.tool_calls or [] %}<tool_call>\n"
        '{"name": "{{ call.function.name }}", "arguments": {{ call.function.arguments | tojson }}}'
        "\n</tool_call>{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    config = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    (folder / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    assert shown.strip() in preview(record, tmp_path, capsys, folder)
    # SmolLM2's template leaves the call out, as the page says.
    assert "weather" not in preview(record, tmp_path, capsys)


def test_the_table_of_memory(real, monkeypatch):
    found = re.findall(
        r"^\| (\d+) x (\d+) \| ?(.*?) \| ([\d.]+ [MG]B) \|$", text("memory.md"), re.M
    )
    assert len(found) == 11
    precision = pyloss.get_matmul_precision()
    models = {}
    for batch, tokens, flags, size in found:
        flags = flags.strip("`").split()
        options = dict(zip(flags, [*flags[1:], ""]))
        layers = int(options.get("--num-layers", -1))
        kind = options.get("--fine-tune-type", "lora")
        if (kind, layers) not in models:
            model, _ = pyloss.load(real)
            if kind == "full":
                unfreeze_layers(model, layers)
            else:
                config = {"rank": 8, "scale": 2.0}
                linear_to_lora_layers(model, layers, config, use_dora=kind == "dora")
            models[kind, layers] = model
        try:
            pyloss.set_matmul_precision(options.get("--precision", "float32"))
            estimate = estimate_memory(
                models[kind, layers], int(batch), int(tokens), "--grad-checkpoint" in options
            )
        finally:
            pyloss.set_matmul_precision(precision)
        assert size_text(estimate) == size, (batch, tokens, flags)


def sentences():
    """The texts of the package's code, docstrings left out, with "\\0" for what they put in."""

    def pieces(node):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            return node.value
        if isinstance(node, ast.JoinedStr):
            return "".join(pieces(part) for part in node.values)
        if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            return pieces(node.left) + pieces(node.right)
        return "\0"

    found = set()
    for file in (ROOT / "pyloss").rglob("*.py"):
        tree = ast.parse(file.read_text(encoding="utf-8"))
        docstrings = {each.value for each in ast.walk(tree) if isinstance(each, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, (ast.Constant, ast.JoinedStr, ast.BinOp)):
                if node not in docstrings:
                    found.add(pieces(node))
    return found


def test_messages_are_those_of_the_code():
    given = re.findall(r"^### (.*)$", text("messages.md"), re.MULTILINE)
    messages = [message for heading in given for message in codes(heading)]
    assert len(messages) >= 25
    known = sentences()
    for message in messages:
        # A message may be composed of several texts: each part is in one of them.
        for part in message.split("…"):
            assert any(part.strip(" ;:") in each for each in known), (message, part)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["train"], "no data given: give a folder with train.jsonl, or the name of a dataset"),
        (["train", "--data", "odd.jsonl"], "the record's keys are 'foo'; expected"),
        (["train", "--data", "pairs.jsonl"], "there is no training on preferences; with"),
        (["train", "--data", "missing.jsonl"], "missing.jsonl: there is no such file"),
        (["train", "--data", "bad.jsonl"], "is not valid JSON"),
        (["generate", "--model", "nosuch"], "no model at 'nosuch': give a .gguf file"),
        (["generate", "--model", "lfs.gguf"], "this is a Git LFS pointer; the file itself"),
        (["generate", "--model", "page.gguf"], "not a GGUF file: it starts with"),
        (["generate", "--model", "other"], "model_type 'other' is not supported; supported are"),
        (["generate", "--adapter-path", "nowhere"], "no adapter in nowhere: the folder does not"),
        (["train", "--config", "lr.yaml"], "unknown key lr (value 0.1): did you mean learning_ra"),
        (["train", "--optimizer", "adamx"], "optimizer is 'adamx'; allowed: adam, adamw"),
        (["train", "--iterz", "3"], "unrecognized arguments: --iterz 3; did you mean --iters?"),
    ],
)
def test_messages_are_what_a_command_says(argv, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("odd.jsonl").write_text('{"foo": 1}\n')
    Path("pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    Path("bad.jsonl").write_text('{"messages": [\n')
    Path("lfs.gguf").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\n")
    Path("page.gguf").write_text("<html>" + " " * 100)
    Path("lr.yaml").write_text("lr: 0.1\n")
    Path("other").mkdir()
    Path("other/config.json").write_text('{"model_type": "other", "architectures": ["Other"]}')
    more = ["--prompt", "hello"] if argv[0] == "generate" else []
    assert main([*argv, *more]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert message in said, said
    headings = re.findall(r"^### (.*)$", text("messages.md"), re.MULTILINE)
    patterns = [
        ".*".join(re.escape(part.strip()) for part in code.split("…"))
        for heading in headings
        for code in codes(heading)
    ]
    assert any(re.search(pattern, said) for pattern in patterns), said


@pytest.mark.parametrize(("page", "other"), [("peft", "PEFT"), ("trl", "TRL")])
def test_names_in_the_tables_exist_here(page, other):
    found = rows(f"coming_from_{page}.md", other)
    assert len(found) > 25 and all(len(row) == 3 for row in found)
    for given, ours, difference in found:
        assert all(is_known(name) for name in codes(ours)), (given, ours)
        assert ours or difference, given
    assert not is_known("pyloss.nothing") and not is_known("nothing") and not is_known("Model.no")
