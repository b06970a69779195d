"""Settings from mlx_lm.lora's YAML files and from flags, and the errors for invalid ones."""

import re
from pathlib import Path

import pytest

from pyloss.tuner.run.settings import SCHEMA, merge_settings, read_yaml, resumed_settings

pytest.importorskip("yaml")

# The keys and types of values in mlx-lm's example configuration.
MLX_LM = """
model: "mlx_model"
train: true
fine_tune_type: lora
optimizer: adamw
optimizer_config:
  adamw:
    betas: [0.9, 0.98]
    eps: 1e-6
    weight_decay: 0.05
    bias_correction: true
  muon: {}
data: "/path/to/training/data"
seed: 0
num_layers: 16
batch_size: 4
iters: 1000
val_batches: 25
learning_rate: 1e-5
steps_per_report: 10
steps_per_eval: 200
resume_adapter_file: null
adapter_path: "adapters"
save_every: 100
test: false
test_batches: 100
max_seq_length: 2048
grad_checkpoint: false
grad_accumulation_steps: 2
mask_prompt: false
report_to: null
clear_cache_threshold: 0
lora_parameters:
  keys: ["self_attn.q_proj", "self_attn.v_proj"]
  rank: 8
  scale: 20.0
  dropout: 0.0
lr_schedule:
  name: cosine_decay
  warmup: 100
  warmup_init: 1e-7
  arguments: [1e-5, 1000, 1e-7]
hf_dataset:
  path: "billsum"
  train_split: "train[:1000]"
  valid_split: "train[-100:]"
  prompt_feature: "text"
  completion_feature: "summary"
"""


@pytest.fixture
def written(tmp_path):
    def write(text):
        path = tmp_path / "lora.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_mlx_lms_yaml_works_unchanged(written):
    settings = merge_settings({}, written(MLX_LM))
    assert settings.learning_rate == 1e-5
    assert settings.optimizer_config["adamw"]["eps"] == 1e-6
    assert settings.lr_schedule["arguments"] == [1e-5, 1000, 1e-7]
    assert settings.lora_parameters["keys"] == ["self_attn.q_proj", "self_attn.v_proj"]
    assert settings.hf_dataset["path"] == "billsum"
    assert settings.resume_adapter_file is None
    assert set(vars(settings)) == set(SCHEMA)


def test_the_example_of_this_repository_is_read():
    path = Path(__file__).parents[3] / "examples" / "lora_config.yaml"
    if not path.exists():
        pytest.skip("the examples are not here")
    assert merge_settings({}, path).data == "examples/data"


def test_the_files_in_the_documentation_are_read(written):
    page = (Path(__file__).parents[3] / "docs" / "fine_tuning.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```yaml\n(.*?)^```", page, re.M | re.S)
    runs = [merge_settings({}, written(block)) for block in blocks]
    assert [settings.fine_tune_type for settings in runs] == [
        "dora",
        "lora",
        "lora",
        "lora",
        "full",
        "lora",
        "lora",
    ]
    precisions = [settings.matmul_precision for settings in runs]
    assert precisions == ["float32"] * 5 + ["bfloat16", "mixed"]
    assert runs[1].lora_parameters["rank_pattern"] == {"mlp.down_proj": 32, "lm_head": 4}
    assert runs[2].lora_parameters["init"] == "loftq" and runs[4].full_keys == [
        "mlp",
        "input_layernorm",
        "model.norm",
    ]


@pytest.mark.parametrize("text", ["1e-5", "1E-5", "1.0e-5", "+1e-5", ".00001", "1e-05", "0.00001"])
def test_every_spelling_of_a_number_is_one(written, text):
    assert merge_settings({}, written(f"learning_rate: {text}")).learning_rate == pytest.approx(
        1e-5
    )


def test_defaults_are_mlx_lms():
    settings = merge_settings({})
    expected = {
        "batch_size": 4,
        "iters": 1000,
        "val_batches": 25,
        "learning_rate": 1e-5,
        "steps_per_report": 10,
    }
    expected |= {
        "steps_per_eval": 200,
        "save_every": 100,
        "num_layers": 16,
        "max_seq_length": 2048,
        "optimizer": "adam",
    }
    expected |= {
        "test_batches": 500,
        "seed": 0,
        "adapter_path": "adapters",
        "fine_tune_type": "lora",
    }
    assert vars(settings).items() >= expected.items()
    assert settings.lora_parameters == {"rank": 8, "dropout": 0.0, "scale": 20.0}


def test_flags_go_before_the_file_and_the_file_before_defaults(written):
    path = written("iters: 7\nbatch_size: 2\nlora_parameters: {rank: 4, scale: 2.0}")
    settings = merge_settings(
        {"iters": 9, "batch_size": None, "scale": 5.0, "lora_keys": ["self_attn.q_proj"]}, path
    )
    assert (settings.iters, settings.batch_size, settings.val_batches) == (9, 2, 25)
    assert settings.lora_parameters == {
        "rank": 4,
        "dropout": 0.0,
        "scale": 5.0,
        "keys": ["self_attn.q_proj"],
    }
    assert "keys" not in merge_settings({}).lora_parameters


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batch_size: four", ["batch_size is 'four'", "a whole number of at least 1"]),
        ("batch_size: 0", ["batch_size is 0", "at least 1"]),
        ("iters: 1.5", ["iters is 1.5", "whole number"]),
        ("iters: true", ["iters is True", "whole number"]),
        ("train: 'yes'", ["train is 'yes'", "true or false"]),
        ("learning_rate: fast", ["learning_rate is 'fast'", "a finite number of at least 0"]),
        ("learning_rate: .nan", ["learning_rate is nan"]),
        (
            "learning_rat: 1e-5",
            ["unknown key learning_rat (value 1e-05)", "did you mean learning_rate?", "batch_size"],
        ),
        ("lora_layers: 8", ["unknown key lora_layers", "did you mean num_layers?"]),
        ("gradient_accumulation_steps: 8", ["did you mean grad_accumulation_steps?"]),
        ("zzz: 8", ["unknown key zzz (value 8)", "allowed are model, train"]),
        ("fine_tune_type: ia3", ["fine_tune_type is 'ia3'", "lora, dora, full"]),
        ("full_keys: [mlp]", ["full_keys says what fine_tune_type full trains", "--lora-keys"]),
        ("lora_plus_ratio: 8", ["did you mean loraplus_lr_ratio?"]),
        (
            "optimizer: adm",
            ["optimizer is 'adm'", "adam, adamw, adam_atan2, adafactor, lion, muon, sgd"],
        ),
        ("optimizer_config: {adm: {}}", ["optimizer_config is", "adam, adamw"]),
        ("lora_parameters: {rank: 0}", ["lora_parameters.rank is 0", "at least 1"]),
        (
            "lora_parameters: {rnk: 8}",
            ["unknown key lora_parameters.rnk", "did you mean lora_parameters.rank?"],
        ),
        ("lora_parameters: {rslora: true, scale: 2.0}", ["must give 'alpha', not 'scale'"]),
        ("lora_parameters: {lora_alpha: 16}", ["did you mean lora_parameters.alpha?"]),
        (
            "lora_parameters: {init: olora}",
            ["lora_parameters.init is 'olora'", "default, pissa, loftq"],
        ),
        ("lora_parameters: {init: pissa, dropout: 0.1}", ["init 'pissa' needs dropout 0"]),
        (
            "lora_parameters: {rank_pattern: {mlp.up_proj: x}}",
            ["rank_pattern is", "{self_attn.q_proj: 16}"],
        ),
        ("lora_parameters: {dropout: 1.0}", ["lora_parameters.dropout is 1.0", "below 1"]),
        (
            "lora_parameters: {keys: q_proj}",
            ["lora_parameters.keys is 'q_proj'", "a list of layer names"],
        ),
        ("lora_parameters: 8", ["lora_parameters is 8", "a mapping"]),
        (
            "lr_schedule: {name: cosine, arguments: [1]}",
            ["lr_schedule: name is 'cosine'", "cosine_decay"],
        ),
        ("train_on: user", ["train_on is 'user'", "last, assistant, all"]),
        ("- a\n- b", ["holds a list", "a mapping"]),
        ("a: [1\nb: 2", ["line 2", "not YAML"]),
    ],
)
def test_a_bad_file_is_one_error_that_names_it(written, text, parts):
    path = written(text)
    with pytest.raises(ValueError) as raised:
        merge_settings({}, path)
    message = str(raised.value)
    assert message.startswith((str(path), "full_keys"))
    for part in parts:
        assert part in message


def test_a_bad_flag_is_named_as_one():
    with pytest.raises(
        ValueError, match="command line: batch_size is 0; allowed: a whole number of at least 1"
    ):
        merge_settings({"batch_size": 0})
    with pytest.raises(ValueError, match=r"command line: lora_parameters.rank is 0"):
        merge_settings({"rank": 0})


@pytest.mark.parametrize(
    ("text", "flags", "expected"),
    [
        ("{alpha: 16}", {}, {"rank": 8, "dropout": 0.0, "alpha": 16.0}),
        (
            "{alpha: 16, rslora: true, init: pissa}",
            {"rank": 4},
            {"rank": 4, "dropout": 0.0, "alpha": 16.0, "rslora": True, "init": "pissa"},
        ),
        ("{alpha: 16, rslora: true}", {"scale": 3.0}, {"rank": 8, "dropout": 0.0, "scale": 3.0}),
        ("{scale: 3.0}", {"alpha": 2.0}, {"rank": 8, "dropout": 0.0, "alpha": 2.0}),
    ],
)
def test_scale_and_alpha_take_each_others_place(written, text, flags, expected):
    assert merge_settings(flags, written(f"lora_parameters: {text}")).lora_parameters == expected


@pytest.mark.parametrize(
    ("text", "flags", "train", "test"),
    [
        ("", {}, True, False),
        ("", {"test": True}, False, True),
        ("", {"test": True, "train": True}, True, True),
        ("test: true", {}, False, True),
        ("test: true", {"train": True}, True, True),
        ("train: true\ntest: true", {}, True, True),
        ("train: true", {"test": True}, True, True),
        ("train: false", {"test": True}, False, True),
        ("test: false", {}, True, False),
        ("train: false", {}, False, False),
    ],
)
def test_training_is_the_default_where_neither_it_nor_a_test_is_said(
    written, text, flags, train, test
):
    settings = merge_settings(flags, written(text))
    assert (settings.train, settings.test) == (train, test)


def test_warm_up_has_one_place(written):
    path = written("lr_schedule: {name: step_decay, arguments: [0.1, 0.5, 2]}")
    with pytest.raises(ValueError, match="warmup is given twice"):
        merge_settings({"warmup": 3}, path)


def test_an_empty_file_and_a_missing_one(written, tmp_path):
    assert read_yaml(written("# nothing\n")) == {}
    with pytest.raises(FileNotFoundError):
        read_yaml(tmp_path / "none.yaml")
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8|not YAML"):
        read_yaml(path)


def test_max_time_is_a_duration_of_one_call(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("max_time: 1h30m\n")
    assert merge_settings({}, file).max_time == 5400
    assert merge_settings({"max_time": "2h"}, file).max_time == 7200
    with pytest.raises(ValueError, match=r"max_time.*2h, 90m or 1h30m"):
        merge_settings({"max_time": "soon"})
    assert "max_time" not in resumed_settings({"max_time": 7200.0, "iters": 5})


def test_a_map_of_keys_is_text_or_a_mapping(tmp_path):
    (tmp_path / "a.yaml").write_text("map: {prompt: q, completion: reply}\nvalid_split: 0.1\n")
    settings = merge_settings({"test_split": 0.2}, tmp_path / "a.yaml")
    assert settings.map == {"prompt": "q", "completion": "reply"}
    assert (settings.valid_split, settings.test_split) == (0.1, 0.2)
    settings = merge_settings({"map": "messages=dialog"}, tmp_path / "a.yaml")
    assert settings.map == {"messages": "dialog"}
    with pytest.raises(ValueError, match="map is .*; allowed: prompt=KEY,completion=KEY or"):
        merge_settings({"map": "prompt=q"})
    with pytest.raises(ValueError, match="test_split is 1.5; allowed: .* below 1"):
        merge_settings({"test_split": 1.5})


def test_epochs_and_iterations_take_each_others_place(tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 3\nval_every: 0.1ep\npacking: true\n")
    found = merge_settings({}, tmp_path / "a.yaml")
    assert (found.epochs, found.val_every, found.iters) == (3.0, "0.1ep", 1000)
    found = merge_settings({"iters": 5, "val_every": "20"}, tmp_path / "a.yaml")
    assert (found.epochs, found.iters, found.val_every) == (None, 5, 20)
    found = merge_settings({"steps_per_eval": 5}, tmp_path / "a.yaml")
    assert (found.epochs, found.val_every, found.steps_per_eval) == (3.0, None, 5)
    # A run's own settings have both, and a flag decides.
    saved = {"iters": 42, "epochs": 3.0}
    assert merge_settings({}, None, saved).epochs == 3.0
    assert merge_settings({"epochs": 4.0}, None, saved).epochs == 4.0
    assert merge_settings({"iters": 50}, None, saved).epochs is None
    with pytest.raises(ValueError, match="command line: iters and epochs are given; give one"):
        merge_settings({"iters": 5, "epochs": 1.0})
    with pytest.raises(ValueError, match="val_every is 'often'; allowed: a part of an epoch"):
        merge_settings({"val_every": "often"})
    with pytest.raises(ValueError, match="packing is False; allowed: true, which is always so"):
        merge_settings({"packing": False})
