"""Agents for the arena: the embedded model, taught the market's rule or a scripted fighter's moves with AdaLoRA.

    python -m benchmarks.arena_agents train --arena trading --out runs/agents   # an adapter, and a row of what it knows
    python -m benchmarks.arena_agents score --arena trading                     # the model as it is, and chance
    python -m benchmarks.arena_agents score --adapter runs/agents/trading       # a saved adapter

Questions are those that `EnginePlayer` sends, of seeds that are apart for training, validation and test; no state of a
test is trained on. The decision quality is the share of held-out questions that are answered well: where several moves
are good any of them counts. The loop is our own because all questions of a game begin alike: the rules are read once a
step, for the whole batch, which is the same gradient at a third (trading) or a sixth (fighting) of the tokens.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import set_seed

from benchmarks import keep_in
from tenfold.adapt import adalora
from tenfold.arena.by_hand import Arena
from tenfold.arena.labelled import LabelledTurn, labelled_questions
from tenfold.arena.reference import first_layers
from tenfold.arena.trading.synthetic import MarketRules
from tenfold.config.adalora import AdaLoraConfig
from tenfold.core.statistics import wilson
from tenfold.engines.choices import ChoiceTokens
from tenfold.models.folders import RECORD
from tenfold.models.inference import input_device
from tenfold.models.open import attach_adapter, open_model

ARENAS: tuple[Arena, ...] = ("trading", "fighting")
SHARES = {"train": 0, "validation": 10_000_000, "test": 20_000_000}
"""The first seed of each."""
SCORED_AT_ONCE = 64


def questions(arena: Arena, share: str, count: int, *, easy: bool = False) -> list[LabelledTurn]:
    """The first questions of a share, each state once."""
    return labelled_questions(arena, SHARES[share], count, MarketRules(easy=easy))


# ---- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokens:
    """A question as tokens, behind the prompt that all have in common.

    Args:
        state: what follows it, up to the answer.
        answers: the first token of each answer, which tells them apart.
        good: those that are good.
        target: one good answer, to its end.
    """

    state: list[int]
    answers: list[int]
    good: list[int]
    target: list[int]


def encode(asked: Sequence[LabelledTurn], tokenizer: Any, seed: int = 0) -> tuple[list[int], list[Tokens]]:
    """The tokens that all questions begin with, and those of each question; a good answer is drawn for each.

    The chat template writes the rest as for `EnginePlayer`. All states begin with the same word, and a text's tokens
    before a space do not depend on what is behind it, so that prompts may be cut there; the first ones are checked.
    """
    head, foot = tokenizer.apply_chat_template(
        [{"role": "user", "content": "\0"}], add_generation_prompt=True, tokenize=False
    ).split("\0")
    ids = lambda text: tokenizer(text, add_special_tokens=False).input_ids  # noqa: E731
    rules, (first, _, _) = asked[0].turn.rules, asked[0].turn.state.partition(" ")
    common = ids(f"{head}{rules}\n\n{first}")
    states = ids([question.turn.state[len(first) :] + foot for question in asked])
    draw, end, written, found = np.random.default_rng(seed), tokenizer.eos_token_id, {}, []  # type: Any, int, Any, Any
    for question, state in zip(asked, states, strict=True):
        turn = question.turn
        assert (turn.rules, turn.state.partition(" ")[0]) == (rules, first), "the questions do not begin alike"
        if len(found) < 20:
            assert ids(f"{head}{rules}\n\n{turn.state}{foot}") == common + state, turn.state
        if turn.answers not in written:
            texts = {answer: ids(answer) for answer in turn.answers}
            choice = ChoiceTokens(turn.answers, list(texts.values()), [end])
            assert len(choice.following([])) == len(texts), "two answers begin with the same token"
            written[turn.answers] = texts
        texts = written[turn.answers]
        drawn = question.good[int(draw.integers(len(question.good)))]
        answers, good = ([texts[answer][0] for answer in some] for some in (turn.answers, question.good))
        found.append(Tokens(state, answers, good, [*texts[drawn], end]))
    return common, found


def read(model: Any, common: Tensor, rows: Sequence[Sequence[int]]) -> Tensor:
    """Hidden states ``[rows, tokens, width]`` of what stands behind the common prompt, which is read once.

    Rows are filled up on the right, where a causal model does not look.
    """
    body = getattr(model, "get_base_model", lambda: model)().model
    past = body(input_ids=common[None], use_cache=True).past_key_values
    past.batch_repeat_interleave(len(rows))
    longest = -(-max(map(len, rows)) // 8) * 8  # few shapes, and aligned ones
    ids = torch.tensor([[*row, *[0] * (longest - len(row))] for row in rows], device=common.device)
    hidden: Tensor = body(input_ids=ids, past_key_values=past, use_cache=True).last_hidden_state
    return hidden


def head_of(model: Any) -> Any:
    """What turns hidden states into logits."""
    return getattr(model, "get_base_model", lambda: model)().lm_head


def loss_of(model: Any, common: Tensor, batch: Sequence[Tokens], *, any_good: bool) -> Tensor:
    """Mean negative log-likelihood of the answers' tokens, in nats.

    Args:
        model: the adapted model.
        common: tokens that all prompts begin with.
        batch: questions.
        any_good: count the probability of all good answers at the first token, not only of the one that was drawn.
    """
    hidden = read(model, common, [[*one.state, *one.target[:-1]] for one in batch])
    device = hidden.device
    places = [(row, len(one.state) - 1) for row, one in enumerate(batch)]
    places += [(row, len(one.state) - 1 + at) for row, one in enumerate(batch) for at in range(1, len(one.target))]
    rows, columns = torch.tensor(places, device=device).T
    logits = head_of(model)(hidden[rows, columns]).float().log_softmax(-1)
    good = [one.good if any_good else one.target[:1] for one in batch]
    most = max(map(len, good))
    firsts = torch.tensor([[*some, *[-1] * (most - len(some))] for some in good], device=device)
    chance = logits[: len(batch)].gather(1, firsts.clamp(min=0)).masked_fill(firsts < 0, -math.inf).logsumexp(1)
    rest = torch.tensor([token for one in batch for token in one.target[1:]], device=device)
    return -(chance.sum() + logits[len(batch) :].gather(1, rest[:, None]).sum()) / len(places)


@torch.no_grad()
def choose(model: Any, common: Sequence[int], asked: Sequence[Tokens]) -> list[int]:
    """The place of the answer that is chosen of each question: greedy among the answers, as ``choices`` of an engine.

    The first token decides, because no two answers share it.
    """
    device, training = input_device(model), model.training
    model.eval()
    prompt, found = torch.tensor(common, device=device), []  # type: Tensor, list[int]
    for start in range(0, len(asked), SCORED_AT_ONCE):
        batch = asked[start : start + SCORED_AT_ONCE]
        hidden = read(model, prompt, [one.state for one in batch])
        last = torch.tensor([len(one.state) - 1 for one in batch], device=device)
        logits = head_of(model)(hidden[torch.arange(len(batch), device=device), last])
        answers = torch.tensor([one.answers for one in batch], device=device)
        found += logits.gather(1, answers).argmax(1).tolist()
    model.train(training)
    return found


def quality(asked: Sequence[LabelledTurn], chosen: Sequence[int]) -> dict[str, Any]:
    """How many are answered well, with Wilson's interval, and by kind of question."""
    right, kinds, said = 0, {}, Counter()  # type: int, dict[str, list[int]], Counter[str]
    for question, place in zip(asked, chosen, strict=True):
        answer = question.turn.answers[place]
        right += (good := answer in question.good)
        said[answer] += 1
        of = kinds.setdefault(question.kind, [0, 0])
        of[0], of[1] = of[0] + good, of[1] + 1
    ends = [round(end, 4) for end in wilson(right, len(asked))]
    return {
        "quality": round(right / len(asked), 4), "interval": ends, "asked": len(asked),
        "by kind": kinds, "answers": dict(said.most_common()),
    }  # fmt: skip


def chance(asked: Sequence[LabelledTurn]) -> dict[str, float]:
    """What an answer at random comes to, and the best of those that always say the same."""
    at_random = float(np.mean([len(one.good) / len(one.turn.answers) for one in asked]))
    always = Counter(answer for one in asked for answer in one.good).most_common(1)[0][1] / len(asked)
    return {"at random": round(at_random, 4), "always the same": round(always, 4)}


# ---- models and training --------------------------------------------------------------------------------------------


def embedded(device: str | None, layers: int) -> tuple[Any, Any]:
    """The embedded model in float32, cut to its first layers, and its tokenizer."""
    opened = open_model("demo", device=device, dtype="float32")
    return first_layers(opened.model, layers), opened.tokenizer


def rate(step: int, steps: int, passed: float) -> float:
    """Share of the peak learning rate: up in 5 % of the steps, then down to 0 along a cosine, sooner if time is short.

    Args:
        step: steps that are over.
        steps: of the run.
        passed: share of the time that is over, 0 to 1.
    """
    warmup = max(1, round(0.05 * steps))
    if step < warmup:
        return (step + 1) / warmup
    done = max((step - warmup) / max(1, steps - warmup), passed)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def fit(model: Any, tokens: Sequence[Tokens], common: list[int], args: argparse.Namespace, check: Any) -> Any:
    """Train an adapter; returns it with what is to be told of the run."""
    steps = max(1, len(tokens) // args.batch)
    config = AdaLoraConfig(budget=args.budget, learning_rate=args.learning_rate, targets=tuple(args.targets))
    adapter = adalora.attach(model, config, total_steps=steps)
    weights = [parameter for parameter in adapter.model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=args.learning_rate, weight_decay=0.0)
    device = input_device(adapter.model)
    prompt, losses, checks = torch.tensor(common, device=device), [], []  # type: Tensor, list[Tensor], list[Any]
    adapter.model.train()
    began, limit, done = time.perf_counter(), 60 * args.minutes, 0
    marks = {round(steps * part / args.checks) for part in range(1, args.checks)}
    while done < steps and time.perf_counter() - began < limit:
        for group in optimizer.param_groups:
            group["lr"] = args.learning_rate * rate(done, steps, (time.perf_counter() - began) / limit)
        optimizer.zero_grad()
        fast = torch.autocast("cuda", dtype=torch.bfloat16) if device.type == "cuda" else nullcontext()
        with fast:
            batch = tokens[done * args.batch : (done + 1) * args.batch]
            loss = loss_of(adapter.model, prompt, batch, any_good=args.answers == "any")
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights, 1.0)
        optimizer.step()
        losses.append(loss.detach())
        done += 1
        if done % 20 == 0:
            now = float(torch.stack(losses[-20:]).mean())
            print(f"step {done}/{steps} loss {now:.4f} {time.perf_counter() - began:.0f} s", flush=True)
        if done in marks:
            checks.append([done, check(adapter.model)])
            print(f"step {done}/{steps} validation {checks[-1][1]:.3f}", flush=True)
    return adapter, {
        "steps": done,
        "of": steps,
        "losses": [round(float(part.mean()), 4) for part in torch.stack(losses).chunk(12)],
        "validation": checks,
        "training seconds": round(time.perf_counter() - began, 1),
        "seconds a step": round((time.perf_counter() - began) / done, 3),
        "parameters": adapter.attached()["exported parameters"],
        "notes": adapter.report()["notes"],
    }


def save(adapter: Any, folder: Path) -> int:
    """Write PEFT's folder in float16, with true ranks; returns its bytes."""
    adapter.export(folder, layout="compact", base="demo")
    file = folder / "adapter_model.safetensors"
    save_file({name: tensor.half() for name, tensor in load_file(file).items()}, file, metadata={"format": "pt"})
    (folder / RECORD).unlink()  # it holds the size of the file before
    return sum(path.stat().st_size for path in folder.iterdir())


def train(args: argparse.Namespace) -> None:
    """An adapter in ``OUT/NAME`` and a row in ``OUT/NAME.jsonl``; what is scored is the saved adapter, in float32."""
    torch.set_float32_matmul_precision("high")
    torch.backends.cuda.enable_cudnn_sdp(False)  # it would plan anew for each length of a batch
    set_seed(args.seed)
    started, name = time.perf_counter(), args.name or args.arena
    held = {share: questions(args.arena, share, args.questions, easy=args.easy) for share in ("validation", "test")}
    untold = {question.turn.state for some in held.values() for question in some}
    asked = questions(args.arena, "train", args.examples, easy=args.easy)
    asked = [asked[at] for at in np.random.default_rng(args.seed).permutation(len(asked))]
    asked = [one for one in asked if one.turn.state not in untold]
    model, tokenizer = embedded(args.device, args.layers)
    common, tokens = encode(asked, tokenizer, args.seed)
    validation = held["validation"][: args.checked]
    _, seen = encode(validation, tokenizer)
    prepared = time.perf_counter() - started
    print(f"{len(asked)} questions in {prepared:.0f} s, {len(common)} + {len(tokens[0].state)} tokens", flush=True)

    def check(adapted: Any) -> float:
        return float(quality(validation, choose(adapted, common, seen))["quality"])

    adapter, told = fit(model, tokens, common, args, check)
    settings = {key: value for key, value in vars(args).items() if key not in ("run", "out", "device", "name")}
    told["bytes"] = save(adapter, args.out / name)
    device = input_device(adapter.model)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    del adapter, model
    row = {
        "part": "agents",
        "what": "trained",
        "agent": name,
        **settings,
        **told,
        "trained on": min(len(asked), told["steps"] * args.batch),
    }
    row |= score_of(args.out / name, held["test"], settings, args.device) | chance(held["test"])
    about = {"arena": args.arena, "layers": args.layers, "easy": args.easy, "quality": row["quality"]}
    (args.out / name / "agent.json").write_text(json.dumps(about) + "\n")
    row |= {"peak bytes": peak, "preparing seconds": round(prepared, 1), "device": device.type}
    keep_in(args.out / f"{name}.jsonl", row | {"seconds": round(time.perf_counter() - started, 1)})


def score_of(folder: Path | None, asked: Sequence[LabelledTurn], settings: dict[str, Any], device: str | None) -> Any:
    """The decision quality of a saved adapter, or of the model as it is, in float32."""
    torch.set_float32_matmul_precision("highest")
    model, tokenizer = embedded(device, settings["layers"])
    if folder is not None:
        model = attach_adapter(model, folder, "causal")
    return quality(asked, choose(model, *encode(asked, tokenizer)))


def score(args: argparse.Namespace) -> None:
    """Print a row: a saved adapter on the test questions of its arena, or the model as it is."""
    settings = {"arena": args.arena, "easy": args.easy, "layers": args.layers}
    if args.adapter is not None:
        stored = json.loads((args.adapter / "agent.json").read_text())
        settings = {key: stored[key] for key in settings}
    asked = questions(settings["arena"], "test", args.questions, easy=settings["easy"])
    began = time.perf_counter()
    row = {"part": "agents", "what": "scored", "agent": str(args.adapter or "demo"), **settings}
    row |= score_of(args.adapter, asked, settings, args.device) | chance(asked)
    keep_in(args.out / "scores.jsonl", row | {"seconds": round(time.perf_counter() - began, 1)})


def main(argv: Sequence[str] | None = None) -> None:
    """Train or score."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="run", required=True)
    both = argparse.ArgumentParser(add_help=False)
    both.add_argument("--arena", choices=ARENAS, default="trading")
    both.add_argument("--easy", action="store_true", help="states in words; trading alone")
    both.add_argument("--layers", type=int, default=30, help="of the model, the first ones")
    both.add_argument("--device", default=None)
    both.add_argument("--questions", type=int, default=500, help="held-out ones")
    both.add_argument("--out", type=Path, default=Path("runs/agents"))
    training = parts.add_parser("train", parents=[both])
    training.add_argument("--name", default="")
    training.add_argument("--examples", type=int, default=20_000)
    training.add_argument("--batch", type=int, default=32)
    training.add_argument("--learning-rate", type=float, default=2e-3)
    training.add_argument("--budget", default="900k", help="parameters; 2 bytes each")
    training.add_argument("--targets", nargs="+", default=["all-linear"])
    training.add_argument("--answers", choices=("any", "drawn"), default="any")
    training.add_argument("--minutes", type=float, default=60.0, help="of the training loop, at most")
    training.add_argument("--checks", type=int, default=5, help="looks at the validation questions, less one")
    training.add_argument("--checked", type=int, default=200, help="validation questions")
    training.add_argument("--seed", type=int, default=0)
    scoring = parts.add_parser("score", parents=[both])
    scoring.add_argument("--adapter", type=Path, default=None)
    args = parser.parse_args(argv)
    if args.easy and args.arena != "trading":
        parser.error("--easy: only trading has states in words")
    args.out.mkdir(parents=True, exist_ok=True)
    {"train": train, "score": score}[args.run](args)


if __name__ == "__main__":
    main()
