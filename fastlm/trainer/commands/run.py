"""`fastlm pretrain`, and `fastlm resume` of any run: a text that is read, and a run over it from end to end."""

from dataclasses import replace
from pathlib import Path

from fastlm.objectives.rows import RowObjective
from fastlm.trainer import memory
from fastlm.trainer.commands import finetune
from fastlm.trainer.commands.ready import Read, altered, begin, go_on, heard
from fastlm.trainer.commands.start import begun_from
from fastlm.trainer.data.corpus import find
from fastlm.trainer.data.shards.folders import packed_of
from fastlm.trainer.data.shards.packed import checked
from fastlm.trainer.data.text import Text
from fastlm.trainer.data.tokens import sha256, tokenize
from fastlm.trainer.material import check_unchanged
from fastlm.trainer.options import plugins
from fastlm.trainer.options.config import Config
from fastlm.trainer.options.flags import given
from fastlm.trainer.outputs import lines
from fastlm.trainer.outputs.console import Console
from fastlm.trainer.outputs.metrics import read_rows
from fastlm.trainer.plan import Plan, keeping, new_folder
from fastlm.trainer.words import Refusal, command, disk_words, say, several


def pretrain(config: Config, argv: list[str]) -> int:
    """Train a model, from nothing or from the weights of --from; return the exit status. Raises Refusal before any work
    is lost, Failure if training fails.

    argv: the command line, which says which of the fields were asked for.
    """
    plugins.load(config.plugin)
    start = None
    with heard(config, "nothing was begun") as here:
        if config.from_ is not None:
            config, start = begun_from(config, given(argv, Config), lambda line: here.console.say("note", line))
        config.check()
        with new_folder(config.out, here.ranks) as folder:
            return begin(folder, config.settled(), argv, here, read, start).train()


def resume(folder: Path, imported: tuple[str, ...] = ()) -> int:
    """Go on with an interrupted run, exactly as if it had not been; return the exit status. Raises Refusal, Failure.

    imported: the plugins that were given for it, in this process.
    """
    go_on_with = f"go on with `{command('resume', folder)}`"
    plan = Plan.read(folder)
    if (folder / "report.md").exists():
        done = read_rows(folder / "metrics.jsonl")[-1]["step"]
        trained = f"all {several(plan.steps, 'step')} are trained"
        if done < plan.steps:
            trained = f"--patience {plan.config.patience} ended it after step {done:,} of {plan.steps:,}"
        finished = f"{folder} is finished: {trained}"
        shows = command("predict", folder, "FILE") if plan.config.command == "finetune" else command("sample", folder)
        say("done", f"{finished}; `{shows}` shows what it learned")
        return 0
    plugins.require(plan.config.plugin, imported, folder)
    try:
        plan.config.check()
    except TypeError as error:
        raise Refusal(altered(folder, error)) from error
    with heard(plan.config, f"nothing was changed; {go_on_with}") as here, keeping(folder, here.ranks):
        try:
            run = go_on(folder, plan, here, READERS[plan.config.command])
        except OSError as error:
            raise Refusal(disk_words(error, folder, "nothing was changed", go_on_with)) from error
        return run.train()


def read(config: Config, console: Console, tokenizer_file: Path | None, fingerprint: str | None) -> tuple[Config, Text]:
    """Find the text and its ids, and say what they are; arguments as in `ready.Read`."""
    if config.plugin:
        console.say("plugin", *config.plugin)
    if (folder := packed_of(config.data)) is not None:
        return _read_packed(folder, config, console, tokenizer_file, fingerprint)
    corpus = find(config.data, config.text_key, config.validation)
    console.say_all(lines.of_text(corpus))
    check_unchanged(f"{'--data ' * bool(config.data)}{corpus.name}", corpus.fingerprint, fingerprint)
    memory.check(config, corpus.bytes)
    building = f"building a vocabulary of {config.vocab:,} and encoding the text, once"
    if config.from_ is not None:
        building = f"encoding the text by the tokenizer of {config.from_}, once"
    learned = config.from_ is None
    tokens = tokenize(corpus, config.vocab, tokenizer_file, lambda: console.say("tokens", building), learned)
    console.say_all(lines.of_tokens(config, tokens))
    return config, Text(corpus, tokens)


def _read_packed(
    folder: Path, config: Config, console: Console, tokenizer_file: Path | None, fingerprint: str | None
) -> tuple[Config, Text]:
    """The same of a folder of shards, whose tokenizer is the run's."""
    packed = checked(folder)
    if tokenizer_file is not None and sha256(tokenizer_file) != packed.manifest["tokenizer"]:
        raise Refusal(
            f"--data {folder} was packed by another tokenizer than the model's; pack it with --tokenizer "
            f"{config.from_ or tokenizer_file}"
        )
    if config.vocab not in (packed.vocab_size, Config.vocab):
        raise Refusal(
            f"--vocab {config.vocab} contradicts --data {folder}, which has {packed.vocab_size}; leave it out"
        )
    if config.weights and not issubclass(config.objective_class(), RowObjective):
        raise Refusal(
            f"--weights are of rows, and --objective {config.objective_class().name} pairs texts; leave them out"
        )
    console.say_all(lines.of_text(packed))
    check_unchanged(f"--data {folder}", packed.fingerprint, fingerprint)
    config = replace(config, vocab=packed.vocab_size)
    memory.check(config, packed.bytes)
    tokens = packed.tokens(config.weights)
    console.say_all(lines.of_tokens(config, tokens))
    return config, Text(packed, tokens)


READERS: dict[str, Read] = {"pretrain": read, "finetune": finetune.read}
