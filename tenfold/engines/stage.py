"""The stage ``generate``: let the model write, before and after."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tenfold.attend.pasta.prompts import loops, profile_of, uses_template
from tenfold.config.generate import GenerateConfig
from tenfold.engines.requests import Evidence, Found, Reply, Request
from tenfold.engines.session import Session
from tenfold.errors import DataError
from tenfold.evaluate.subjects import Subjects, open_subjects
from tenfold.stage.context import Context, StageOutput
from tenfold.stage.record import Sample

CHAT = {"auto": None, "yes": True, "no": False}


def run_generate(config: GenerateConfig, context: Context) -> StageOutput:
    """The stage ``generate``: one sample for each prompt, or for the question."""
    text = None if config.context is None else read_context(config.context)  # before the weights
    subjects = open_subjects(context, config.baseline)
    written: dict[str, list[str]] = {}
    notes: list[str] = []
    for index, name in enumerate(subjects.models):
        context.progress("generate", index, len(subjects.models), name)
        with subjects.use(name) as model:
            for kv in (None, config.kv) if config.kv else (None,):
                session = _session(config, context, model, subjects, kv)
                label = [name] if kv is None else [name, kv]
                if text is None:
                    found, more = _continued(config, context, session, name, label)
                else:
                    found, more = _answered(config, session, text, name, label), []
                written |= found
                notes += [*more, *(f"{name}, {note}" for note in session.notes)]
    prompts = config.prompts if config.question is None else (config.question,)
    samples = [
        Sample(prompt=prompt, outputs={name: texts[index] for name, texts in written.items()})
        for index, prompt in enumerate(prompts)
    ]
    return StageOutput(samples=samples, notes=notes)


def _session(config: GenerateConfig, context: Context, model: object, subjects: Subjects, kv: str | None) -> Session:
    return Session(
        model,
        subjects.tokenizer,
        kv=kv,
        profile=profile_of(config, context) if config.steers else "default",
        **config.strength(),
        chat=CHAT[config.chat],
    )


def _continued(
    config: GenerateConfig, context: Context, session: Session, name: str, label: Sequence[str]
) -> tuple[dict[str, list[str]], list[str]]:
    """The prompts continued plain and, where something is emphasised, emphasised; and what to note."""
    requests = [_request(config, context, session, number) for number in range(len(config.prompts))]
    found = {", ".join(label): [reply.text for reply in session.generate(requests)]}
    if not config.emphasise:
        return found, []
    requests = [_request(config, context, session, number, True) for number in range(len(config.prompts))]
    replies = session.generate(requests)
    texts = [reply.text for reply in replies]
    found[", ".join([name, "emphasised", *label[1:]])] = texts
    told = dict.fromkeys(note for reply in replies for note in reply.notes)
    told |= dict.fromkeys(loops({f"prompt {number}": text for number, text in enumerate(texts, 1)}))
    return found, [", ".join([*label, note]) for note in told]


def _request(
    config: GenerateConfig, context: Context, session: Session, number: int, emphasised: bool = False
) -> Request:
    """A prompt as what a user says, where there is a chat template and it is wanted; each with a seed of its own."""
    prompt = config.prompts[number]
    chat = uses_template(session.tokenizer, config.chat)
    return Request(
        None if chat else prompt,
        [{"role": "user", "content": prompt}] if chat else (),
        emphasis=tuple(part for part in config.emphasise if part in prompt) if emphasised else (),
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        seed=context.seed + number,
    )


def _answered(
    config: GenerateConfig, session: Session, text: str, name: str, label: Sequence[str]
) -> dict[str, list[str]]:
    """The answer to ``question`` from ``context``, and with ``find_evidence`` where it comes from."""

    def ask(mode: str) -> Reply:
        evidence = Evidence(str(config.question), text, mode)  # type: ignore[arg-type]
        return session.generate([Request(evidence=evidence, max_new_tokens=config.max_new_tokens)])[0]

    found = {", ".join(label): [ask("direct").text]}
    if config.find_evidence:
        reply = ask("autopasta")
        found[", ".join([name, "with evidence", *label[1:]])] = [reply.text]
        said = "; ".join([_evidence(reply.found or Found(), text), *reply.notes])
        found[", ".join([name, "evidence", *label[1:]])] = [said]
    return found


def read_context(path: Path) -> str:
    """The text of a file to answer from.

    Raises:
        DataError: not there, not UTF-8, or empty.
    """
    try:
        with path.open(encoding="utf-8", newline="") as file:  # offsets are those of the file
            text = file.read()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else f"not UTF-8 at byte {error.start}"
        raise DataError(f"context: {path}: {reason}", remedy="give a text file") from None
    if not text.strip():
        raise DataError(f"context: {path} is empty", remedy="give a text file with something to answer from")
    return text


def _evidence(found: Found, text: str) -> str:
    if not found.spans:
        return f"none: no sentence supports what the model quoted, so nothing was emphasised (quote: {found.quote!r})"
    return " ... ".join(
        f"{text[lo:hi]} [characters {lo} to {hi}, {found.stage}, {found.score:.2f}]" for lo, hi in found.spans
    )
