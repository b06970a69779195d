"""Tokenizer folders whose files (tokenizer.json, configuration, templates) do not fit together."""

import json

import tiny_files
from mutation import words_of
from running import put_files

WORDS = [*words_of("models/tokenizer"), *tiny_files.SPECIAL, *tiny_files.MERGES]
WORDS += [
    "BPE",
    "Unigram",
    "WordPiece",
    "WordLevel",
    "ByteLevel",
    "Metaspace",
    "Split",
    "Sequence",
    "Replace",
    "NFC",
    "Lowercase",
    "Strip",
]
WORDS += [
    "BertNormalizer",
    "Precompiled",
    "TemplateProcessing",
    "RobertaProcessing",
    "ByteFallback",
    "Fuse",
    "Digits",
    "Whitespace",
    "Prepend",
]
#: Parts of tokenizer.json that replace its own.
PARTS = {
    "normalizer": (
        {"type": "NFKC"}, {"type": "Lowercase"}, {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": "a"}, "content": "bb"}, {"type": "Replace", "pattern": {"Regex": "(a|aa)+$"}, "content": ""},
        {"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}, {"type": "Precompiled", "precompiled_charsmap": "AAAA"},
    ),
    "pre_tokenizer": (
        {"type": "Split", "pattern": {"Regex": "(a|aa)+$"}, "behavior": "Isolated", "invert": False}, {"type": "Whitespace"}, {"type": "Digits", "individual_digits": True},
        {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}, {"type": "Split", "pattern": {"String": ""}, "behavior": "Removed", "invert": True},
        {"type": "Split", "pattern": {"Regex": ""}, "behavior": "MergedWithNext", "invert": False},
    ),
    "post_processor": (
        {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
         "pair": [{"Sequence": {"id": "A", "type_id": 0}}], "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
        {"type": "RobertaProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1], "trim_offsets": True, "add_prefix_space": False},
        {"type": "BertProcessing", "sep": ["</s>", 2], "cls": ["<s>", 1]}, {"type": "ByteLevel"},
    ),
    "decoder": ({"type": "ByteLevel"}, {"type": "Replace", "pattern": {"String": "▁"}, "content": " "}, {"type": "Fuse"}, {"type": "ByteFallback"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 2**40}, {"type": "CTC", "pad_token": "", "word_delimiter_token": "", "cleanup": True}),
    "padding": ({"strategy": {"Fixed": 200000000}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
                {"strategy": "BatchLongest", "direction": "Left", "pad_to_multiple_of": 2**40, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"},
                {"strategy": {"Fixed": 64}, "direction": "Right", "pad_to_multiple_of": 0, "pad_id": 0, "pad_type_id": 0, "pad_token": "<s>"}),
    "truncation": ({"direction": "Right", "max_length": 0, "strategy": "LongestFirst", "stride": 0}, {"direction": "Right", "max_length": 1, "strategy": "OnlySecond", "stride": 5}),
    "model": (
        {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["a", -1.0], ["hello", -2.0]], "byte_fallback": False},
        {"type": "WordPiece", "unk_token": "<unk>", "continuing_subword_prefix": "##", "max_input_chars_per_word": 100, "vocab": {"<unk>": 0, "a": 1, "##b": 2}},
        {"type": "WordLevel", "vocab": {"<unk>": 0, "hello": 1}, "unk_token": "<unk>"}, {"type": "Unigram", "unk_id": 5, "vocab": [], "byte_fallback": True},
        {"type": "BPE", "dropout": 2.0, "unk_token": "x", "continuing_subword_prefix": "##", "end_of_word_suffix": "</w>", "fuse_unk": True, "byte_fallback": True,
         "ignore_merges": True, "vocab": {"a": 0, "b": 7}, "merges": [["a", "b"]]},
    ),
}  # fmt: skip
TEMPLATES = [
    "{{ messages[0].content }}", "{{ messages[7].content }}", "{{ raise_exception('no') }}", "{% for i in range(10**9) %}x{% endfor %}",
    "{{ 'a' * 10**10 }}", "{{ ''.__class__.__mro__ }}", "{{ messages.__class__ }}", "{% set ns = namespace(a=1) %}{{ ns.a }}", "{{ tools | tojson }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "{% generation %}x{% endgeneration %}", "{{ 10**100000 }}", "{{ messages | map('upper') | list }}",
    "{% include 'x' %}", "{{ bos_token + eos_token }}", "{{ undefined.x }}", "{% if", "{{ 1 / 0 }}", "{{ 'x'.format(1) }}", "{{ '%s' % (1, 2) }}",
    "{{ strftime_now('%Y') }}", "{{ strftime_now(5) }}", "{{ range(5) | batch(0) | list }}", "{{ 'a' | center(10**9) }}", "{{ lipsum(n=10**6) }}", "\x00",
    "{{ 9" + "9" * 5000 + " }}", "{{ messages[0]['content'] | indent(10**9) }}", "{{ " + "(" * 300 + "1" + ")" * 300 + " }}",
]  # fmt: skip
_FILES = {}


def prepare():
    """Write a tiny tokenizer's files, compact, and config.json for the end tokens."""
    for name, data in tiny_files.folder("llama").items():
        if name.endswith(".json"):
            _FILES[name] = json.dumps(json.loads(data)).encode()
    _FILES["generation_config.json"] = b'{"eos_token_id": [2, 4], "bos_token_id": 1}'


def make(m):
    files = dict(_FILES)
    if m.pristine:
        return files
    kind = m.below(20)
    tree = json.loads(files["tokenizer.json"])
    if kind < 9:
        if m.chance(0.5):
            part = m.pick(list(PARTS))
            tree[part] = json.loads(json.dumps(m.pick(PARTS[part])))
            if m.chance(0.4):
                tree[part] = m.tree(tree[part], WORDS, 1)
            files["tokenizer.json"] = m.dumps(tree, m.chance(0.5))
        else:
            files["tokenizer.json"] = m.json(files["tokenizer.json"], WORDS)
    elif kind < 14:
        config = json.loads(files["tokenizer_config.json"])
        config["added_tokens_decoder"] = {
            "0": {"content": "<unk>", "special": True},
            "267": {"content": "<new>", "special": True},
        }
        files["tokenizer_config.json"] = m.json(json.dumps(config), WORDS)
    elif kind < 16:
        name = m.pick(("special_tokens_map.json", "generation_config.json", "config.json"))
        files[name] = m.json(files[name], WORDS)
    else:
        template = (
            m.pick(TEMPLATES)
            if m.chance(0.6)
            else m.lines(tiny_files.CHATML, ["{%", "%}", "{{", "}}", "endfor"]).decode(
                "utf-8", "replace"
            )
        )
        where = m.below(4)
        if where == 0:
            files["chat_template.jinja"] = (
                template.encode() if m.chance(0.8) else m.bytes(template.encode())
            )
        elif where == 1:
            files["chat_template.json"] = json.dumps({"chat_template": template}).encode()
        else:
            config = json.loads(files["tokenizer_config.json"])
            config["chat_template"] = (
                template if where == 2 else [{"name": "default", "template": template}]
            )
            files["tokenizer_config.json"] = (
                m.json(json.dumps(config), WORDS) if m.chance(0.3) else json.dumps(config).encode()
            )
    return files


def use(files, folder):
    from pyloss.models.tokenizer import Tokenizer

    put_files(folder, files)
    tiny_files.exercise_tokenizer(Tokenizer.from_folder(folder))
