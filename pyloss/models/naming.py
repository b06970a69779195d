"""Models by names: in Ollama's store on disk, and GGUF files on the hub."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pyloss.errors import FormatError
from pyloss.io.files import read_json, user_path

# owner/name:Q4_K_M; a quantization's name has no slash and no dot.
_QUANTIZED = re.compile(r"([\w.-]+/[\w.-]+):([\w-]+)")
_PART = re.compile(r"(.*)-\d{5}-of-(\d{5})\.gguf")
_MODEL_LAYER = "application/vnd.ollama.image.model"


def named_file(text: str, revision: str | None) -> Path | None:
    """The GGUF file of `ollama:name:tag`, `hf:owner/name/file.gguf` or `owner/name:Q4_K_M`.

    None for other names. Of a split model it is the first file; all are downloaded.

    Raises FileNotFoundError that names what there is.
    """
    if text.startswith("ollama:"):
        return ollama_file(text.removeprefix("ollama:"))
    if text.startswith("hf:"):
        parts = text.removeprefix("hf:").split("/", 2)
        if len(parts) == 3 and all(parts) and parts[2].endswith(".gguf"):
            part = _PART.fullmatch(parts[2])
            pattern = f"{part[1]}-*-of-{part[2]}.gguf" if part else parts[2]
            found = _hub_files("/".join(parts[:2]), revision, [pattern])
            return _one(text, found, "/".join(parts[:2]), revision)
        raise FileNotFoundError(f"{text!r}: a file on the hub is named hf:owner/name/file.gguf")
    if (match := _QUANTIZED.fullmatch(text)) is None:
        return None
    repository, kind = match[1], match[2]
    spelled = dict.fromkeys((kind, kind.upper(), kind.lower()))
    patterns = [
        form.format(name)
        for name in spelled
        for form in ("{0}.gguf", "*[-._/]{0}.gguf", "*[-._/]{0}-*-of-*.gguf", "*{0}/*.gguf")
    ]
    return _one(text, _hub_files(repository, revision, patterns), repository, revision)


def _hub_files(repository: str, revision: str | None, patterns: list[str]) -> list[Path]:
    """The files of a repository that match, downloaded or in the cache."""
    folder = hub_folder(repository, revision, patterns)
    wanted = [re.compile(_expression(pattern)) for pattern in patterns]
    return sorted(
        path
        for path in folder.rglob("*.gguf")
        if any(form.fullmatch(path.relative_to(folder).as_posix()) for form in wanted)
        and "mmproj" not in path.name
    )


def _expression(pattern: str) -> str:
    """The regular expression of a pattern whose `*` also stands for slashes."""
    escaped = re.escape(pattern).replace(r"\*", ".*")
    return escaped.replace(r"\[\-\._/\]", "[-._/]")


def _one(text: str, found: list[Path], repository: str, revision: str | None) -> Path:
    """The single model among files: one file, or the first of a split model's."""
    models: dict[str, Path] = {}
    for path in found:
        part = _PART.fullmatch(path.name)
        models.setdefault(part[1] if part else path.name, path)
    if len(models) == 1:
        return next(iter(models.values()))
    if models:
        raise FileNotFoundError(
            f"{text!r} names several models: {', '.join(path.name for path in models.values())}; "
            f"give one as hf:{repository}/FILE"
        )
    raise FileNotFoundError(f"{text!r}: no such file; {_listed(repository, revision)}")


def _listed(repository: str, revision: str | None) -> str:
    """What GGUF files the hub has."""
    from huggingface_hub import list_repo_files

    try:
        names = [name for name in list_repo_files(repository, revision=revision) if _is_gguf(name)]
    except Exception as error:  # the library's many types, see `hub_folder`
        return f"the files of {repository} are not known: {error}"
    return f"{repository} has " + (", ".join(names) if names else "no GGUF files")


def _is_gguf(name: str) -> bool:
    return name.endswith(".gguf")


def hub_folder(name: str, revision: str | None, files: Iterable[str]) -> Path:
    """The folder of a repository's files that match the patterns, downloaded or in the cache.

    Raises FileNotFoundError with the hub's reason.
    """
    try:
        from huggingface_hub import snapshot_download
    except ImportError:
        raise FileNotFoundError(
            f"no folder {name!r} here, and models of the hub need: pip install 'pyloss[hub]'"
        ) from None
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(files)))
    # The library has many types for errors of network, missing repository and permissions.
    except Exception as error:
        raise FileNotFoundError(
            f"no folder {name!r} here, and the hub did not give it: {error}"
        ) from error


def name_of(place: Path) -> str:
    """The last name of a path, without a GGUF file's suffix; of the hub's cache owner/name."""
    place = place.absolute()
    for folder in place.parents:
        if folder.name.startswith("models--") and (folder / "snapshots") in place.parents:
            return folder.name.removeprefix("models--").replace("--", "/")
    return place.name.removesuffix(".gguf")


def ollama_file(name: str) -> Path:
    """The GGUF file of a model in Ollama's store; `name` is as for `ollama run`.

    The store is the folder OLLAMA_MODELS, or the user's or the service's.

    Raises:
        FileNotFoundError: no such model or file, with the models that there are.
        FormatError: a damaged manifest, or a model that consists of more than one file.
    """
    path, _, tag = name.partition(":")
    parts = path.split("/")
    if not all(re.fullmatch(r"[\w.-]+", part) and part not in (".", "..") for part in parts) or (
        not 1 <= len(parts) <= 3 or not re.fullmatch(r"[\w.-]*", tag)
    ):
        raise FileNotFoundError(f"'ollama:{name}': a model of Ollama is named ollama:name:tag")
    host = [*(["registry.ollama.ai"] if len(parts) < 3 else []), *(["library"] * (len(parts) == 1))]
    stores = _ollama_stores()
    for store in stores:
        manifest = store.joinpath("manifests", *host, *parts, tag or "latest")
        if manifest.is_file():
            return _blob(store, manifest)
    there = sorted({model for store in stores for model in _ollama_models(store)})
    raise FileNotFoundError(
        f"no model {name!r} in Ollama's store ({', '.join(map(str, stores))}); "
        + (f"there are {', '.join(there)}" if there else f"`ollama pull {name}` gets it")
    )


def _ollama_stores() -> list[Path]:
    given = os.environ.get("OLLAMA_MODELS")
    if given:
        return [user_path(given)]
    return [user_path("~/.ollama/models"), Path("/usr/share/ollama/.ollama/models")]


def _ollama_models(store: Path) -> list[str]:
    """The names of the models in a store, as `ollama list` shows them."""
    root = store / "manifests"
    names = []
    for path in root.glob("*/*/*/*"):
        *parts, tag = path.relative_to(root).parts
        if parts[0] == "registry.ollama.ai":
            parts = parts[2:] if parts[1] == "library" else parts[1:]
        names.append(f"{'/'.join(parts)}:{tag}")
    return names


def _blob(store: Path, manifest: Path) -> Path:
    """The file that a manifest names as the model."""
    layers: Any = read_json(manifest).get("layers")
    if not isinstance(layers, list) or not all(isinstance(layer, dict) for layer in layers):
        raise FormatError(manifest, "layers", "expected a list of objects")
    kinds = [layer.get("mediaType") for layer in layers]
    if any(kind == "application/vnd.ollama.image.adapter" for kind in kinds):
        raise FormatError(manifest, "layers", "the model has an adapter: give its base")
    digests = [layer.get("digest") for layer in layers if layer.get("mediaType") == _MODEL_LAYER]
    if len(digests) != 1:
        raise FormatError(
            manifest, "layers", f"expected one layer {_MODEL_LAYER}, found {len(digests)}"
        )
    if not isinstance(digests[0], str) or not re.fullmatch(r"sha256:[0-9a-f]{64}", digests[0]):
        raise FormatError(manifest, "digest", f"not a sha256 digest: {digests[0]!r:.80}")
    blob = store / "blobs" / digests[0].replace(":", "-")
    if not blob.is_file():
        raise FileNotFoundError(f"{blob}: this file of Ollama's store is missing ({manifest})")
    return blob
