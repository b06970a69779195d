"""`pyloss train-recursive`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pyloss.checks.numbers import whole
from pyloss.cli.commands.shared import Flags
from pyloss.io.console import colored, out, say
from pyloss.io.files import check_target, user_path, write_text
from pyloss.recursive.checkpoints import load_checkpoint
from pyloss.recursive.data import PuzzleDataset
from pyloss.recursive.data.arc_votes import ArcVotes
from pyloss.recursive.evaluation import RecursiveEvaluation, evaluate_recursive, steps_of
from pyloss.recursive.pictures import steps_svg, steps_text
from pyloss.recursive.run_files import CONFIG_FILE, load_recursive
from pyloss.recursive.settings import (
    FROM_DATA,
    RecursiveSettings,
    check_arch,
    make_head,
    read_settings,
)
from pyloss.recursive.training import train_recursive as run
from pyloss.runtime import precision
from pyloss.tuner.callbacks import get_reporting_callbacks

#: the folder of a run whose settings name none
FOLDER = "recursive"


def train_recursive(flags: Flags) -> int:
    """`pyloss train-recursive`: trains, or evaluates the model of a run."""
    show = whole(flags["show"] or 0, "--show", 0)
    if flags["picture"] is not None:
        check_target(flags["picture"], ending=".svg")
    settings, folder = _settings(flags)
    if flags["test_only"]:
        if flags["resume"]:
            raise ValueError("--resume trains on, and --test-only does not train: give one of them")
        return _test(flags, settings, folder, show)
    with _values_of_a_file():
        args = settings.args()
    check_target(folder, folder=True)
    train_set, test_set = _data(settings)
    _check_shown(test_set, show, flags["picture"])
    sizes = {name: getattr(train_set, name) for name in FROM_DATA}
    with _values_of_a_file():
        check_arch(settings.arch, **sizes, batch_size=args.global_batch_size)
    head = None
    if settings.load_checkpoint is not None:
        head = make_head(settings.arch, **sizes, batch_size=args.global_batch_size)
        load_checkpoint(head.model, settings.load_checkpoint)
        # Said after all checks: a refused run prints its error alone.
        say(f"starting from {settings.load_checkpoint}")
    if settings.unused:
        say(f"note: without effect here: {', '.join(settings.unused)}")
    kept = ("data_paths", "data_paths_test", "evaluators")
    callback = get_reporting_callbacks(
        flags["report_to"],
        flags["project_name"] or settings.project_name,
        str(folder),
        {**settings.arch, **settings.training},
    )
    try:
        head, result = run(
            settings.arch,
            train_set,
            test_set,
            args,
            folder=folder,
            head=head,
            resume=flags["resume"],
            overwrite=flags["overwrite"],
            config={name: found for name in kept if (found := getattr(settings, name))},
            callback=callback,
            votes=_votes(settings) if test_set is not None else None,
        )
    finally:
        if callback is not None:
            callback.close()
    if result.evaluation is not None:
        _print(result.evaluation)
    _show(head, test_set, show, flags["picture"])
    return 0


def _settings(flags: Flags) -> tuple[RecursiveSettings, Path]:
    """The settings of the flags and the file, or of the run's folder without one; the folder."""
    file = flags["config"]
    again = flags["resume"] or flags["test_only"]
    if file is None and again:
        file = user_path(flags["output"] or FOLDER) / CONFIG_FILE
    settings = read_settings(file, flags["settings"])
    for name in ("max_time", "matmul_precision"):
        if flags[name] is not None:
            settings.training[name] = flags[name]
    if flags["data"] is not None:
        named = any(word.lstrip("+").startswith("data_paths_test=") for word in flags["settings"])
        settings.data_paths = [flags["data"]]
        settings.data_paths_test = settings.data_paths_test if named else []
    if flags["load_checkpoint"] is not None:
        settings.load_checkpoint = flags["load_checkpoint"]
    return settings, user_path(flags["output"] or settings.checkpoint_path or FOLDER)


def _data(settings: RecursiveSettings, train: bool = True) -> tuple[Any, Any]:
    """The puzzles to train on and to evaluate; None for the latter where there are none."""
    if not settings.data_paths:
        raise ValueError("no data: give --data, or data_paths in the file, folders of puzzles")
    tests = settings.data_paths_test or settings.data_paths
    train_set = _joined(settings.data_paths, "train") if train else None
    if train and not all((user_path(path) / "test").is_dir() for path in tests):
        say("note: the data have no split test: nothing is evaluated")
        return train_set, None
    return train_set, _joined(tests, "test")


def _joined(paths: list[str], split: str) -> Any:
    found = [PuzzleDataset.load(path, split) for path in paths]
    if len(found) > 1:
        raise ValueError(
            f"{len(found)} folders of puzzles are given: {', '.join(paths)}; one is read"
        )
    return found[0]


def _test(flags: Flags, settings: RecursiveSettings, folder: Path, show: int) -> int:
    """Evaluates the model of a run, and prints how often it is right at each step."""
    _, test_set = _data(settings, train=False)
    head = load_recursive(settings.load_checkpoint or folder)
    size = settings.training.get("global_batch_size") or 64
    with precision.matmul_precision(settings.training.get("matmul_precision")):
        votes = _votes(settings)
        batches = test_set.batches(size, train=False)
        _print(evaluate_recursive(head, batches, None if votes is None else votes()))
        _show(head, test_set, show, flags["picture"])
    return 0


def _votes(settings: RecursiveSettings) -> Callable[[], ArcVotes] | None:
    """Makes the votes of an evaluation, where the settings ask for them."""
    if not settings.evaluators:
        return None
    folder = (settings.data_paths_test or settings.data_paths)[0]
    ArcVotes.load(folder)  # an error comes before the training
    return lambda: ArcVotes.load(folder)


def _print(found: RecursiveEvaluation) -> None:
    out(f"{found.table()}\n{found}")
    for name, number in found.metrics.items():
        if name.startswith("ARC/"):
            out(f"{name} {number:.2%}")


def _check_shown(test_set: Any, count: int, picture: str | None) -> None:
    """Refuses --show and --picture without puzzles, before a run trains for hours."""
    if test_set is None and (count or picture is not None):
        raise ValueError("--show and --picture need the test split of the data")


@contextmanager
def _values_of_a_file() -> Iterator[None]:
    """Makes TypeErrors in the block ValueErrors: the values come from a file or from words."""
    try:
        yield
    except TypeError as error:
        raise ValueError(str(error)) from error


def _show(head: Any, test_set: Any, count: int, picture: str | None) -> None:
    """Prints puzzles being solved, and draws the first one."""
    if not count and picture is None:
        return
    rows = min(max(count, 1), len(test_set))
    batch = next(iter(test_set.batches(rows, train=False)))
    model = head.model
    found = steps_of(model, batch["inputs"], batch["labels"], batch["puzzle_identifiers"])
    for index in range(min(count, rows)):
        out("\n" + steps_text(found, index, model.config.vocab_size, colored()))
    if picture is not None:
        write_text(picture, steps_svg(found, 0, model.config.vocab_size))
        say(f"drew the first puzzle in {picture}")
