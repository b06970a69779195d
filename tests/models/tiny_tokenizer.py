"""A small tokenizer from GGUF metadata, and texts for it."""

from tokenizers import pre_tokenizers

from pyloss.models.tokenizer import Tokenizer

BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
SPECIAL = ["<unk>", "<s>", "</s>", "<|eot|>", "<tool>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "1 2", "Ġ Ġ"]
TEMPLATE = (
    "{% for message in messages %}\n"
    "    {% if message.role == 'bad' %}{{ raise_exception('no bad roles') }}{% endif %}\n"
    "{{ message['role'] }}: {{ message['content'] }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if tools %}{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
CHAT = [{"role": "user", "content": "hello"}]


def metadata(**changes):
    tokens = [*SPECIAL, *BYTES, *(merge.replace(" ", "") for merge in MERGES)]
    values = {
        "model": "gpt2",
        "pre": "smollm",
        "tokens": tokens,
        "merges": MERGES,
        "token_type": [2, 3, 3, 3, 4] + [1] * (len(tokens) - 5),
        "unknown_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "padding_token_id": 0,
        **changes,
    }
    result = {f"tokenizer.ggml.{key}": value for key, value in values.items() if value is not None}
    return {**result, "tokenizer.chat_template": TEMPLATE}


def tokenizer(**changes):
    return Tokenizer.from_gguf(metadata(**changes), "m.gguf")


def tokens_of(tok, text, **options):
    return [tok.backend.id_to_token(index) for index in tok.encode(text, **options)]


STRINGS = [
    "hello wörld",
    "  two  spaces\n\ttab \r\n",
    "日本語と한국어",
    "👩‍👩‍👧‍👦 🇫🇷 e\u0301",
    "\x00\x01\x7f\u200b\ufeff\u202e",
    "x" * 500,
    "",
    "\ufffd",
]
