"""Settings of training runs: the authors' files and words, one flat file, unknown keys."""

import pytest

from pyloss.recursive import HRM, TRM
from pyloss.recursive.run_files import yaml_text
from pyloss.recursive.settings import make_head, make_model, read_settings

TRAINING = """
defaults:
  - arch: trm
  - _self_

hydra:
  output_subdir: null

data_paths: ['data/arc-aug-1000']
data_paths_test: []

evaluators:
  - name: arc@ARC

global_batch_size: 768

epochs: 100000
eval_interval: 10000
checkpoint_every_eval: True

lr: 1e-4
lr_min_ratio: 1.0
lr_warmup_steps: 2000

beta1: 0.9
beta2: 0.95
weight_decay: 0.1
puzzle_emb_weight_decay: 0.1
puzzle_emb_lr: 1e-2

seed: 0
min_eval_interval: 0 # when to start the eval

ema: False # use Exponential-Moving-Average
ema_rate: 0.999 # EMA-rate
freeze_weights: False # If True, freeze weights and only learn the embeddings
"""
ARCH = """
name: {name}
loss:
  name: losses@ACTLossHead
  loss_type: stablemax_cross_entropy

halt_exploration_prob: 0.1
halt_max_steps: 16

H_cycles: 3
L_cycles: 6
H_layers: {layers}
L_layers: 2

hidden_size: 64
num_heads: 8  # min(2, hidden_size // 64)
expansion: 4

puzzle_emb_ndim: ${{.hidden_size}}
pos_encodings: rope
forward_dtype: bfloat16
"""
OF_TRM = """
mlp_t: False # use mlp on L instead of transformer
puzzle_emb_len: 16 # if non-zero, its specified to this value
no_ACT_continue: True
"""
NAMES = {
    "trm": "recursive_reasoning.trm@TinyRecursiveReasoningModel_ACTV1",
    "hrm": "hrm.hrm_act_v1@HierarchicalReasoningModel_ACTV1",
}
SIZES = {"seq_len": 9, "vocab_size": 11, "num_puzzle_identifiers": 4, "batch_size": 2}


@pytest.fixture
def files(tmp_path):
    (tmp_path / "arch").mkdir()
    (tmp_path / "cfg_pretrain.yaml").write_text(TRAINING)
    (tmp_path / "arch" / "trm.yaml").write_text(ARCH.format(name=NAMES["trm"], layers=0) + OF_TRM)
    (tmp_path / "arch" / "hrm.yaml").write_text(ARCH.format(name=NAMES["hrm"], layers=2))
    flat = TRAINING.partition("data_paths:")[2]
    (tmp_path / "flat.yaml").write_text(
        ARCH.format(name="trm", layers=0) + OF_TRM + "data_paths:" + flat
    )
    return tmp_path


def test_the_authors_files(files):
    found = read_settings(files / "cfg_pretrain.yaml")
    args, model = found.args(), make_model(found.arch, **SIZES)
    assert (args.global_batch_size, args.lr, args.puzzle_emb_lr) == (768, 1e-4, 1e-2)
    assert args.rounds == 10 and args.checkpoint_every_eval and not args.ema
    assert found.data_paths == ["data/arc-aug-1000"] and not found.data_paths_test
    assert found.unused[0] == "hydra" and found.unused[1].startswith("forward_dtype (--precision")
    assert len(found.unused) == 2 and found.evaluators == ["arc@ARC"]
    assert isinstance(model, TRM) and model.config.puzzle_emb_ndim == 64
    assert model.config.tokens == 9 + 16 and model.config.L_cycles == 6


def test_words_as_after_the_authors_command(files):
    words = [
        *("arch=trm", "data_paths=[data/sudoku]", "evaluators=[]", "epochs=50000"),
        *("eval_interval=5000", "lr=2e-4", "weight_decay=1.0", "arch.mlp_t=True"),
        *("arch.pos_encodings=none", "arch.H_cycles=2", "+run_name=mine", "ema=True"),
        "arch.loss.loss_type=softmax_cross_entropy",
    ]
    found = read_settings(files / "cfg_pretrain.yaml", words)
    args = found.args()
    assert (args.epochs, args.lr, args.weight_decay, args.ema) == (50000, 2e-4, 1.0, True)
    assert found.data_paths == ["data/sudoku"] and not found.evaluators
    config = make_model(found.arch, **SIZES).config
    assert config.mlp_t and config.pos_encodings == "none" and config.H_cycles == 2
    assert make_head(found.arch, **SIZES).loss_fn.__name__ == "softmax_cross_entropy"


def test_another_architecture_by_a_word(files):
    found = read_settings(files / "cfg_pretrain.yaml", ["arch=hrm"])
    model = make_model(found.arch, **SIZES)
    assert isinstance(model, HRM) and model.config.H_layers == 2


def test_one_flat_file_and_the_file_that_a_run_writes(files):
    nested, flat = (read_settings(files / name) for name in ("cfg_pretrain.yaml", "flat.yaml"))
    assert flat.training == nested.training and flat.data_paths == nested.data_paths
    assert flat.arch | {"name": NAMES["trm"]} == nested.arch
    (files / "config.yaml").write_text(yaml_text(nested.as_mapping()))
    again = read_settings(files / "config.yaml")
    assert (again.arch, again.training) == (nested.arch, nested.training)
    alone = read_settings(files / "arch" / "trm.yaml", ["epochs=3", "global_batch_size=8"])
    assert alone.arch == nested.arch and alone.args().epochs == 3


def test_data_path_of_hrm(tmp_path):
    (tmp_path / "a.yaml").write_text("data_path: data/arc\n")
    assert read_settings(tmp_path / "a.yaml").data_paths == ["data/arc"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["epoch=3"], r"^epoch \(value 3\) is not known: did you mean epochs\?"),
        (["learning_rate=3"], r"did you mean lr\?"),
        (["batch_size=3"], r"did you mean global_batch_size\?"),
        (
            ["arch.H_layer=3"],
            r"^arch\.H_layer \(value 3\) is not known: did you mean H_layers\?",
        ),
        (["lr"], "no setting: give KEY=VALUE"),
        (["=3"], "no setting: give KEY=VALUE"),
        (["lr=[1"], "not YAML"),
        (["data_paths=3"], "data_paths is 3; it must be a folder's path or a list of them"),
        (["evaluators=[sudoku@S]"], "evaluators is .*; it must be a list, of arc@ARC or empty"),
        (["arch=[1]"], "arch is .*; it must be the name of a file in arch/"),
    ],
)
def test_words_that_are_refused(files, words, message):
    with pytest.raises(ValueError, match=message):
        read_settings(files / "cfg_pretrain.yaml", words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["arch.name=trm_singlez"], "name is 'trm_singlez'; it must be trm or hrm"),
        (["arch.name=null"], "the settings lack name"),
        (["arch.loss=mse"], "loss is 'mse'; it must be stablemax_cross_entropy or"),
        (["arch.halt_max_steps=0"], "halt_max_steps is 0; it must be a whole number from 1 to"),
        (["arch.halt_max_steps=1e9"], "halt_max_steps is 1000000000.0; it must be a whole number"),
        (["arch.halt_max_steps=1000000"], "halt_max_steps is 1000000; .* from 1 to 10000"),
        (["arch.halt_exploration_prob=2"], "halt_exploration_prob is 2"),
        (["arch.seq_len=7"], "seq_len is 7 in the settings and 9 in the data"),
    ],
)
def test_architectures_that_cannot_be(files, words, message):
    found = read_settings(files / "cfg_pretrain.yaml", words)
    with pytest.raises((ValueError, TypeError), match=message):
        make_head(found.arch, **SIZES)


def test_missing_keys(files):
    with pytest.raises(ValueError, match="lack global_batch_size and epochs: give them"):
        read_settings(files / "arch" / "trm.yaml").args()
    (files / "cfg_pretrain.yaml").write_text("defaults: [{arch: gone}]\n")
    with pytest.raises(OSError, match="gone"):
        read_settings(files / "cfg_pretrain.yaml")
    (files / "cfg_pretrain.yaml").write_text("defaults: [{data: gone}]\n")
    with pytest.raises(ValueError, match="defaults has"):
        read_settings(files / "cfg_pretrain.yaml")
