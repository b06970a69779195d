"""Checkpoints: resumed runs have the bits of uninterrupted ones; no file is left incomplete."""

import errno
import json
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from safetensors import numpy as safetensors_numpy
from safetensors.numpy import load_file
from tiny_training import Recorder, Tiny, run, samples, tiny_loss, tiny_value_and_grad

import pyloss
from pyloss import FormatError, nn, optim
from pyloss.io import files as file_writing
from pyloss.tuner.data.batching import iterate_batches
from pyloss.tuner.run import checkpoints as state, run_folder


@pytest.fixture(autouse=True)
def numpy_gradients(monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)


def scheduled():
    return optim.AdamW(
        optim.build_schedule({"name": "cosine_decay", "arguments": [0.05, 20], "warmup": 4})
    )


def same_model(one, two):
    for name, array in one.arrays.items():
        np.testing.assert_array_equal(array, two.arrays[name])


@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("stop", [5, 10, 13])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, stop, accumulation):
    """Several epochs, dropout, a schedule, unfinished accumulation, a report over the stop."""
    settings = {"steps_per_report": 3, "grad_accumulation_steps": accumulation, "keep_best": False}
    whole, seen, result = run(tmp_path / "whole", optimizer=scheduled(), iters=20, **settings)
    _, first, _ = run(tmp_path / "parts", optimizer=scheduled(), iters=stop, **settings)
    pyloss.random.seed(4711)
    resumed, second, again = run(
        tmp_path / "parts", Tiny(seed=77), scheduled(), iters=20, resume=True, **settings, seed=99
    )
    on_time = {i: value for i, value in first.losses.items() if i % 3 == 0}
    assert on_time | second.losses == seen.losses
    assert second.val_losses.items() <= seen.val_losses.items()
    assert second.train[-1]["trained_tokens"] == seen.train[-1]["trained_tokens"]
    assert second.train[-1]["learning_rate"] == seen.train[-1]["learning_rate"]
    assert again == result
    same_model(whole, resumed)


def test_the_best_adapter_and_patience_survive_a_resume(tmp_path):
    def run_one(folder, **settings):
        return run(folder, optimizer=optim.AdamW(0.5), steps_per_eval=2, **settings)

    whole, _, result = run_one(tmp_path / "whole", iters=30, patience=4)
    run_one(tmp_path / "parts", iters=result.iterations - 3, patience=4)
    resumed, _, again = run_one(tmp_path / "parts", iters=30, patience=4, resume=True)
    assert again == result
    assert result.stopped_early
    same_model(whole, resumed)


def test_the_best_adapter_of_a_run_that_ended_survives_a_resume_that_is_worse(tmp_path):
    """Only the end of the run caused its validation; a longer run has none there."""
    model, _, first = run(tmp_path, iters=6, steps_per_eval=100)
    assert first.best_iteration == 6
    kept = load_file(tmp_path / "best_adapters.safetensors")

    def rising(model, batch, lengths):
        value, count = tiny_loss(model, batch, lengths)
        return (value, count) if model.training else (value + 100, count)

    for iters in (9, 12):
        resumed, _, again = run(
            tmp_path, Tiny(seed=6), loss=rising, iters=iters, steps_per_eval=100, resume=True
        )
        assert (again.best_iteration, again.best_loss) == (6, first.best_loss)
        same_model(model, resumed)
        for file in ("adapters", "best_adapters"):
            saved = load_file(tmp_path / f"{file}.safetensors")
            for name, array in kept.items():
                np.testing.assert_array_equal(saved[name], array)


def test_a_run_at_its_end_says_that_nothing_is_left(tmp_path, capsys):
    whole, _, _ = run(tmp_path, iters=4)
    resumed, _, result = run(tmp_path, Tiny(seed=6), iters=3, resume=True, progress=True)
    assert (
        "3 batches of 2, 3 updates, and the run is at batch 4: nothing is left to train"
        in capsys.readouterr().out
    )
    assert result.iterations == 4
    same_model(whole, resumed)


def test_a_rate_of_its_own_for_lora_b_survives_a_resume(tmp_path, capsys):
    whole, _, _ = run(tmp_path / "whole", optimizer=scheduled(), iters=9, loraplus_lr_ratio=5.0)
    run(tmp_path / "parts", optimizer=scheduled(), iters=4, loraplus_lr_ratio=5.0)
    resumed, _, _ = run(
        tmp_path / "parts", Tiny(seed=6), scheduled(), iters=9, resume=True, loraplus_lr_ratio=5.0
    )
    same_model(whole, resumed)
    run(tmp_path / "parts", Tiny(seed=6), scheduled(), iters=9, resume=True, progress=True)
    assert "note: loraplus_lr_ratio is 1.0, and was 5.0 before" in capsys.readouterr().out


def test_a_resume_in_another_precision_is_said(tmp_path, capsys):
    run(tmp_path, iters=2)
    run(tmp_path, Tiny(seed=6), iters=4, resume=True, progress=True, matmul_precision="bfloat16")
    assert (
        "note: matmul_precision is 'bfloat16', and was 'float32' before" in capsys.readouterr().out
    )
    run(tmp_path, Tiny(seed=6), iters=6, resume=True, progress=True, matmul_precision="bfloat16")
    assert "note:" not in capsys.readouterr().out


def test_a_stateless_iterator_is_replayed(tmp_path):
    def generator(**options):
        yield from iterate_batches(**options)

    whole, seen, _ = run(tmp_path / "a", iters=20, val=None, iterate=generator)
    run(tmp_path / "b", iters=9, val=None, iterate=generator)
    resumed, second, _ = run(
        tmp_path / "b", Tiny(seed=5), iters=20, val=None, iterate=generator, resume=True
    )
    assert second.losses.items() <= seen.losses.items()
    same_model(whole, resumed)


@pytest.mark.parametrize("at", [1, 6, 8])
@pytest.mark.parametrize("where", ["loss", "report", "validation"])
def test_ctrl_c_saves_a_complete_state_and_says_where(tmp_path, at, where):
    calls = []

    def interrupt_at(number):
        calls.append(number)
        if len(calls) == at:
            # Random numbers drawn in an abandoned iteration must not affect later ones.
            pyloss.random.next_seed()
            raise KeyboardInterrupt

    def loss(model, batch, lengths):
        if where == ("loss" if model.training else "validation"):
            interrupt_at(0)
        return tiny_loss(model, batch, lengths)

    class Interrupting(Recorder):
        def on_train_loss_report(self, train_info):
            super().on_train_loss_report(train_info)
            if where == "report":
                interrupt_at(0)

    before = Interrupting()
    with pytest.raises(KeyboardInterrupt, match=rf"saved to {tmp_path / 'run'}; resume=True"):
        run(tmp_path / "run", loss=loss, callback=before)
    saved = state.load_checkpoint(tmp_path / "run")
    if saved.progress.iteration:
        adapter = load_file(tmp_path / "run" / "adapters.safetensors")
        for name, array in saved.model.items():
            np.testing.assert_array_equal(adapter[name], array)
    else:  # without training there is no adapter
        assert not (tmp_path / "run" / "adapters.safetensors").exists()

    after = Recorder()
    resumed, _, _ = run(tmp_path / "run", Tiny(seed=4), loss=tiny_loss, callback=after, resume=True)
    whole, seen, _ = run(tmp_path / "whole")
    assert before.losses | after.losses == seen.losses
    assert before.val_losses | after.val_losses == seen.val_losses
    same_model(whole, resumed)


def test_ctrl_c_while_a_run_ends_keeps_the_state_from_before(tmp_path):
    """The end reports, applies pending gradients and validates; a longer run would not."""

    def loss(model, batch, lengths):
        if not model.training and len(ended) == 5:
            raise KeyboardInterrupt
        ended.update({len(ended)} if model.training else {})
        return tiny_loss(model, batch, lengths)

    ended = set()
    settings = {"steps_per_report": 3, "grad_accumulation_steps": 2}
    before = Recorder()
    with pytest.raises(KeyboardInterrupt, match="after iteration 5"):
        run(tmp_path / "run", loss=loss, iters=5, callback=before, **settings)
    resumed, after, _ = run(tmp_path / "run", Tiny(seed=4), iters=12, resume=True, **settings)
    whole, seen, _ = run(tmp_path / "whole", iters=12, **settings)
    assert {3: before.losses[3]} | after.losses == seen.losses
    same_model(whole, resumed)


def test_sigint_while_things_change_waits_for_them(tmp_path):
    done = []
    with pytest.raises(KeyboardInterrupt), state.uninterrupted():
        signal.raise_signal(signal.SIGINT)
        done.append(1)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class Other(Tiny):
    adapter_config = Tiny.adapter_config | {"lora_parameters": {"rank": 2, "scale": 1.0}}


class Killer:
    """Kills the process at the `at`-th critical moment: within a file, and around renames."""

    def __init__(self, at):
        self.left = at
        self.save_file, self.write_bytes, self.replace = (
            safetensors_numpy.save_file,
            Path.write_bytes,
            os.replace,
        )

    def moment(self):
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    def half(self, path, data):
        self.write_bytes(path, data[: len(data) // 2])
        self.moment()
        return self.write_bytes(path, data)

    def install(self):
        def save_file(tensors, path, metadata=None):
            self.half(Path(path), safetensors_numpy.save(tensors, metadata))

        def replace(source, target):
            self.moment()
            self.replace(source, target)
            self.moment()

        safetensors_numpy.save_file, os.replace = save_file, replace
        Path.write_bytes = lambda path, data: self.half(path, data)


def killed_at(moment, folder, **settings):
    """Run in a forked process that is killed at that moment; False if it ended before."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            Killer(moment).install()
            run(folder, steps_per_save=2, steps_per_eval=3, iters=5, **settings)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0
    return status != 0


def check_files(folder):
    """Every file under its final name is complete, and the config describes the adapter."""
    for file in folder.glob("[!.]*adapters.safetensors"):
        assert set(load_file(file)) == set(Tiny().arrays)
    for file in folder.glob("[!.]*.json"):
        json.loads(file.read_text())
    if (folder / run_folder.STATE_FILE).exists():
        checkpoint = state.load_checkpoint(folder)
        assert checkpoint.optimizer["step"] == checkpoint.progress.iteration
        return True
    return False


def test_killed_at_every_moment_of_every_write(tmp_path):
    whole, seen, _ = run(tmp_path / "whole", steps_per_eval=3, iters=5)
    for moment in range(1, 1000):
        folder = tmp_path / str(moment)
        if not killed_at(moment, folder):
            break
        resumable = check_files(folder)
        resumed, rest, _ = (
            run(folder, Tiny(seed=8), steps_per_eval=3, iters=5, resume=resumable)
            if resumable
            else (whole, seen, 0)
        )
        assert rest.losses.items() <= seen.losses.items()
        same_model(whole, resumed)
    assert moment > 20


def test_killed_while_a_run_of_another_configuration_takes_its_place(tmp_path):
    """The config never lies with another config's adapter; the earlier adapter always exists."""
    run(tmp_path / "first", iters=2)
    old = load_file(tmp_path / "first" / "adapters.safetensors")
    config = (tmp_path / "first" / "adapter_config.json").read_text()
    for moment in range(1, 12):
        folder = tmp_path / str(moment)
        shutil.copytree(tmp_path / "first", folder)
        assert killed_at(moment, folder, model=Other(seed=3))
        check_files(folder)
        kept = [load_file(p) for p in folder.rglob("adapters.safetensors")]
        assert any(all(np.array_equal(old[n], one[n]) for n in old) for one in kept)
        adapter = folder / "adapters.safetensors"
        if adapter.exists() and all(
            np.array_equal(old[n], a) for n, a in load_file(adapter).items()
        ):
            assert (folder / "adapter_config.json").read_text() == config


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_full_disk_is_one_clear_error_and_the_last_save_stays(tmp_path, monkeypatch):
    folder = tmp_path / "run"
    run(folder, iters=5, val=None)
    before = files_of(folder)

    def full(*arguments):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def filling(model, batch, lengths):
        monkeypatch.setattr(file_writing.os, "fsync", full)
        return tiny_loss(model, batch, lengths)

    with pytest.raises(
        OSError, match=r"No space left on device.*trainer_state\.safetensors"
    ) as raised:
        run(folder, Tiny(), iters=12, resume=True, loss=filling, val=None)
    assert raised.value.errno == errno.ENOSPC
    after = files_of(folder)
    # Lines of reports are appended, and a resumed run drops those that are later than its state.
    assert after.pop("metrics.jsonl").startswith(before.pop("metrics.jsonl"))
    assert after == before


def test_a_folder_that_cannot_be_made_is_refused_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    calls = []
    with pytest.raises(OSError, match="cannot make the adapter folder.*file"):
        run(tmp_path / "file" / "run", loss=lambda *a: calls.append(a))
    assert not calls


def test_resuming_where_there_is_nothing_says_so(tmp_path):
    with pytest.raises(
        FileNotFoundError, match=r"nothing to resume: .*trainer_state.safetensors does not exist"
    ):
        run(tmp_path, resume=True)
    with pytest.raises(ValueError, match="resume=True needs an adapter_file"):
        run(None, resume=True)


def test_a_damaged_state_is_refused_with_its_name(tmp_path):
    run(tmp_path, iters=3)
    path = tmp_path / run_folder.STATE_FILE
    whole = path.read_bytes()
    for damaged in (whole[: len(whole) // 2], b"", whole[:5], b"\x00" * 100):
        path.write_bytes(damaged)
        with pytest.raises(
            FormatError, match=r"trainer_state\.safetensors.*not a readable trainer state"
        ):
            run(tmp_path, iters=5, resume=True)
    os.replace(tmp_path / "adapters.safetensors", path)
    with pytest.raises(FormatError, match="not a trainer state of this version"):
        run(tmp_path, iters=5, resume=True)


def test_a_run_of_another_kind_is_not_resumed(tmp_path):
    run(tmp_path, iters=3)
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match="trained with AdamW, not with SGD"):
        run(tmp_path, optimizer=optim.SGD(0.1), resume=True)
    with pytest.raises(ValueError, match="lora_parameters {'rank': 1, .*now {'rank': 2"):
        run(tmp_path, Other(), resume=True)
    wide = Tiny()
    wide.arrays["layers.0.lora_b"] = np.zeros((3, 5), np.float32)
    with pytest.raises(
        ValueError, match=r"'layers.0.lora_b' has shape \(3, 11\), but \(3, 5\) in the model"
    ):
        run(tmp_path, wide, resume=True)
    del wide.arrays["layers.0.lora_b"]
    with pytest.raises(ValueError, match="1 parameters are in one only, first 'layers.0.lora_b'"):
        run(tmp_path, wide, resume=True)
    with pytest.raises(ValueError, match="other data, batch size or window"):
        run(tmp_path, data=samples(6), resume=True)
    assert files_of(tmp_path) == before


def test_resuming_from_another_folder(tmp_path):
    whole, seen, _ = run(tmp_path / "a", iters=12)
    run(tmp_path / "b", iters=6)
    resumed, second, _ = run(tmp_path / "c", Tiny(seed=3), iters=12, resume=tmp_path / "b")
    assert second.losses.items() <= seen.losses.items()
    same_model(whole, resumed)
    assert (tmp_path / "c" / run_folder.STATE_FILE).exists()


def test_settings_that_differ_are_told(tmp_path, capsys):
    run(tmp_path, iters=3)
    run(tmp_path, optimizer=optim.AdamW(0.01), iters=4, resume=True, progress=True)
    said = capsys.readouterr().out
    assert "resuming after iteration 3" in said
    assert "note: learning_rate is 0.01, and was 0.05 before" in said


def test_the_folder_has_mlx_lms_layout(tmp_path):
    run(tmp_path, iters=10)
    names = {path.name for path in tmp_path.iterdir()}
    wanted = {
        "adapters.safetensors",
        "adapter_config.json",
        "0000005_adapters.safetensors",
        "0000010_adapters.safetensors",
    }
    assert names == wanted | {
        "best_adapters.safetensors",
        "metrics.jsonl",
        "trainer_state.safetensors",
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text()) == Tiny.adapter_config


def test_nested_state_comes_back_as_it_was(tmp_path):
    tree = {
        "a": [1, {"b": np.arange(3, dtype=np.uint64)}],
        "big": 2**127,
        "text": "x",
        "none": None,
        "pi": 0.1,
    }
    progress = state.Progress(iteration=3, loss_sum=0.1 + 0.2, best_loss=1 / 3)
    saved = state.Checkpoint(
        progress, {"w": np.ones((2, 2), np.float32)}, {"step": 1}, "SGD", {}, {}, tree, None, {}
    )
    state.save_checkpoint(tmp_path / "x.safetensors", saved)
    loaded = state.load_checkpoint(tmp_path / "x.safetensors")
    assert loaded.progress == progress
    array = loaded.random["a"][1].pop("b")
    np.testing.assert_array_equal(array, tree["a"][1].pop("b"))
    assert array.dtype == np.uint64
    assert loaded.random == tree
