"""Models by names: Ollama's store, and GGUF files of a hub that a local server stands in for."""

import hashlib
import json
import re

import pytest
import tiny
from hub_server import hub, run_with

from pyloss import FormatError
from pyloss.models import load_model, resolve_model

# ---- Ollama's store


def put(store, name, content, kind="application/vnd.ollama.image.model"):
    """A model as `ollama create` stores it."""
    digest = hashlib.sha256(content).hexdigest()
    (store / "blobs").mkdir(parents=True, exist_ok=True)
    blob = store / "blobs" / f"sha256-{digest}"
    blob.write_bytes(content)
    manifest = store / "manifests" / name
    manifest.parent.mkdir(parents=True, exist_ok=True)
    layers = [
        {"mediaType": kind, "digest": f"sha256:{digest}", "size": len(content)},
        {"mediaType": "application/vnd.ollama.image.template", "digest": "sha256:" + "0" * 64},
    ]
    manifest.write_text(json.dumps({"schemaVersion": 2, "layers": layers}))
    return blob


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("OLLAMA_MODELS", str(tmp_path / "store"))
    return tmp_path / "store"


def test_a_model_of_ollama(store, tmp_path, monkeypatch):
    tiny.write_gguf(tmp_path / "m.gguf", format="Q8_0", vocab_size=tiny.TOKENS)
    content = (tmp_path / "m.gguf").read_bytes()
    blob = put(store, "registry.ollama.ai/library/qwen3/0.6b", content)
    assert resolve_model("ollama:qwen3:0.6b") == blob
    assert load_model("ollama:qwen3:0.6b").config.hidden_size == 32
    latest = put(store, "registry.ollama.ai/library/qwen3/latest", b"another")
    assert resolve_model("ollama:qwen3") == latest
    own = put(store, "registry.ollama.ai/me/tuned/v1", b"mine")
    assert resolve_model("ollama:me/tuned:v1") == own
    hub_model = put(store, "hf.co/some/model/Q4_K_M", b"from the hub")
    assert resolve_model("ollama:hf.co/some/model:Q4_K_M") == hub_model
    # without the variable it is the user's
    monkeypatch.delenv("OLLAMA_MODELS")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    at_home = put(tmp_path / "home" / ".ollama" / "models", "registry.ollama.ai/library/a/1", b"a")
    assert resolve_model("ollama:a:1") == at_home


def test_models_that_ollama_does_not_have(store):
    with pytest.raises(FileNotFoundError, match=r"no model 'a' in .*store.*`ollama pull a` gets"):
        resolve_model("ollama:a")
    put(store, "registry.ollama.ai/library/qwen3/0.6b", b"x")
    put(store, "registry.ollama.ai/me/tuned/v1", b"y")
    with pytest.raises(FileNotFoundError, match="there are me/tuned:v1, qwen3:0.6b"):
        resolve_model("ollama:qwen3:8b")
    for name in ("", "../x", "a//b", "a/b/c/d", "a:b/c", "a:..:"):
        with pytest.raises(FileNotFoundError, match="a model of Ollama is named ollama:name:tag"):
            resolve_model(f"ollama:{name}")


def test_damaged_stores(store):
    blob = put(store, "registry.ollama.ai/library/a/1", b"x")
    blob.unlink()
    with pytest.raises(FileNotFoundError, match="this file of Ollama's store is missing"):
        resolve_model("ollama:a:1")
    put(store, "registry.ollama.ai/library/a/2", b"x", "application/vnd.ollama.image.adapter")
    with pytest.raises(FormatError, match="the model has an adapter"):
        resolve_model("ollama:a:2")
    manifest = store / "manifests" / "registry.ollama.ai" / "library" / "a" / "3"
    layer = {"mediaType": "application/vnd.ollama.image.model", "digest": "sha256:../../etc/passwd"}
    for content, message in (
        ("[", "JSON"),
        ("{}", "expected a list of objects"),
        ('{"layers": []}', "expected one layer"),
        (json.dumps({"layers": [layer]}), "not a sha256 digest"),
    ):
        manifest.write_text(content)
        with pytest.raises(FormatError, match=message):
            resolve_model("ollama:a:3")


# ---- the hub

LOADED = "import pyloss.models as m; print(m.load_model({!r}).config.hidden_size)"
FOUND = "import pyloss.models as m; print(m.resolve_model({!r}).name)"


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    pytest.importorskip("huggingface_hub", reason="downloads by huggingface_hub (hub extra)")
    root = tmp_path_factory.mktemp("hub")
    folder = root / "some" / "model-GGUF"
    folder.mkdir(parents=True)
    tiny.write_gguf(folder / "model-Q4_K_M.gguf", format="Q8_0", vocab_size=tiny.TOKENS)
    for name in ("model-Q4_K_S", "model-q8_0", "model-Q2_K", "mmproj-Q4_K_M", "a.Q6_K", "b.Q6_K"):
        (folder / f"{name}.gguf").write_bytes(b"GGUF " + name.encode())
    for i in (1, 2):
        (folder / f"model-F16-0000{i}-of-00002.gguf").write_bytes(b"GGUF part")
    (folder / "README.md").write_text("a model")
    return root


def test_a_quantization_of_a_repository(repositories, tmp_path):
    name = "some/model-GGUF:Q4_K_M"
    with hub(repositories) as server:
        code, out, err = run_with(server, tmp_path / "cache", LOADED.format(name))
        assert (code, out) == (0, "32"), err
        files = {path for method, path in server.asked if method == "GET" and "/resolve/" in path}
        assert {path.rpartition("/")[2] for path in files} <= {
            "model-Q4_K_M.gguf", "mmproj-Q4_K_M.gguf",
        }  # fmt: skip
        for given, file in (
            ("some/model-GGUF:q8_0", "model-q8_0.gguf"),
            ("some/model-GGUF:Q8_0", "model-q8_0.gguf"),
            ("some/model-GGUF:F16", "model-F16-00001-of-00002.gguf"),
            ("hf:some/model-GGUF/model-Q2_K.gguf", "model-Q2_K.gguf"),
            ("hf:some/model-GGUF/model-F16-00002-of-00002.gguf", "model-F16-00001-of-00002.gguf"),
        ):
            code, out, err = run_with(server, tmp_path / "cache", FOUND.format(given))
            assert (code, out) == (0, file), err
        asked = len(server.asked)
        code, out, err = run_with(
            server, tmp_path / "cache", LOADED.format(name), HF_HUB_OFFLINE="1"
        )
        assert (code, out) == (0, "32"), err
        assert len(server.asked) == asked  # offline, the cache is enough


def test_names_that_the_hub_does_not_have(repositories, tmp_path):
    with hub(repositories) as server:
        for given, message in (
            ("some/model-GGUF:Q3_K_M", "no such file; some/model-GGUF has .*model-Q4_K_M.gguf"),
            ("some/model-GGUF:Q6_K", "names several models: a.Q6_K.gguf, b.Q6_K.gguf; give one"),
            ("hf:some/model-GGUF/none.gguf", "no such file; some/model-GGUF has"),
            ("some/none:Q4_K_M", "the hub did not give it"),
        ):
            code, _, err = run_with(server, tmp_path / "cache", FOUND.format(given))
            assert code == 1 and "FileNotFoundError" in err
            assert re.search(message, err), err


@pytest.mark.parametrize("name", ["hf:a", "hf:a/b", "hf:a/b/c.bin", "hf:/b/c.gguf"])
def test_files_of_the_hub_have_three_parts(name):
    with pytest.raises(FileNotFoundError, match="is named hf:owner/name/file.gguf"):
        resolve_model(name)
