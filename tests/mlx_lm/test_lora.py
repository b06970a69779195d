"""mlx_lm.lora's settings and runs, where pyloss says more than mlx-lm."""

import json
import types

import pytest

from pyloss.errors import FormatError
from pyloss.mlx_lm import load, lora
from pyloss.mlx_lm.tuner import trainer
from pyloss.mlx_lm.tuner.callbacks import TrainingCallback


def flags(*words):
    return vars(lora.build_parser().parse_args([str(word) for word in words]))


def test_flags_then_the_file_then_defaults(tmp_path, caplog):
    file = tmp_path / "lora.yaml"
    file.write_text(
        "iters: 7\nbatch_size: 3\nlearning_rate: 1e-4\nno_such_key: 1\nhf_dataset: null\n"
    )
    found = lora.settings_of(flags("-c", file, "--batch-size", 5))
    assert (found.batch_size, found.iters, found.learning_rate) == (5, 7, 1e-4)
    assert found.val_batches == lora.CONFIG_DEFAULTS["val_batches"] and found.no_such_key == 1
    (record,) = caplog.records
    assert "does not have the keys no_such_key, which are ignored" in record.getMessage()


def test_a_file_without_other_keys_warns_of_nothing(tmp_path, caplog):
    file = tmp_path / "lora.yaml"
    file.write_text(
        "train: true\nprompt_feature: q\nlora_parameters: {rank: 2, scale: 1.0, dropout: 0}\n"
    )
    assert lora.settings_of(flags("-c", file)).train is True and not caplog.records


def settings(made, tmp_path, **options):
    given = {
        "model": str(made / "base"),
        "data": str(made / "data"),
        "train": True,
        "num_layers": 1,
    }
    given |= {
        "batch_size": 2,
        "iters": 3,
        "steps_per_report": 1,
        "adapter_path": str(tmp_path / "new"),
    }
    return types.SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **given, **options})


class Kept(TrainingCallback):
    def __init__(self):
        self.losses = []

    def on_train_loss_report(self, train_info):
        self.losses.append(train_info["train_loss"])


def test_the_given_callback_and_services_both_get_reports(made, tmp_path):
    kept = Kept()
    lora.run(settings(made, tmp_path, report_to="csv"), kept)
    assert len(kept.losses) == 3
    rows = (tmp_path / "new" / "metrics.csv").read_text().splitlines()
    assert [row.partition(",")[0] for row in rows[-3:]] == ["1", "2", "3"] or len(rows) > 3


def test_an_adapter_can_be_loaded_again(made, tmp_path):
    lora.run(settings(made, tmp_path))
    model, _ = load(str(made / "base"), adapter_path=str(tmp_path / "new"))
    assert any("lora_a" in name for name in model.trainable_parameters())


def test_unknown_services(made, tmp_path):
    with pytest.raises(ValueError, match="report_to: 'nothing' is not known"):
        lora.run(settings(made, tmp_path, report_to="nothing"))
    assert not (tmp_path / "new").exists()


CHAT = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}


def files_of(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 100}, "the training data: .* at least batch_size=100 .* only has 6"),
        ({"batch_size": 3}, "the validation data: .* at least batch_size=3 .* only has 2"),
        ({"batch_size": 0}, "batch_size is 0; "),
        ({"steps_per_report": 0}, "steps_per_report is 0; "),
    ],
)
def test_what_is_refused_leaves_an_adapter_in_place(made, tmp_path, options, message):
    lora.run(settings(made, tmp_path))
    before = files_of(tmp_path)
    with pytest.raises(ValueError, match=message):
        lora.run(settings(made, tmp_path, **options))
    assert "new/adapters.safetensors" in before and files_of(tmp_path) == before


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([CHAT, {"text": "x"}], "train.jsonl, line 2: the record has no 'messages'"),
        ([{"text": "x"}, {"text": 5}], "train.jsonl, line 2: 'text' is a .*must be a string"),
        ([{"prompt": "a", "completion": "b"}, {"prompt": "a"}], "line 2: .* no 'completion'"),
        ([], "Training set not found or empty"),
    ],
)
def test_refused_records(made, tmp_path, lines, message):
    data = tmp_path / "data"
    data.mkdir()
    (data / "train.jsonl").write_text("\n".join(map(json.dumps, lines)))
    with pytest.raises(ValueError, match=message):
        lora.run(settings(made, tmp_path, data=str(data)))
    assert not (tmp_path / "new").exists()


def test_a_line_that_is_no_json(made, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "x"}\n{"text": \n')
    with pytest.raises(FormatError, match=r"train.jsonl: line 2: is not valid JSON"):
        lora.run(settings(made, tmp_path, data=str(tmp_path)))


def test_data_that_make_no_batch_leave_an_adapter_in_place(made, tmp_path):
    lora.run(settings(made, tmp_path))
    before = files_of(tmp_path)

    def no_batch(**_):
        raise ValueError("no template")
        yield

    model, _ = load(str(made / "base"))
    args = trainer.TrainingArgs(2, 2, adapter_file=str(tmp_path / "new" / "adapters.safetensors"))
    with pytest.raises(ValueError, match="no template"):
        trainer.train(model, lora.Adam(1e-3), [[1, 2]], None, args, iterate_batches=no_batch)
    assert files_of(tmp_path) == before
