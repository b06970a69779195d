"""docs/distributed.md: its files and commands are such as their readers take."""

import re
import shlex
import subprocess
from pathlib import Path

import pytest
from launching import environment, needs_mpi

from pyloss.cli.flags import build_parser

PAGE = (Path(__file__).parents[2] / "docs" / "distributed.md").read_text(encoding="utf-8")


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", PAGE, re.DOTALL)


def commands():
    """The pyloss commands in the page's shell blocks."""
    lines = "\n".join(blocks("sh")).replace("\\\n", " ").splitlines()
    return [line[line.index("pyloss ") :] for line in lines if re.search(r"^(mpirun|srun)", line)]


def test_commands_of_the_page_are_accepted():
    assert len(commands()) == 4
    for line in commands():
        words = [word for word in shlex.split(line, comments=True) if word != "$resume"]
        assert build_parser().parse_args(words[1:]).command == "train"


@pytest.mark.parametrize("block", blocks("sh"))
def test_the_shell_reads_its_blocks(block):
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_batch_file_asks_slurm_for_what_the_page_says():
    (batch,) = [block for block in blocks("sh") if "#SBATCH" in block]
    assert batch.startswith("#!/bin/bash\n#SBATCH")
    options = dict(re.findall(r"^#SBATCH --([a-z-]+)=(\S+)$", batch, re.MULTILINE))
    assert options["signal"] == "TERM@120" and {"nodes", "ntasks-per-node"} <= set(options)
    assert "srun --mpi=pmix" in batch and "--kill-on-bad-exit=1" in batch


@needs_mpi
def test_mpirun_takes_the_host_file_and_the_options(tmp_path):
    """With this machine in the place of the desktops, and `true` in the place of pyloss."""
    (hosts,) = blocks("text")
    assert re.fullmatch(r"(\w+ +slots=1\n)+", hosts)
    file = tmp_path / "hosts"
    file.write_text("localhost slots=3\n")
    (line,) = [block for block in blocks("sh") if "--hostfile" in block]
    words = shlex.split(line.replace("\\\n", " "))
    words = words[: words.index("pyloss")]
    words[words.index("hosts")] = str(file)
    words = [word.replace("192.168.1.0/24", "127.0.0.1/8") for word in words]
    own = ["--allow-run-as-root", "--oversubscribe", "true"]
    done = subprocess.run(
        [*words, *own], capture_output=True, text=True, env=environment(), timeout=60
    )
    assert done.returncode == 0, done.stderr


def test_python_on_the_page_runs():
    for block in blocks("python"):
        exec(block, {})
