"""`train` and `eval`, from their flags to their files."""

import json
import logging
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tiny_commands import TRAIN, Model, fails

import pyloss
import pyloss.generation
from pyloss.cli import main
from pyloss.tuner import utils
from pyloss.tuner.run import evaluation


def test_train_writes_an_adapter_as_mlx_lm_lays_it_out(world, capsys, tmp_path):
    assert (
        main([*TRAIN, "--mask-prompt", "--rank", "4", "--train", "--test", "--test-batches", "-1"])
        == 0
    )
    out = capsys.readouterr().out
    assert "plan: 4 batches of 2, 4 updates" in out
    assert "iteration 4/4: train loss" in out
    assert out.splitlines()[-1].startswith("loss ")
    assert world.loaded == [("smollm2-135m", None)]
    assert world.lora == (16, {"rank": 4, "dropout": 0.0, "scale": 20.0})
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    expected = {
        "fine_tune_type": "lora",
        "num_layers": 16,
        "model": "smollm2-135m",
        "iters": 4,
        "mask_prompt": True,
    }
    assert config.items() >= expected.items()
    assert config["lora_parameters"]["rank"] == 4
    assert set(load_file(tmp_path / "adapters" / "adapters.safetensors")) == set(world.model.arrays)


def test_the_kind_of_fine_tuning(world, capsys, tmp_path, monkeypatch):
    assert (
        main(
            [
                *TRAIN,
                "--fine-tune-type",
                "dora",
                "--alpha",
                "16",
                "--rslora",
                "--lora-keys",
                "mlp.up_proj",
            ]
        )
        == 0
    )
    assert world.dora and world.lora[1] == {
        "rank": 8,
        "dropout": 0.0,
        "alpha": 16.0,
        "rslora": True,
        "keys": ["mlp.up_proj"],
    }

    def unfreeze(model, num_layers, keys):
        model.adapter_config = {
            "fine_tune_type": "full",
            "num_layers": num_layers,
            "lora_parameters": None,
            "full_keys": keys,
        }

    monkeypatch.setattr(utils, "unfreeze_layers", unfreeze)
    flags = [
        "--fine-tune-type",
        "full",
        "--num-layers",
        "2",
        "--full-keys",
        "mlp",
        "--adapter-path",
        "full",
    ]
    assert main([*TRAIN, *flags]) == 0
    config = json.loads((tmp_path / "full" / "adapter_config.json").read_text())
    assert (
        config.items() >= world.model.adapter_config.items() and config["lora_parameters"] is None
    )


def test_a_yaml_file_and_flags(world, tmp_path):
    Path("lora.yaml").write_text(
        "data: data\niters: 2\nbatch_size: 2\nlearning_rate: 1e-2\nnum_layers: -1\nadapter_path: out\n"
        "lr_schedule: {name: cosine_decay, arguments: [1e-2, 10], warmup: 1}\noptimizer: sgd\n"
        "optimizer_config: {sgd: {momentum: 0.9}}\n"
    )
    assert main(["train", "-c", "lora.yaml", "--iters", "3"]) == 0
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["iters"] == 3
    assert world.lora[0] == -1


def test_resume_continues_where_the_run_stopped(world, capsys):
    assert main([*TRAIN, "--iters", "6", "--adapter-path", "whole", "--keep-last"]) == 0
    assert main([*TRAIN, "--iters", "3", "--adapter-path", "parts", "--keep-last"]) == 0
    assert main([*TRAIN, "--iters", "6", "--adapter-path", "parts", "--keep-last", "--resume"]) == 0
    assert "resuming after iteration 3" in capsys.readouterr().out
    whole, parts = (load_file(f"{name}/adapters.safetensors") for name in ("whole", "parts"))
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])


def test_a_resumed_run_has_the_settings_of_the_run(world, capsys):
    settings = [
        "--keep-last",
        "--learning-rate",
        "1e-3",
        "--mask-prompt",
        "--rank",
        "3",
        "--optimizer",
        "adamw",
    ]
    assert main([*TRAIN, *settings, "--iters", "6", "--adapter-path", "whole"]) == 0
    assert main([*TRAIN, *settings, "--iters", "3", "--adapter-path", "parts"]) == 0
    capsys.readouterr()
    assert main(["train", "--resume", "--adapter-path", "parts", "--iters", "6"]) == 0
    err = capsys.readouterr().out
    assert "resuming after iteration 3" in err and "note:" not in err
    whole, parts = (load_file(f"{name}/adapters.safetensors") for name in ("whole", "parts"))
    assert whole.keys() == parts.keys()
    for name, array in whole.items():
        np.testing.assert_array_equal(array, parts[name])
    config = json.loads(Path("parts/adapter_config.json").read_text())
    assert config["mask_prompt"] and config["iters"] == 6 and config["lora_parameters"]["rank"] == 3
    # The losses of other targets are not comparable with those of the run.
    other = ["train", "--resume", "--adapter-path", "parts", "--train-on", "assistant"]
    fails(
        capsys,
        other,
        "trains on 'last' tokens",
        "'assistant'",
        "--train-on last",
        "--resume-adapter-file",
    )
    # An edited setting is still checked.
    Path("parts/adapter_config.json").write_text(json.dumps(config | {"batch_size": -1}))
    fails(
        capsys,
        ["train", "--resume", "--adapter-path", "parts"],
        "the run to resume: batch_size is -1",
    )


def test_a_loss_of_other_targets_than_the_run_had_is_said_to_be_one(world, capsys):
    assert main([*TRAIN, "--mask-prompt"]) == 0
    for argv in (
        [*TRAIN, "--test"],
        ["eval", "--model", "tiny", "--data", "data", "--adapter-path", "adapters"],
    ):
        capsys.readouterr()
        assert main(argv) == 0
        assert (
            "trained on 'last' tokens, and this loss is that of 'all' (--train-on last)"
            in capsys.readouterr().err
        )
        assert main([*argv, "--mask-prompt"]) == 0
        assert "note:" not in capsys.readouterr().err


def test_a_run_can_start_from_an_adapter(world, capsys):
    start = {name: np.full_like(array, 0.25) for name, array in Model().arrays.items()}
    save_file(start, "start.safetensors")
    argv = [*TRAIN, "--iters", "1", "--learning-rate", "0", "--val-batches", "0"]
    assert main([*argv, "--resume-adapter-file", "start.safetensors"]) == 0
    for name, array in load_file("adapters/adapters.safetensors").items():
        np.testing.assert_array_equal(array, start[name])
    # A folder means the adapter in it. The new run moves that adapter to previous-1.
    assert main([*argv, "--resume-adapter-file", "adapters"]) == 0
    assert "starting from the adapter in adapters/adapters.safetensors" in capsys.readouterr().err
    for folder in ("adapters", "adapters/previous-1"):
        for name, array in load_file(f"{folder}/adapters.safetensors").items():
            np.testing.assert_array_equal(array, start[name])
    fails(
        capsys,
        [*argv, "--resume-adapter-file", "data"],
        "data: the folder has no adapters.safetensors; give an adapters",
    )
    Path("start.safetensors").write_bytes(b"broken")
    fails(capsys, [*TRAIN, "--resume-adapter-file", "start.safetensors"], "start.safetensors")


def test_preview_shows_targets_and_trains_nothing(world, capsys, tmp_path):
    assert main([*TRAIN, "--mask-prompt", "--preview", "2"]) == 0
    out, _ = capsys.readouterr()
    assert "[+it is 0" in out
    assert "[+it is 1" in out
    assert "it is 2" not in out
    assert not (tmp_path / "adapters").exists()


def test_train_and_test_of_a_file_that_only_tests(world, capsys):
    Path("lora.yaml").write_text("train: false\ntest: true\ndata: data\nadapter_path: mine\n")
    assert main(["train", "-c", "lora.yaml"]) == 0
    assert world.adapters == "mine" and not Path("mine").exists()
    assert capsys.readouterr().out.startswith("loss ")
    Path("lora.yaml").write_text("train: false\ndata: data\n")
    fails(capsys, ["train", "-c", "lora.yaml"], "train and test are both false")


def test_a_test_alone_touches_no_adapter(world, capsys):
    """The command of mlx-lm's page on evaluation, and a YAML file with `test: true` only."""
    assert main(TRAIN) == 0 and capsys.readouterr().out
    before = {path: path.read_bytes() for path in Path("adapters").rglob("*") if path.is_file()}
    Path("test.yaml").write_text("data: data\ntest: true\n")
    for argv in (
        ["train", "--adapter-path", "adapters", "--data", "data", "--test"],
        ["train", "-c", "test.yaml"],
    ):
        world.adapters = None
        assert main(argv) == 0
        out, err = capsys.readouterr()
        assert (
            out.startswith("loss ")
            and "testing smollm2-135m with the adapter in adapters" in err
            and "plan:" not in out
        )
        assert world.adapters == "adapters"
    assert {
        path: path.read_bytes() for path in Path("adapters").rglob("*") if path.is_file()
    } == before


def test_overwrite_is_handed_on(world, tmp_path):
    assert main([*TRAIN, "--overwrite"]) == main([*TRAIN, "--overwrite"]) == 0
    assert not (tmp_path / "adapters" / "previous-1").exists()
    assert main(TRAIN) == 0 and (tmp_path / "adapters" / "previous-1").is_dir()
    assert main(["fuse", "--save-path", "out", "--dequantize", "--overwrite"]) == 0
    assert world.model.calls[-1] == ("save", Path("out"), "overwrite")


def test_eval_measures_a_split(world, capsys):
    assert main(["eval", "--data", "data", "--adapter-path", "mine", "--split", "valid"]) == 0
    assert world.loaded == [("smollm2-135m", "mine")]
    out = capsys.readouterr().out
    assert out.startswith("loss ")
    assert "2 samples" in out


@pytest.mark.parametrize("argv", [TRAIN, ["eval", "--data", "data"], ["generate"]])
def test_the_model_is_moved_to_the_device(world, capsys, monkeypatch, argv):
    moved = []
    monkeypatch.setattr(pyloss, "to_device", lambda model, device: moved.append((model, device)))
    assert main(argv) == 0 and not moved
    assert main([*argv, "--device", "opencl:1"]) == 0
    assert moved == [(world.model, "opencl:1")]

    def missing(model, device):
        raise pyloss.DeviceError("there is no OpenCL device")

    monkeypatch.setattr(pyloss, "to_device", missing)
    fails(capsys, [*argv, "--device", "opencl:1"], "there is no OpenCL device")


def test_the_precision_of_products_is_a_flag_and_a_key(world, capsys, tmp_path, monkeypatch):
    assert main([*TRAIN, "--matmul-precision", "bfloat16"]) == 0
    assert "plan: layers multiply in bfloat16" in capsys.readouterr().out
    (tmp_path / "c.yaml").write_text("matmul_precision: bfloat16\n")
    assert main([*TRAIN, "-c", "c.yaml"]) == 0
    assert "plan: layers multiply in bfloat16" in capsys.readouterr().out
    assert main([*TRAIN, "--precision", "mixed"]) == 0
    assert "plan: layers keep activations in float32, at least in part" in capsys.readouterr().out
    assert main([*TRAIN, "--precision", "mixed", "--grad-checkpoint"]) == 0
    assert "in float32: checkpointed layers are not recorded" in capsys.readouterr().out
    assert main(TRAIN) == 0
    assert "layers multiply" not in capsys.readouterr().out
    assert main([*TRAIN, "--matmul-precision", "int8"]) == 0
    assert "plan: layers multiply in int8" in capsys.readouterr().out
    measured = []
    monkeypatch.setattr(
        evaluation,
        "evaluate",
        lambda *arguments, **options: measured.append(pyloss.get_matmul_precision()) or 1.0,
    )
    assert main(["eval", "--data", "data", "-c", "c.yaml"]) == main(["eval", "--data", "data"]) == 0
    assert measured == ["bfloat16", "float32"]
    assert pyloss.get_matmul_precision() == "float32"


def test_the_log_is_left_as_it_was(world):
    log = logging.getLogger("pyloss")
    before = (list(log.handlers), log.level)
    main(["info"])
    assert (log.handlers, log.level) == before


def test_a_file_of_another_layout_trains_with_flags_for_keys_and_splits(world, capsys, tmp_path):
    rows = ["q,a", *(f"say {i},hello {i}" for i in range(40))]
    (tmp_path / "mine.csv").write_text("\n".join(rows))
    argv = [*TRAIN, "--data", "mine.csv", "--map", "prompt=q,completion=a", "--valid-split", "0.2"]
    assert main([*argv, "--mask-prompt"]) == 0
    out, err = capsys.readouterr()
    assert "data mine.csv: 40 records, mapped to a pair: q, a" in err
    assert "(valid_split 0.2): " in err and "val loss" in out
    config = json.loads((tmp_path / "adapters" / "adapter_config.json").read_text())
    assert config["map"] == {"prompt": "q", "completion": "a"} and config["valid_split"] == 0.2
    fails(capsys, [*TRAIN, "--data", "mine.csv"], "keys are 'q', 'a'; expected", "--map")
    fails(capsys, [*argv, "--map", "q"], "map is 'q'; allowed: prompt=KEY,completion=KEY")
    fails(capsys, [*argv, "--valid-split", "1"], "valid_split is 1", "below 1")
    fails(capsys, [*TRAIN, "--data", "none.csv"], "none.csv: there is no such file")


def test_max_time_is_a_flag(world, capsys):
    assert main([*TRAIN, "--max-time", "0.000001s"]) == 0
    assert "stopped after iteration 0: max_time is 0 s" in capsys.readouterr().out
    fails(capsys, [*TRAIN, "--max-time", "soon"], "max_time", "2h, 90m or 1h30m")


def test_epochs_are_a_flag_and_stay_with_the_adapter(world, capsys):
    argv = ["train", "--data", "data", "--batch-size", "2", "--mask-prompt", "--packing"]
    assert main([*argv, "--epochs", "2", "--val-every", "0.5ep"]) == 0
    out = capsys.readouterr().out
    assert "plan: 6 batches of 2" in out and "2 epochs" in out and "iteration 2/6: val loss" in out
    config = json.loads(Path("adapters/adapter_config.json").read_text())
    assert (config["epochs"], config["iters"], config["val_every"]) == (2.0, 6, "0.5ep")
    assert main([*argv, "--resume", "--epochs", "3"]) == 0
    assert "plan: 9 batches of 2" in capsys.readouterr().out
    assert main([*argv, "--resume", "--iters", "10"]) == 0
    assert "plan: 10 batches of 2" in capsys.readouterr().out
