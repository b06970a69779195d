"""Runs the training scripts of `mlx_scripts`, under mlx-lm or, with their imports changed, here.

A script's `main(model, out, iters)` finds beside the folder of its model a teacher, data and an
adapter to begin with, which `write_room` makes.
"""

import json
import re
import runpy
from pathlib import Path

import numpy as np
from safetensors import safe_open
from safetensors.numpy import save_file

SCRIPTS = Path(__file__).resolve().parent / "mlx_scripts"
NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py"))

#: What porting a script is, as sed would do it: s/from mlx_lm/from pyloss.mlx_lm/ and so on.
SUBSTITUTIONS = (
    (r"from mlx_lm", "from pyloss.mlx_lm"),
    (r"import mlx_lm", "import pyloss.mlx_lm"),
    (r"import mlx\.", "import pyloss.mlx."),
    (r"from mlx\.", "from pyloss.mlx."),
)
RANK = 4


def ported(text):
    """The script with changed imports: the first of each on a line, as sed does it."""
    lines = text.split("\n")
    for pattern, new in SUBSTITUTIONS:
        lines = [re.sub(pattern, new, line, count=1) for line in lines]
    return "\n".join(lines)


def run(name, model, out, iters=10):
    """What the script returns under mlx-lm."""
    return runpy.run_path(str(SCRIPTS / f"{name}.py"))["main"](str(model), str(out), iters)


def run_ported(name, model, out, iters=10):
    """What it returns under pyloss; the changed script is left in `out`."""
    out.mkdir(parents=True, exist_ok=True)
    script = out / f"{name}.py"
    script.write_text(ported((SCRIPTS / f"{name}.py").read_text(encoding="utf-8")), "utf-8")
    return runpy.run_path(str(script))["main"](str(model), str(out), iters)


def write_room(folder, repeat=1):
    """Data and a first adapter beside `folder/model`; longer texts with a larger `repeat`."""
    rng = np.random.default_rng(0)
    data = folder / "data"
    data.mkdir(parents=True, exist_ok=True)
    for split, count in (("train", 16), ("valid", 6), ("test", 4)):
        _write(data / f"{split}.jsonl", [_chat(rng, repeat) for _ in range(count)])
    chats = [_chat(rng, repeat)["messages"] for _ in range(10)]
    _write(
        data / "questions.jsonl",
        [{"prompt": ask["content"], "completion": say["content"]} for ask, say in chats],
    )
    _write(
        data / "pairs.jsonl",
        [
            {"prompt": ask["content"], "chosen": say["content"], "rejected": other["content"]}
            for (ask, say), (_, other) in zip(chats, chats[1:] + chats[:1], strict=True)
        ],
    )
    (folder / "start").mkdir(exist_ok=True)
    save_file(first_adapter(folder / "model"), folder / "start" / "adapters.safetensors")


def _chat(rng, repeat):
    """Sums in words, with weights that `own_dataset` reads."""
    a, b = (int(x) for x in rng.integers(2, 60, 2))
    question = f"How much is {a} and {b}, for {('cats', 'hens', 'boats')[a % 3]}? " * repeat
    answer = f"It is {a + b}, " + "as tens add up. " * int(rng.integers(1, 2 + repeat))
    turns = [("user", question.strip()), ("assistant", answer.strip())]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"messages": messages, "weight": float(rng.choice([0.5, 1.0, 2.0]))}


def _write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def first_adapter(model):
    """LoRA's factors for all projections of a folder's layers; the second ones are 0."""
    rng, found = np.random.default_rng(17), {}
    for path in sorted(Path(model).glob("*.safetensors")):
        with safe_open(path, "numpy") as file:
            shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}
        for name in sorted(shapes):
            if name.startswith("model.layers.") and name.endswith("_proj.weight"):
                outputs, inputs = shapes[name]
                at, bound = name.removesuffix(".weight"), inputs**-0.5
                a = rng.uniform(-bound, bound, (inputs, RANK))
                found[f"{at}.lora_a"] = a.astype(np.float32)
                found[f"{at}.lora_b"] = np.zeros((RANK, outputs), np.float32)
    return found
