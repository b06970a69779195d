"""`pyloss generate --prompts`: answers all prompts of a file, many at a time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pyloss.random
from pyloss.cli.commands.generating import warn_of_context
from pyloss.cli.commands.shared import Flags
from pyloss.distributed import Group
from pyloss.errors import counted
from pyloss.generation import BatchGenerator, BatchStats, SamplingParams
from pyloss.io.console import say
from pyloss.io.files import check_target, replacing, user_path
from pyloss.io.outputs import output
from pyloss.tuner.data.records import Record, Records, check_messages, field, keys_of
from pyloss.tuner.progress import ProgressReporter

#: the fields of an answer, in the order of the output
RESULTS = ("completion", "finish_reason", "prompt_tokens", "completion_tokens")
#: fields of a line that set the sampling of its answer
SAMPLING = tuple(f.name for f in fields(SamplingParams) if f.name != "sampler")
_SECONDS = 10  # between lines of progress

#: makes a line's token ids from its conversation
Encode = Callable[[list[dict[str, Any]], Any], list[int]]


def check_files(flags: Flags) -> Records:
    """The lines of --prompts, each with its prompt; refuses what cannot be read or written.

    FormatError or ValueError name the file and the line.
    """
    if flags["output"] is None:
        raise ValueError("--prompts needs --output, the file that the answers are written to")
    source, target = user_path(flags["prompts"]), user_path(flags["output"])
    check_target(flags["output"], ending=".jsonl")
    if target.exists() and source.exists() and target.samefile(source):
        raise ValueError(f"--output {flags['output']} is the file of --prompts: give another")
    records = Records(source)
    if not records:
        raise ValueError(f"{source} holds no prompts")
    for index, record in enumerate(records):
        _check_record(record, records.where(index))
        params_of(record, SamplingParams(), records.where(index))
    return records


def _check_record(record: Record, where: str) -> None:
    if ("prompt" in record) == ("messages" in record):
        raise ValueError(
            f"{where}: the record must have either 'prompt' or 'messages'; "
            f"its keys are {keys_of(record)}"
        )
    taken = [name for name in RESULTS[1:] if name in record]
    if "completion" in record and "reference" in record:
        taken.insert(0, "completion")
    if taken:
        raise ValueError(f"{where}: {taken[0]!r} is a field of the output: rename it")
    if "prompt" in record:
        field(record, "prompt", str, where, "'prompt' or 'messages'")
        return
    check_messages(record, "messages", where)
    if record["messages"][-1]["role"] == "assistant":
        raise ValueError(
            f"{where}: 'messages' ends with the assistant's message, in the place of the answer"
        )


def params_of(record: Record, common: SamplingParams, where: str) -> SamplingParams:
    """The sampling of a line: `common`, and its own fields in their place."""
    own = {name: record[name] for name in SAMPLING if name in record}
    try:
        return replace(common, **own)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{where}: {error}") from None


def generate_file(
    flags: Flags, records: Records, model: Any, tokenizer: Any, encode: Encode, group: Group
) -> None:
    """Answers `records` and writes --output, in the order of the lines; ranks share the lines."""
    common = SamplingParams(
        max_tokens=flags["max_tokens"],
        temperature=flags["temp"],
        top_p=flags["top_p"],
        min_p=flags["min_p"],
        top_k=flags["top_k"],
        seed=flags["seed"],
    )
    prompts, params = [], []
    for index, record in enumerate(records):
        where = records.where(index)
        messages = record.get("messages") or [{"role": "user", "content": record["prompt"]}]
        try:
            prompts.append(encode(messages, record.get("tools")))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{where}: {error}") from None
        if not prompts[-1]:
            raise ValueError(f"{where}: the prompt has no tokens")
        params.append(params_of(record, common, where))
    warn_of_context(prompts, model)
    own = group.share(len(prompts))
    generator = BatchGenerator(model, tokenizer, flags["batch_size"])
    running = generator.run([prompts[i] for i in own], [params[i] for i in own])
    at_once = min(flags["batch_size"], len(prompts))
    of_rank = " on each rank" if group.size() > 1 else ""
    say(
        f"{counted(len(prompts), 'prompt')}, up to {at_once} at a time{of_rank}; "
        f"keys and values take at most {generator.stats.cache_bytes / 1e6:.0f} MB{of_rank}"
    )
    target = user_path(flags["output"])
    if group.size() == 1:
        with output(target, overwrite=flags["overwrite"]), replacing(target) as part:
            _write(part, records, running, generator)
    else:
        # Answers that are drawn without a seed must not repeat on other ranks.
        with pyloss.random.branch(group.rank()):
            answers = {done.index: done for done in running}
        lines = group.collect([_line(records[i], answers[k]) for k, i in enumerate(own)])

        def write() -> None:
            with output(target, overwrite=flags["overwrite"]), replacing(target) as part:
                part.write_text("".join(f"{line}\n" for line in lines), "utf-8", newline="\n")

        group.first(write)
    stats = _of_all(group.all_gather(generator.stats))
    say(f"wrote {flags['output']}")
    if flags["verbose"]:
        say(
            f"[prompts {stats.prompt_tokens} tokens, {stats.prompt_tps:.1f} tokens/s, "
            f"generation {stats.generation_tokens} tokens, {stats.generation_tps:.1f} tokens/s]"
        )


def _of_all(ranks: Sequence[BatchStats]) -> BatchStats:
    """What ranks that worked side by side have done together."""
    return BatchStats(
        prompt_tokens=sum(each.prompt_tokens for each in ranks),
        generation_tokens=sum(each.generation_tokens for each in ranks),
        prompt_time=max(each.prompt_time for each in ranks),
        generation_time=max(each.generation_time for each in ranks),
    )


def _write(part: Path, records: Records, running: Any, generator: BatchGenerator) -> None:
    """Writes answers as they end; those that end early wait for the lines before them."""
    progress, ended, said = ProgressReporter(len(records)), {}, time.monotonic()
    written = 0
    try:
        with open(part, "w", encoding="utf-8", newline="\n") as file:
            for count, done in enumerate(running, 1):
                ended[done.index] = done
                while written in ended:
                    file.write(_line(records[written], ended.pop(written)) + "\n")
                    file.flush()
                    written += 1
                speed = f"{generator.stats.generation_tps:.1f} tokens/s"
                progress.step(speed)
                if time.monotonic() - said >= _SECONDS and progress.bar is None:
                    said = time.monotonic()
                    progress.line(f"{count}/{len(records)} answers, {speed}")
    finally:
        progress.close()


def _line(record: Record, done: Any) -> str:
    own = {("reference" if key == "completion" else key): value for key, value in record.items()}
    values = (done.text, done.finish_reason, done.prompt_tokens, len(done.tokens))
    return json.dumps(own | dict(zip(RESULTS, values, strict=True)), ensure_ascii=False)
