"""The command line: a verb says what happens to the model, ``--method`` says how.

Each verb that works on a model is a recipe of one stage; its flags are the keys of the method's configuration.
"""

from __future__ import annotations

import difflib
import hashlib
import inspect
import os
import re
import sys
import types
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import tyro
from tyro.conf import OmitArgPrefixes, Positional, UseAppendAction

import tenfold
from tenfold.compat import quiet_upstream
from tenfold.config.base import Config
from tenfold.config.stage import StageConfig
from tenfold.errors import ConfigError, TenfoldError
from tenfold.flags import flags_of, in_our_words, readable_help, with_flags

EXAMPLES = {
    "run": (
        "tenfold run recipes/quickstart.yaml --out runs/quickstart",
        "tenfold run recipes/quickstart.yaml --set model=HuggingFaceTB/SmolLM2-360M --set adalora.data=my.jsonl",
    ),
    "validate": ("tenfold validate recipes/quickstart.yaml",),
    "estimate": (
        "tenfold estimate recipes/quickstart.yaml",
        "tenfold estimate recipes/quickstart.yaml --set adalora.budget=1%",
    ),
    "ls": ("tenfold ls", "tenfold ls runs"),
    "compare": ("tenfold compare runs/first runs/second",),
    "env": ("tenfold env",),
}
"""Of the verbs that work on recipes and runs; those of stages stand in their configurations."""


def examples(verb: str) -> tuple[str, ...]:
    """Command lines that work, of one verb."""
    from tenfold.pipeline.stages import stages, verbs

    if verb in EXAMPLES:
        return EXAMPLES[verb]
    return tuple(line for name in verbs()[verb] for line in stages()[name].examples)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code: 0 done, 1 failed while working, 2 bad input, 130 interrupted."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    quiet_upstream()
    os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")
    # Hub clients and tokenizers are chatty, and bars of others break ours; what matters is on our own progress line.
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers' bars as well
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        return _dispatch(arguments)
    except SystemExit as stop:  # tyro: 0 after --help, 2 after a wrong flag
        return stop.code if isinstance(stop.code, int) else 2
    except TenfoldError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _complain("interrupted\n  -> give the same command again to go on from the last checkpoint")
        return 130
    except BrokenPipeError:  # `tenfold ls | head` has what it wanted
        sys.stderr.close()
        return 0
    except Exception as error:
        if debug:
            raise
        _complain(_unexpected(error))
        return 1


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_overview())
        return 0
    if arguments[0] == "--version":
        print(tenfold.__version__)
        return 0
    verb, rest = arguments[0], arguments[1:]
    if verb in COMMANDS:
        return _parse(COMMANDS[verb], verb, rest)
    from tenfold.pipeline.stages import verbs

    if verb in verbs():
        return _stage_verb(verb, rest)
    near = difflib.get_close_matches(verb, [*COMMANDS, *verbs()], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise ConfigError(f"unknown verb {verb!r}{hint}", remedy="tenfold --help lists the verbs")


def _overview() -> str:
    from tenfold.pipeline.stages import stages, verbs

    lines = [f"tenfold {tenfold.__version__}: the life of an open-weight language model under a budget", "", "verbs:"]
    for verb, command in COMMANDS.items():
        lines.append(f"  {verb:<10}{(command.__doc__ or '').splitlines()[0].rstrip('.')}")
    for verb, methods in verbs().items():
        first = stages()[methods[0]]
        lines.append(f"  {verb:<10}{first.verb_summary or first.summary}")
    lines += ["", "examples:", *(f"  {examples(verb)[0]}" for verb in ("run", "adapt", "evaluate"))]
    lines += ["", "`tenfold VERB --help` shows the flags of a verb; --debug anywhere shows tracebacks."]
    return "\n".join(lines)


def _parse(
    command: Callable[..., int],
    verb: str,
    arguments: list[str],
    note: str = "",
    classes: Sequence[type[Config]] = (),
    elsewhere: Mapping[str, str] = types.MappingProxyType({}),
) -> int:
    shown = examples(verb)
    summary = inspect.cleandoc(command.__doc__ or "").partition("\n\nArgs:")[0]
    description = f"{summary}{note}\n\nexamples:\n" + "".join(f"  {line}\n" for line in shown)
    try:
        with (
            in_our_words(verb, arguments, classes, next(iter(shown), f"tenfold {verb} --help"), elsewhere),
            readable_help(arguments),
        ):
            return tyro.cli(command, prog=f"tenfold {verb}", description=description, args=arguments)
    except _RefusedError as refused:
        raise refused.error from None


class _RefusedError(Exception):
    """Carries what is wrong with the flags past tyro, which would show pydantic's words for it."""

    def __init__(self, error: TenfoldError) -> None:
        super().__init__(str(error))
        self.error = error


def _checked(config_class: Any, where: str, group: str = "") -> Any:
    """The class with errors in our words, and flags of groups that name the group: ``--paper.init``."""
    groups = {key: _checked(kind, where, f"{key}.") for key, kind in config_class.groups().items()}
    kinds = get_type_hints(config_class, include_extras=True) | groups

    class Checked(config_class):
        __doc__ = _plain(config_class.__doc__ or "")
        if group:
            __annotations__ = {
                key: Annotated[kinds[key], tyro.conf.arg(name=f"{group}{key}")] for key in config_class.model_fields
            }
            locals().update({key: field.default for key, field in config_class.model_fields.items()})
        else:
            __annotations__ = groups
            locals().update({key: kind() for key, kind in groups.items()})

        def __init__(self, **values: Any) -> None:
            try:
                config_class.parse(values, where)
            except ConfigError as error:
                raise _RefusedError(with_flags(error, where, where, config_class, group)) from None
            super().__init__(**values)

    for key, field in Checked.model_fields.items():
        field.description = " ".join(_plain(config_class.model_fields[key].description or "").split())
    return Checked


def _plain(text: str) -> str:
    """Help without the marks that only the reference shows."""
    return re.sub(r",? ?:math:`[^`]*`", "", inspect.cleandoc(text)).lstrip(", ").replace("``", "")


def run(
    recipe: Annotated[Positional[Path], tyro.conf.arg(metavar="RECIPE")],
    out: Path | None = None,
    set: UseAppendAction[tuple[str, ...]] = (),
) -> int:
    """Execute a recipe, or go on where it stopped.

    Args:
        recipe: YAML file with a model and stages.
        out: the run folder; default runs/NAME-OF-THE-RECIPE.
        set: change keys of the recipe: model=demo, seed=1, adalora.budget=1%.
    """
    return _execute(_read(recipe, set), out or Path("runs") / recipe.stem)


def validate(
    recipe: Annotated[Positional[Path], tyro.conf.arg(metavar="RECIPE")],
    set: UseAppendAction[tuple[str, ...]] = (),
) -> int:
    """Check a recipe and its data without loading a model.

    Args:
        recipe: YAML file with a model and stages.
        set: change keys of the recipe, as in run.
    """
    from tenfold.pipeline.run import check

    for line in check(_read(recipe, set)):
        print(line)
    print("valid")
    return 0


def estimate(
    recipe: Annotated[Positional[Path], tyro.conf.arg(metavar="RECIPE")],
    set: UseAppendAction[tuple[str, ...]] = (),
) -> int:
    """Predict trainable parameters, memory and cache of a recipe from the model's configuration alone.

    Args:
        recipe: YAML file with a model and stages.
        set: change keys of the recipe, as in run.
    """
    from tenfold.pipeline.estimate import estimate as predict

    for step in predict(_read(recipe, set)):
        if step.rows:
            _table(step.title, ("what", "value"), step.rows)
        else:
            print(f"{step.title}: not estimated")
    return 0


def ls(folder: Positional[Path | None] = None) -> int:
    """List the methods, or the runs in a folder.

    Args:
        folder: a folder of runs; without it the methods are listed.
    """
    if folder is None:
        from tenfold.pipeline.stages import stages

        rows = [(name, f"tenfold {stage.verb}", stage.summary) for name, stage in stages().items()]
        _table(
            "methods and stages (`use:` in a recipe, `--method` on the command line)", ("name", "verb", "what"), rows
        )
        return 0
    from tenfold.report.load import load_run
    from tenfold.report.terminal import figures

    found = sorted({path.parent for path in folder.glob("**/recipe.yaml")})
    if not found:
        problem = "no run in it" if folder.is_dir() else "no such folder"
        raise ConfigError(f"{folder}: {problem}", remedy="give a folder that holds run folders, such as runs")
    runs: list[tuple[str, ...]] = []
    for path in found:
        _, summaries, _ = load_run(path)
        _, measured = figures(summaries)
        first = ""
        if measured:
            name, *values, unit = measured[0]
            first = f"{name} {' -> '.join(filter(None, values))} {unit}".rstrip()
        runs.append((str(path), " ".join(summary.stage for summary in summaries), first))
    _table(f"runs in {folder}", ("run", "finished stages", "first figure"), runs)
    return 0


def compare(first: Positional[Path], second: Positional[Path]) -> int:
    """Compare two runs: figures and configuration.

    Args:
        first: a run folder.
        second: another.
    """
    from tenfold.report.compare import compare_configs, compare_runs, config_cells, metric_cells
    from tenfold.report.load import load_run

    a, b = load_run(first)[1], load_run(second)[1]
    _table(f"figures: {first} against {second}", *metric_cells(compare_runs(a, b)))
    differences = compare_configs(a, b)
    if differences:
        _table("what was set differently", *config_cells(differences))
    return 0


def env() -> int:
    """Show versions and machine, for bug reports."""
    from tenfold.pipeline.environment import environment
    from tenfold.stage.numbers import quantity

    found = environment()
    memory = found.pop("memory_bytes")
    found |= {"memory": quantity(memory, "bytes"), "devices": ", ".join(found["devices"])}
    for key, value in {**found.pop("versions"), **found}.items():
        print(f"{key:<14}{value}")
    return 0


COMMANDS: dict[str, Callable[..., int]] = {
    "run": run,
    "validate": validate,
    "estimate": estimate,
    "ls": ls,
    "compare": compare,
    "env": env,
}


def _stage_verb(verb: str, arguments: list[str]) -> int:
    """Parse the flags of the method's configuration and run a recipe of one stage."""
    from tenfold.pipeline.stages import stage, verbs

    use, arguments = _method(verb, verbs()[verb], arguments)
    cls = stage(use)
    model_fields = _model_flags(cls)
    config_class, model_class = (_checked(one, f"tenfold {verb}") for one in (cls, model_fields))

    def command(model: Any, method: Any, out: Path | None = None) -> int:
        values = {**model.model_dump(), "stages": [{"use": use, **method.model_dump(exclude_unset=True)}]}
        if out is not None and out.suffix in cls.out_files:  # the file, and its run folder beside it
            key = cls.out_files[out.suffix]
            if values["stages"][0].get(key) is not None:
                raise ConfigError(f"--out {out} and --{key} both name the file", remedy="give one of them")
            values["stages"][0][key] = str(out)
            out = out.with_suffix("")
        from tenfold.pipeline.recipe import resolve

        plan = resolve(values, where=f"tenfold {verb}")
        # The same command finds its own folder again; another one never writes over it.
        settings = hashlib.sha256(plan.to_yaml().encode()).hexdigest()[:6]
        try:
            return _execute(plan, out or Path("runs") / f"{use}-{settings}")
        except TenfoldError as error:  # names the stage and its key, and here are a verb and its flags
            raise with_flags(error, plan.steps[0].folder, f"tenfold {verb}", cls) from error

    command.__annotations__ = {
        "model": Annotated[model_class, OmitArgPrefixes],
        "method": Annotated[config_class, OmitArgPrefixes],
        "out": Annotated[Path | None, tyro.conf.arg(help="The run folder. Default: runs/METHOD-HASH.")],
        "return": int,
    }
    methods = verbs()[verb]
    first = stage(methods[0])
    command.__doc__ = f"{first.verb_summary or first.summary}."
    note = f"\n\n--method: {', '.join(methods)} (these flags are those of {use})" if len(methods) > 1 else ""
    classes = (cls, model_fields)
    return _parse(command, verb, arguments, note, classes, _elsewhere(classes))


def _method(verb: str, methods: list[str], arguments: list[str]) -> tuple[str, list[str]]:
    """Which method of a verb is meant, and the other arguments."""
    default = methods[0]
    if arguments and arguments[0] in methods and len(methods) > 1:  # `steer profile MODEL`: the method as a word
        default, arguments = arguments[0], arguments[1:]
    elif arguments and (near := _near_word(arguments, methods)):
        raise ConfigError(f"unknown method {arguments[0]!r} of {verb}; did you mean {near!r}?", _listed(methods))
    method, arguments = _take(arguments, "--method", default)
    if method not in methods:
        near = next(iter(difflib.get_close_matches(method, methods, n=1)), None)
        hint = f"; did you mean {near!r}?" if near else ""
        raise ConfigError(f"--method: unknown method {method!r} of {verb}{hint}", remedy=_listed(methods))
    return method, arguments


def _model_flags(cls: type[StageConfig]) -> type[Config]:
    """The flags that say which model, of a stage that works on one; else the seed alone."""
    from pydantic import Field, create_model

    from tenfold.config.recipe import ModelFields

    if not cls.needs.model:
        return create_model("Model", __base__=Config, seed=(int, Field(0, description="Every choice follows from it.")))
    source = Field("demo", description="demo, a hub id, a folder (a model or an adapter), or a GGUF file.")
    positional: Any = Annotated[Positional[str], tyro.conf.arg(metavar="MODEL")]
    return create_model("Model", __base__=ModelFields, model=(positional, source))


def _elsewhere(here: Sequence[type[Config]]) -> dict[str, str]:
    """Flags of other methods, and where they belong."""
    from tenfold.pipeline.stages import stages, verbs

    own = flags_of(here)
    found: dict[str, str] = {}
    for name, other in stages().items():
        default = verbs()[other.verb][0] == name
        named = f"tenfold {other.verb}" if default else f"tenfold {other.verb} --method {name}"
        for flag in flags_of([other]):
            if flag not in own:
                found.setdefault(flag, named)
    return found


def _listed(methods: Sequence[str]) -> str:
    return f"methods: {', '.join(methods)}"


def _near_word(arguments: Sequence[str], methods: Sequence[str]) -> str | None:
    """The method that the first of two words was meant for; a single word is the model."""
    if len(methods) < 2 or len(arguments) < 2 or any(word.startswith("-") for word in arguments[:2]):
        return None
    return next(iter(difflib.get_close_matches(arguments[0], methods, n=1)), None)


def _take(arguments: list[str], flag: str, default: str) -> tuple[str, list[str]]:
    """The value of a flag, and the other arguments."""
    for index, argument in enumerate(arguments):
        if argument == flag:
            if index + 1 == len(arguments):
                raise ConfigError(f"{flag}: no value", remedy=f"write {flag} NAME")
            return arguments[index + 1], arguments[:index] + arguments[index + 2 :]
        if argument.startswith(f"{flag}="):
            return argument.partition("=")[2], arguments[:index] + arguments[index + 1 :]
    return default, arguments


def _read(recipe: Path, changes: Sequence[str]) -> Any:
    from tenfold.pipeline.recipe import read_recipe

    return read_recipe(recipe, changes)


def _execute(plan: Any, out: Path) -> int:
    from rich.console import Console
    from rich.text import Text

    from tenfold.pipeline.run import run as execute
    from tenfold.report.terminal import figures, players

    console = Console(soft_wrap=True, emoji=False)  # tiny:llama: is a model, not a picture of one
    said: set[str] = set()
    with warnings.catch_warnings():
        warnings.showwarning = lambda message, *_: console.print(f"  {message}", markup=False, highlight=False)
        summaries = execute(plan, out, console, said)
    for summary in summaries:
        for sample in summary.samples:
            console.rule(Text(sample.prompt), align="left")
            for subject, text in sample.outputs.items():
                console.print(f"[{subject}] {text}", markup=False, highlight=False)
        for note in summary.notes:
            if note not in said:  # at work already, or of an earlier stage that read the same data
                console.print(f"{summary.stage}: {note}", markup=False, highlight=False)
            said.add(note)
        if summary.artefact:
            artefact = out / summary.folder / summary.artefact
            console.print(f"{summary.stage}: {artefact}", markup=False, highlight=False)
        if summary.replays:
            console.print(f"replays: {out / summary.folder / summary.replays}", markup=False, highlight=False)
    columns, rows = figures(summaries)
    if rows:
        _table("figures", columns, rows)
    for title, columns, rows in players(summaries):
        _table(title, columns, rows)
    console.print(f"report: {out / 'report.html'}", markup=False, highlight=False)
    return 0


def _table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=Text(title, style="table.title"), title_justify="left", box=None, pad_edge=False, padding=(0, 2, 0, 0)
    )
    for place, column in enumerate(columns):
        # Titles and figures are not broken within a word; what is too wide for the terminal folds in the first column.
        words = (
            [word for text in (column, *(row[place] for row in rows)) for word in str(text).split()] if place else []
        )
        table.add_column(column, overflow="fold", min_width=min(16, max(map(len, words), default=0)))
    for row in rows:
        table.add_row(*(Text("" if cell is None else str(cell)) for cell in row))
    Console(soft_wrap=False).print(table)


def _complain(text: str) -> None:
    sys.stdout.flush()
    prefix = "\033[31merror:\033[0m" if sys.stderr.isatty() else "error:"
    print(f"{prefix} {text}", file=sys.stderr)


def _unexpected(error: Exception) -> str:
    text = f"{type(error).__name__}: {error}"
    if "out of memory" in text.lower() or "can't allocate memory" in text:
        return f"{text.splitlines()[0]}\n  -> lower batch_size (raise accumulate instead) or max_length"
    return f"{text}\n  -> this is a bug: --debug shows the traceback, `tenfold env` what to report with it"


if __name__ == "__main__":
    sys.exit(main())
