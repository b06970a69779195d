"""mlx_lm.lora's settings: what is refused, in one sentence and before a model is loaded."""

import types

import pytest

from pyloss.mlx_lm import lora

REFUSED = [
    ({"iters": "ten"}, "iters is 'ten'; allowed: a whole number of at least 0"),
    ({"batch_size": 2.5}, "batch_size is 2.5; allowed: a whole number of at least 1"),
    ({"max_seq_length": "128"}, "max_seq_length is '128'; allowed: a whole number of at least 2"),
    ({"data": {"path": "x"}}, "data is {'path': 'x'}; allowed: the path of a file or folder"),
    ({"model": 5}, "model is 5; allowed: the path of a file or folder"),
    ({"num_layers": 1.5}, "num_layers is 1.5; allowed: a whole number; -1 stands for all layers"),
    ({"optimizer": 3}, "optimizer is 3; allowed: adam, adamw, muon, sgd, adafactor"),
    ({"fine_tune_type": "qlora"}, "fine_tune_type is 'qlora'; allowed: lora, dora, full"),
    ({"fine_tune_type": "Full"}, "fine_tune_type is 'Full'; allowed: lora, dora, full"),
    ({"resume_adapter_file": 5}, "resume_adapter_file is 5; allowed: the path of a file or folder"),
    ({"learning_rate": -1}, "learning_rate is -1; allowed: a finite number of at least 0"),
    (
        {"learning_rate": float("nan")},
        "learning_rate is nan; allowed: a finite number of at least 0",
    ),
    ({"learning_rate": "1"}, "learning_rate is '1'; allowed: a finite number of at least 0"),
    ({"train": "no"}, "train is 'no'; allowed: true or false"),
    (
        {"lr_schedule": "cosine_decay"},
        "lr_schedule is 'cosine_decay'; it must be a mapping such as "
        "{name: cosine_decay, arguments: [1e-5, 1000]}",
    ),
    (
        {"optimizer": "sgd", "optimizer_config": {"sgd": {"wd": 0.1}}},
        "optimizer_config: sgd has no option 'wd'; allowed: momentum, weight_decay, dampening, "
        "nesterov",
    ),
    (
        {"optimizer": "AdamW", "optimizer_config": {"adamw": {"betas": 1}}},
        "optimizer_config: adamw: betas is 1; it must be a list of 2",
    ),
    (
        {"optimizer_config": {"adam": {"eps": "x"}}},
        "optimizer_config: adam: eps is 'x'; it must be a finite number",
    ),
    (
        {"optimizer_config": [1]},
        "optimizer_config is [1]; allowed: a mapping of optimizers to their options such as "
        "{adamw: {weight_decay: 0.1}}",
    ),
    (
        {"lora_parameters": {"rank": 2.5, "scale": 1.0}},
        "lora_parameters.rank is 2.5; allowed: a whole number of at least 1",
    ),
    (
        {"hf_dataset": {"name": "x"}},
        "hf_dataset is {'name': 'x'}; allowed: a mapping with a 'path', or a list of such",
    ),
    ({"test": True, "test_batches": 0}, "test_batches is 0; it must be at least 1, or -1 for all"),
]


def settings(**options):
    given = {"model": "no model", "data": "no data", "train": True}
    return types.SimpleNamespace(**{**lora.CONFIG_DEFAULTS, **given, **options})


@pytest.mark.parametrize(("options", "message"), REFUSED)
def test_refused(options, message):
    with pytest.raises(ValueError) as caught:
        lora.run(settings(**options))
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options",
    [
        {"iters": 1e3, "num_layers": 4.0},
        {"optimizer": "Adafactor", "optimizer_config": {"adafactor": {"beta_1": None}}},
        {"optimizer": "adamw", "optimizer_config": {"adamw": {"betas": [0.9, 0.98]}, "other": {}}},
        {"optimizer": "muon", "optimizer_config": {"muon": {"ns_steps": 3, "nesterov": False}}},
        {"num_layers": -2, "lora_parameters": {"rank": 4, "scale": 2.0, "more": 1}},
        {"adapter_path": "", "lr_schedule": {"name": "cosine_decay", "arguments": [1e-5, 100]}},
        {"fine_tune_type": "full", "lora_parameters": None},
    ],
)
def test_allowed(options):
    args = settings(**options)
    with pytest.raises((FileNotFoundError, ValueError), match="no model"):
        lora.run(args)
    assert isinstance(args.iters, int) and isinstance(args.num_layers, int)


def test_a_test_set_that_fills_no_batch(made, tmp_path):
    given = {"model": str(made / "base"), "data": str(made / "data"), "num_layers": 1}
    given |= {"val_batches": 0, "adapter_path": str(tmp_path / "new")}
    with pytest.raises(ValueError, match="the test data: .* batch_size=4 .* only has 3"):
        lora.run(settings(**given, test=True))
    assert not (tmp_path / "new").exists()
