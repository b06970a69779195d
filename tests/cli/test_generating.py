"""`generate`."""

import sys

import pyloss
from pyloss.cli import main


def test_generate_streams_the_answer(world, capsys, monkeypatch):
    argv = [
        "generate",
        "--prompt",
        "Hi\\nyou",
        "--system-prompt",
        "Be",
        "--prefill-response",
        "Well",
        "--temp",
        "0.5",
    ]
    assert (
        main([*argv, "--seed", "3", "-m", "7", "--extra-eos-token", "<|im_start|>", "--top-k", "4"])
        == 0
    )
    out, err = capsys.readouterr()
    assert out == "Hello\n"
    assert "generation 8.0 tokens/s, ended by stop" in err
    prompt, options, ends = world.generated
    assert prompt.startswith(
        "<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nHi\nyou<|im_end|>"
    )
    assert prompt.endswith("<|im_start|>assistant\nWell")
    expected = {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 1.0,
        "min_p": 0.0,
        "top_k": 4,
        "seed": 3,
    }
    assert options == expected
    assert ends == {256, 257}
    monkeypatch.setattr(sys, "stdin", __import__("io").StringIO("from a pipe"))
    assert main(["generate", "--prompt", "-", "--ignore-chat-template", "--verbose", "F"]) == 0
    assert world.generated[0] == "from a pipe"
    assert capsys.readouterr().err == ""


def test_products_are_in_the_precision_of_the_flag(world, monkeypatch, capsys):
    seen, module = [], sys.modules["pyloss.generation"]
    answer = module.stream_generate

    def noted(*arguments, **options):
        seen.append(pyloss.get_matmul_precision())
        return answer(*arguments, **options)

    monkeypatch.setattr(module, "stream_generate", noted)
    for flags in (["--matmul-precision", "int8"], []):
        assert main(["generate", *flags]) == 0
    assert seen == ["int8", "float32"] and pyloss.get_matmul_precision() == "float32"
    capsys.readouterr()
    assert main(["generate", "--matmul-precision", "int4"]) == 2
    assert "matmul precision is 'int4'; it must be one of float32, bfloat16, mixed, int8" in (
        capsys.readouterr().err
    )
