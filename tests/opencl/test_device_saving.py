"""Fused layers and files of a model on a device equal those of the same model on the processor."""

import numpy as np
import pytest
import tiny
from test_device_experts import adapted_experts, model_of
from test_device_model import adapted

import pyloss
from pyloss.models import load_model


def files_in(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def adapted_pair(folder, format, device, **options):
    """The same adapted model on the processor and on the device."""
    pair = []
    for _ in range(2):
        if format == "f32":
            model = tiny.load_tiny(folder / "f32", bias=True, vocab_size=tiny.TOKENS)
        else:
            tiny.write_gguf(folder / "tiny.gguf", format=format, vocab_size=tiny.TOKENS)
            model = load_model(folder / "tiny.gguf")
        pair.append(adapted(model, **options))
    pyloss.to_device(pair[1], device)
    return pair


def same_model(here, there, on_device=True):
    for of_here, of_there in (
        (here.parameters(), there.parameters()),
        (here.stored(), there.stored()),
    ):
        assert of_here.keys() == of_there.keys()
        for name, value in of_here.items():
            other = of_there[name]
            if isinstance(value, np.ndarray):
                assert isinstance(other, pyloss.DeviceArray) == on_device
                np.testing.assert_array_equal(np.asarray(other), value)
            else:
                assert other.format == value.format
                np.testing.assert_array_equal(other.dequantize(), value.dequantize())


@pytest.mark.parametrize("dequantize", [False, True])
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["f32", "Q8_0"])
def test_fusing(device, tmp_path, format, dora, dequantize):
    keys = ["model.embed_tokens", "self_attn.q_proj", "mlp.down_proj"]
    here, there = adapted_pair(tmp_path, format, device, dora=dora, keys=keys)
    assert here.fuse(dequantize) is here and there.fuse(dequantize) is there
    same_model(here, there)
    # Twice, since products of at most 32 rows have another order of sums on the processor.
    tokens = np.tile(np.random.default_rng(0).integers(0, 29, (2, 9)), (2, 1))
    np.testing.assert_allclose(
        np.asarray(there.eval()(tokens)), here.eval()(tokens), rtol=1e-5, atol=2e-5
    )


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("format", ["f32", "q4_1"])
def test_fusing_experts(device, format, dora):
    here, there = (adapted_experts("qwen3_moe", format, dora=dora) for _ in range(2))
    pyloss.to_device(there, device)
    same_model(here.fuse(dequantize=True), there.fuse(dequantize=True))
    assert there.parameters().keys() == model_of("qwen3_moe", format).parameters().keys()


def test_one_adapter_is_fused_and_stays(device, tmp_path):
    here, there = adapted_pair(tmp_path, "f32", device)
    layer, adapter = here.layers[0].mlp.up_proj, there.layers[0].mlp.up_proj
    fused = adapter.fuse()
    np.testing.assert_array_equal(fused.weight.dequantize(), layer.fuse().weight.dequantize())
    np.testing.assert_array_equal(adapter.delta(), layer.delta())
    assert isinstance(adapter.lora_a, pyloss.DeviceArray) and not isinstance(
        adapter.base.weight.handle[0], np.ndarray
    )


@pytest.mark.parametrize("to", ["hf", "gguf", "adapter.gguf", "peft", "mlx"])
@pytest.mark.parametrize("fixed", [False, True])
def test_files(device, tmp_path, to, fixed):
    """Also with fixed factors, as PiSSA creates them."""
    written = []
    for model, name in zip(adapted_pair(tmp_path, "f32", device), ("here", "there"), strict=True):
        folder = tmp_path / name
        folder.mkdir()
        if fixed:
            pyloss.to_device(model, "cpu")
            for module in model.modules():
                if hasattr(module, "lora_b"):
                    module.subtract_initial_product()
                    module.lora_a[...] += 0.5
            pyloss.to_device(model, device if name == "there" else "cpu")
        tokenizer = tiny.byte_tokenizer() if to in ("hf", "gguf") else None
        path = folder / "model.gguf" if "gguf" in to else folder
        pyloss.export(
            model,
            path,
            to.removeprefix("adapter."),
            tokenizer,
            adapter_only=to == "adapter.gguf",
            name="a name",
        )
        assert any(
            isinstance(array, pyloss.DeviceArray) for array in model.parameters().values()
        ) == (name == "there")
        written.append(files_in(folder))
    assert written[0] == written[1]
