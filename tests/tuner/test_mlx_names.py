"""Names and calls of public mlx-lm scripts: same paths, argument order and meaning."""

import dataclasses
import inspect

import numpy as np
import pytest
import tiny
from tiny_training import Tiny, run, tiny_value_and_grad

import pyloss
from pyloss import nn, optim
from pyloss.generation import generate, make_sampler, stream_generate
from pyloss.models import load, load_model
from pyloss.tuner import callbacks, lora, losses, trainer, utils
from pyloss.tuner.run.own_optimizer import WrappedOptimizer


def test_names_under_their_paths():
    assert utils.build_schedule is optim.build_schedule
    assert losses.kl_div_loss is pyloss.kl_div_loss and losses.js_div_loss is pyloss.js_div_loss
    assert lora.LoRASwitchLinear is pyloss.tuner.LoRASwitchLinear
    assert set(callbacks.SUPPORT_CALLBACK) >= {"wandb", "swanlab"}
    with pytest.raises(AttributeError, match="no attribute 'LoRAConv'"):
        lora.LoRAConv  # noqa: B018
    for module in (utils, losses, trainer):
        assert all(hasattr(module, name) for name in module.__all__)


def test_signatures_are_mlx_lms():
    theirs = pytest.importorskip("mlx_lm.tuner.trainer")
    names = [field.name for field in dataclasses.fields(theirs.TrainingArgs)]
    ours = dataclasses.fields(trainer.TrainingArgs)
    assert [field.name for field in ours][: len(names)] == names
    for mine, field in zip(ours, dataclasses.fields(theirs.TrainingArgs), strict=False):
        assert mine.default == field.default
    from mlx_lm.sample_utils import make_sampler as their_sampler
    from mlx_lm.utils import load as their_load

    assert list(inspect.signature(load).parameters) == list(
        inspect.signature(their_load).parameters
    )
    parameters = list(inspect.signature(make_sampler).parameters)
    assert parameters[:5] == list(inspect.signature(their_sampler).parameters)[:5]


def test_load_takes_mlx_lms_arguments(made):
    _, tokenizer, config = load(
        path_or_hf_repo=made / "base",
        tokenizer_config={"trust_remote_code": True},
        lazy=True,
        return_config=True,
    )
    assert config["model_type"] == "llama" and config["hidden_size"] == 32
    *_, config = load(str(made / "base.gguf"), {}, None, str(made / "adapters"), False, True)
    assert config["model_type"] == "llama"
    _, changed = load(made / "base", {"eos_token": "hello", "chat_template": "x"})
    assert changed.eos_token_ids == tokenizer.eos_token_ids | set(
        tokenizer.encode("hello", add_special_tokens=False)
    )
    assert changed.chat_template == "x"
    with pytest.raises(TypeError, match="adapter_path="):
        load(made / "base", str(made / "adapters"))
    with pytest.raises(ValueError, match="unknown key 'padding_side'"):
        load(made / "base", {"padding_side": "left"})
    with pytest.raises(ValueError, match="eos_token 'hello12w' is"):
        load(made / "base", {"eos_token": "hello12w"})
    with pytest.raises(ValueError, match="model_config is"):
        load(made / "base", model_config={"rope_theta": 1})


def test_weights_are_loaded_from_a_file_and_from_pairs(made):
    model, _ = load(made / "base", adapter_path=made / "adapters")
    other, _ = load(made / "base", adapter_path=made / "adapters")
    wanted = model.trainable_parameters()
    for array in other.trainable_parameters().values():
        array[...] = 0
    other.load_weights(str(made / "adapters" / "adapters.safetensors"), strict=False)
    for name, array in other.trainable_parameters().items():
        np.testing.assert_array_equal(array, wanted[name])
        array[...] = 0
    other.load_weights(list(wanted.items()), strict=False)
    for name, array in other.trainable_parameters().items():
        np.testing.assert_array_equal(array, wanted[name])
    with pytest.raises(FileNotFoundError):
        other.load_weights(made / "none.safetensors")


def test_total_parameters(made):
    c = tiny.config(vocab_size=tiny.TOKENS)
    wanted = sum(array.size for array in tiny.tensors(c).values())
    assert utils.get_total_parameters(load_model(made / "base")) == wanted
    assert utils.get_total_parameters(load_model(made / "base.gguf")) == wanted


def test_checkpointing_by_a_layer(made):
    model = load_model(made / "base")
    assert not model.grad_checkpoint
    trainer.grad_checkpoint(model.layers[0])
    assert model.grad_checkpoint
    assert not load_model(made / "base").grad_checkpoint
    model.set_grad_checkpoint(False)
    assert not model.grad_checkpoint
    with pytest.raises(TypeError, match="model.layers"):
        trainer.grad_checkpoint(model.layers)


class Mine:
    """An optimizer that wraps another one, with the attributes of mlx's."""

    def __init__(self, inner):
        self.inner = inner
        self.calls = 0

    @property
    def learning_rate(self):
        return np.array(self.inner.learning_rate)

    @property
    def state(self):
        return self.inner.state

    def update(self, model, grads):
        self.calls += 1
        self.inner.update(model, grads)


def test_an_optimiser_of_the_users_own(tmp_path, monkeypatch):
    def trained(folder, optimizer, **settings):
        model, *_ = run(tmp_path / folder, optimizer=optimizer, keep_best=False, **settings)
        return np.concatenate([array.ravel() for array in model.arrays.values()])

    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)
    plain = trained("plain", optim.AdamW(0.05), iters=6)
    mine = Mine(optim.AdamW(0.05))
    np.testing.assert_array_equal(trained("mine", mine, iters=6), plain)
    assert mine.calls == 6
    trained("parts", Mine(optim.AdamW(0.05)), iters=3)
    np.testing.assert_array_equal(
        trained("parts", Mine(optim.AdamW(0.05)), iters=6, resume=True), plain
    )
    with pytest.raises(TypeError, match="without 'update'"):
        trained("none", optimizer=Tiny(), iters=1)


def test_an_optimiser_without_state():
    class Bare:
        learning_rate = 0.1

        def update(self, model, grads):
            for name, array in model.trainable_parameters().items():
                array -= 0.1 * grads[name]

    wrapped, model = WrappedOptimizer(Bare()), Tiny()
    before = {name: array.copy() for name, array in model.arrays.items()}
    wrapped.update(
        model, {name: np.ones_like(array) for name, array in before.items()}, grad_scale=0.5
    )
    for name, array in model.arrays.items():
        np.testing.assert_allclose(array, before[name] - 0.05, rtol=1e-6)
    assert wrapped.state_dict() == {"step": 1} and wrapped.learning_rate == 0.1


def test_the_step_of_an_optimiser_is_in_its_state():
    optimizer = optim.AdamW(optim.linear_schedule(0.0, 1.0, 10))
    optimizer.state["step"] = np.array(5)
    assert optimizer.step == optimizer.state["step"] == 5
    optimizer.update({"a": np.zeros(2, np.float32)}, {"a": np.ones(2, np.float32)})
    assert (
        optimizer.state["step"] == 6
        and optimizer.state["learning_rate"] == optimizer.learning_rate == 0.5
    )
    assert set(optimizer.state) == {"a"} and set(optimizer.state_dict()) == {"step", "m.a", "v.a"}
    optimizer.state["learning_rate"] = 0.25
    assert optimizer.learning_rate == 0.25
    with pytest.raises(ValueError, match="state\\['step'\\] is -1"):
        optimizer.state["step"] = -1
    with pytest.raises(KeyError):
        optimizer.state["b"]


def test_validations_can_be_at_the_start_and_the_end_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(nn, "value_and_grad", tiny_value_and_grad)
    _, reports, _ = run(tmp_path, iters=5, steps_per_eval=0)
    assert list(reports.val_losses) == [0, 5]


def test_generation_takes_mlx_lms_arguments(made, capsys):
    model, tokenizer = load(made / "base")
    plain = generate(model, tokenizer, "hello", max_tokens=5)
    assert capsys.readouterr().out == ""
    assert (
        generate(
            model,
            tokenizer,
            prompt="hello",
            verbose=True,
            max_tokens=5,
            sampler=make_sampler(temp=0.0),
        )
        == plain
    )
    printed = capsys.readouterr().out
    assert (
        printed.startswith("=" * 10 + "\n" + plain + "\n" + "=" * 10)
        and "Generation: 5 tokens" in printed
    )
    best = lambda logits: np.argmax(logits, axis=-1)
    assert generate(model, tokenizer, "hello", max_tokens=5, sampler=best) == plain
    wanted = tokenizer.encode("w", add_special_tokens=False)[0]

    def only(tokens, logits):
        assert list(tokens[: len(tokenizer.encode("hello"))]) == tokenizer.encode(
            "hello"
        ) and logits.shape == (1, tiny.TOKENS)
        logits[:, :wanted] = -np.inf
        logits[:, wanted + 1 :] = -np.inf
        return logits

    steps = list(stream_generate(model, tokenizer, "hello", max_tokens=4, logits_processors=[only]))
    assert [step.token for step in steps] == [wanted] * 4
    with pytest.raises(ValueError, match="sampler takes the place of"):
        generate(model, tokenizer, "hello", sampler=best, temperature=1.0)
    unlimited = stream_generate(model, tokenizer, "hello", max_tokens=-1)
    assert [next(unlimited).finish_reason for _ in range(2)] == [None, None]


def test_samplers_of_mlx_lms_arguments():
    logits = np.array([0.0, 3.0, 1.0, 2.0], np.float32)
    assert (
        make_sampler(0.0)(logits)
        == make_sampler(temp=0)(logits)
        == make_sampler(temperature=0)(logits)
        == 1
    )
    kept = make_sampler(1.0, 0.0, 0.99, 2, generator=np.random.default_rng(0))
    assert {kept(logits) for _ in range(200)} == {1, 3}
    with pytest.raises(ValueError, match="min_tokens_to_keep is 0"):
        make_sampler(1.0, min_tokens_to_keep=0)
