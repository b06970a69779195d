"""Training scripts in the manner of public ones: the same losses under mlx-lm and under pyloss.

The scripts of `mlx_scripts` are written for mlx-lm. Four textual substitutions in their imports are
all that changes.
"""

import sys

import numpy as np
import pytest
import script_runs
import tiny

from pyloss.models import load_model

mx = pytest.importorskip("mlx.core", reason="compares with mlx (parity extra)")
pytest.importorskip("mlx_lm", reason="compares with mlx-lm (parity extra)")

SIZES = {"vocab_size": tiny.TOKENS, "hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
TEMPLATE = (
    "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"
    "{% if add_generation_prompt %}<s>assistant: {% endif %}"
)


def calm(arrays):
    """The embedding is the head, too: with smaller logits, losses begin near those of chance."""
    arrays["model.embed_tokens.weight"] *= 0.2


@pytest.fixture(scope="module")
def room(tmp_path_factory):
    """A model, a teacher of another depth, data, and an adapter to begin with."""
    folder = tmp_path_factory.mktemp("room")
    tokenizer = tiny.byte_tokenizer()
    tokenizer.chat_template = TEMPLATE
    for seed, (name, layers) in enumerate({"model": 2, "teacher": 3}.items()):
        tiny.write_folder(
            folder / f"plain-{name}", seed, num_hidden_layers=layers, change=calm, **SIZES
        )
        load_model(folder / f"plain-{name}").save(folder / name, tokenizer)
    script_runs.write_room(folder)
    mx.disable_compile()  # the compiler of mlx-cpu takes longer than these models
    yield folder
    mx.enable_compile()


def same(found, expected, at=""):
    """Compare what scripts return: numbers nearly, anything else exactly."""
    if isinstance(expected, dict):
        assert list(found) == list(expected), at
        for key in expected:
            same(found[key], expected[key], f"{at}.{key}")
    elif isinstance(expected, (list, tuple)):
        assert len(found) == len(expected), at
        for i, pair in enumerate(zip(found, expected, strict=True)):
            same(*pair, f"{at}[{i}]")
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=1e-3, abs=1e-5), at
    else:
        assert found == expected, at


@pytest.mark.parametrize("name", script_runs.NAMES)
def test_losses(room, tmp_path, monkeypatch, name):
    expected = script_runs.run(name, room / "model", tmp_path / "theirs")
    for module in [m for m in sys.modules if m.split(".")[0] in ("mlx", "mlx_lm")]:
        monkeypatch.setitem(sys.modules, module, None)  # importing it fails
    found = script_runs.run_ported(name, room / "model", tmp_path / "ours")
    assert len(expected["losses"]) >= 10
    assert np.ptp(expected["losses"]) > 0.01  # the updates had an effect
    np.testing.assert_allclose(found["losses"], expected["losses"], rtol=1e-4, atol=1e-5)
    assert found["tokens"] == pytest.approx(expected["tokens"], abs=1)
    same(found.get("more"), expected.get("more"))
    # pyloss's runs leave a log and an adapter_config.json, too
    assert files(tmp_path / "theirs") <= files(tmp_path / "ours")


def files(folder):
    return {path.name for path in folder.iterdir()} if folder.exists() else set()


def test_substitutions():
    """Each import is changed once, names in the middle of words are not."""
    text = "import mlx.core as mx\nfrom mlx_lm import load\nfrom mlx.utils import tree_map\n"
    assert script_runs.ported(text) == (
        "import pyloss.mlx.core as mx\nfrom pyloss.mlx_lm import load\n"
        "from pyloss.mlx.utils import tree_map\n"
    )
    for name in script_runs.NAMES:
        changed = script_runs.ported((script_runs.SCRIPTS / f"{name}.py").read_text("utf-8"))
        assert "from mlx" not in changed and "import mlx" not in changed, name
