"""Earlier outputs are set aside as whole sets, one folder each, and restored if writing fails."""

import logging
import os

import pytest
import tiny
from safetensors.numpy import load_file

import pyloss
from pyloss.io import outputs
from pyloss.io.locks import locked
from pyloss.models.saving import save_model
from pyloss.tuner import linear_to_lora_layers, save_adapter


def write(folder, **contents):
    folder.mkdir(exist_ok=True)
    for name, text in contents.items():
        (folder / name).write_text(text)


def tree(folder):
    return {
        str(path.relative_to(folder)): path.read_text()
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_sets_are_kept_one_folder_each_and_none_is_lost(tmp_path):
    for number in ("one", "two", "three"):
        write(tmp_path, a=number, b=number, other="mine")
        outputs.set_aside(tmp_path, ["a", "missing"], ["b"])
    assert tree(tmp_path) == {
        "previous-1/a": "one", "previous-1/b": "one", "previous-2/a": "two", "previous-2/b": "two",
        "previous-3/a": "three", "previous-3/b": "three", "b": "three", "other": "mine",
    }  # fmt: skip
    assert outputs.set_aside(tmp_path, ["a"], ["b"]) is None


def test_numbers_rise_although_one_was_removed(tmp_path):
    write(tmp_path, a="x")
    write(tmp_path / "previous-7", a="old")
    write(tmp_path / "previous-run", a="a user's")
    assert outputs.set_aside(tmp_path, ["a"]).name == "previous-8"


def test_what_a_killed_process_began_is_finished(tmp_path):
    write(tmp_path, b="one")
    write(tmp_path / "previous-1.part", a="one")
    assert outputs.set_aside(tmp_path, ["a", "b"]).name == "previous-1"
    assert tree(tmp_path) == {"previous-1/a": "one", "previous-1/b": "one"}
    # It never overwrites files that are already set aside.
    write(tmp_path, a="two")
    write(tmp_path / "previous-2.part", a="another")
    outputs.set_aside(tmp_path, ["a", "b"])
    assert tree(tmp_path).items() >= {"previous-2.part/a": "another", "previous-3/a": "two"}.items()


def test_links_mean_what_they_meant(tmp_path):
    write(tmp_path, far="content")
    write(tmp_path / "in")
    (tmp_path / "in" / "link").symlink_to("../far")
    (tmp_path / "in" / "whole").symlink_to(tmp_path / "far")
    with pytest.raises(ZeroDivisionError), outputs.output(tmp_path / "in", ["link", "whole"]):
        assert (tmp_path / "in" / "previous-1" / "link").read_text() == "content"
        1 / 0  # noqa: B018
    assert os.readlink(tmp_path / "in" / "link") == "../far"
    assert (
        outputs.set_aside(tmp_path / "in", ["link", "whole"]).joinpath("link").read_text()
        == "content"
    )
    assert (tmp_path / "far").read_text() == "content"


def test_an_output_that_fails_leaves_all_as_it_was(tmp_path):
    write(tmp_path / "out", a="old", b="old")
    with pytest.raises(ZeroDivisionError), outputs.output(tmp_path / "out", ["a", "b"]):
        (tmp_path / "out" / "a").write_text("half")
        1 / 0  # noqa: B018
    assert tree(tmp_path) == {"out/a": "old", "out/b": "old"}
    with pytest.raises(KeyboardInterrupt), outputs.output(tmp_path / "out" / "a", overwrite=True):
        raise KeyboardInterrupt
    assert tree(tmp_path) == {"out/a": "old", "out/b": "old"}


def test_folders_that_were_made_for_nothing_go(tmp_path):
    new = tmp_path / "new" / "deep"
    with pytest.raises(ZeroDivisionError), outputs.output(new, ["a"]):
        (new / "a").write_text("half")
        (new / "a").unlink()
        1 / 0  # noqa: B018
    with pytest.raises(KeyboardInterrupt), outputs.output(new / "a"):
        raise KeyboardInterrupt
    assert not list(tmp_path.iterdir())
    # What was there stays, and so does what holds a file.
    (tmp_path / "there").mkdir()
    with pytest.raises(ZeroDivisionError), outputs.output(tmp_path / "there" / "new", ["a"]):
        (tmp_path / "there" / "mine").write_text("mine")
        1 / 0  # noqa: B018
    with pytest.raises(ZeroDivisionError), outputs.output(new, ["a"]):
        (tmp_path / "new" / "mine").write_text("mine")
        1 / 0  # noqa: B018
    assert tree(tmp_path) == {"there/mine": "mine", "new/mine": "mine"} and not new.exists()


def test_a_file_and_being_told_to_replace_it(tmp_path, caplog):
    path = tmp_path / "deep" / "x.gguf"
    with caplog.at_level(logging.INFO, "pyloss"):
        for text, overwrite in (("one", False), ("two", False), ("three", True)):
            with outputs.output(path, overwrite=overwrite):
                path.write_text(text)
    assert tree(tmp_path / "deep") == {"x.gguf": "three", "previous-1/x.gguf": "one"}
    assert [record.getMessage() for record in caplog.records] == [
        f"kept what was there before (x.gguf) in {path.parent / 'previous-1'}"
    ]
    with (
        pytest.raises(IsADirectoryError, match="is a folder: give the name of a file"),
        outputs.output(tmp_path / "deep"),
    ):
        pass


def test_one_writer_at_a_time(tmp_path):
    with locked(tmp_path):
        with pytest.raises(
            BlockingIOError, match=rf"another run is writing here: process {os.getpid()} on "
        ):
            with outputs.output(tmp_path, ["a"]):
                pass
        # A lock on a folder does not cover files in it.
        with outputs.output(tmp_path / "a"), outputs.output(tmp_path / "b"):
            with pytest.raises(BlockingIOError), outputs.output(tmp_path / "a"):
                pass
    assert tree(tmp_path) == {}


@pytest.fixture
def model(tmp_path):
    model = tiny.load_tiny(tmp_path / "model", vocab_size=tiny.TOKENS)
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0})
    return model


def test_a_model_is_kept_whole_and_shards_do_not_mix(model, tmp_path):
    folder = tmp_path / "fused"
    write(folder, **{"model-00001-of-00002.safetensors": "shard", "model.safetensors.index.json": "index", "README.md": "mine",
                     "config.json": "theirs", "tokenizer.json": "old"})  # fmt: skip
    model.fuse()
    model.save(folder)
    kept = {path.name for path in (folder / "previous-1").iterdir()}
    assert kept == {
        "model-00001-of-00002.safetensors",
        "model.safetensors.index.json",
        "config.json",
    }
    assert {path.name for path in folder.iterdir()} == {
        "model.safetensors", "config.json", "README.md", "tokenizer.json", "previous-1",
    }  # fmt: skip
    first = (folder / "model.safetensors").read_bytes()
    save_model(model, folder, overwrite=True)
    assert not (folder / "previous-2").exists()
    # Overwrite the files that the model itself is mapped from.
    again = pyloss.load_model(folder)
    again.save(folder)
    assert (
        (folder / "previous-2" / "model.safetensors").read_bytes()
        == first
        == (folder / "model.safetensors").read_bytes()
    )


def test_a_model_that_is_refused_touches_nothing(model, tmp_path):
    write(tmp_path / "fused", **{"config.json": "theirs"})
    with pytest.raises(ValueError, match="unfused adapters"):
        model.save(tmp_path / "fused")
    assert tree(tmp_path / "fused") == {"config.json": "theirs"}


@pytest.mark.parametrize(
    ("to", "file"), [("mlx", "adapters.safetensors"), ("peft", "adapter_model.safetensors")]
)
def test_adapters_are_kept_with_all_files_of_their_run(model, tmp_path, to, file):
    folder = tmp_path / "adapters"
    save_adapter(model, folder, to)
    run = {
        "0000100_adapters.safetensors": "hundred",
        "trainer_state.safetensors": "state",
        "notes.txt": "mine",
    }
    write(folder, **run)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    pyloss.export(model, folder, "peft" if to == "mlx" else "mlx")
    kept = {path.name: path.read_bytes() for path in (folder / "previous-1").iterdir()}
    assert kept == {name: data for name, data in before.items() if name != "notes.txt"}
    assert len(list(folder.iterdir())) == 4 and (folder / "notes.txt").exists()
    pyloss.export(model, folder, to, overwrite=True)
    assert set(load_file(folder / file)) and not (folder / "previous-2").exists()


def test_gguf_files_are_kept(model, tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "lora.gguf"
    path.write_text("theirs")
    pyloss.export(model, path, "gguf", adapter_only=True)
    assert (tmp_path / "previous-1" / "lora.gguf").read_text() == "theirs" and path.read_bytes()[
        :4
    ] == b"GGUF"
    pyloss.export(model, path, "gguf", tiny.byte_tokenizer(), type="f16")
    assert (tmp_path / "previous-2" / "lora.gguf").read_bytes()[:4] == b"GGUF"
    pyloss.export(model, path, "gguf", adapter_only=True, overwrite=True)
    assert not (tmp_path / "previous-3").exists()
