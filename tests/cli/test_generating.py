"""`generate`."""

import sys

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
