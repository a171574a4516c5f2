"""AdaLoRA: what its step adds to plain LoRA's under bfloat16 autocast, and how often it waits for the device."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from peft import AdaLoraConfig as PeftAdaLoraConfig
from peft import LoraConfig as PeftLoraConfig
from peft import get_peft_model
from torch import Tensor

from benchmarks.gpu.bench import Bench, Measured, Shape
from benchmarks.gpu.models import in_float64, random_ids, random_llama
from tenfold.adapt import adalora
from tenfold.config.adalora import AdaLoraConfig, AdaLoraPaper

MANY = 10**6
RANK = 12
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WAYS = ("lora", "adalora, no allocation", "adalora, allocating", "adalora, allocating, light", "peft adalora")


def steps(bench: Bench) -> None:
    """A training step and its optimizer's part, on every linear layer at rank 12."""
    for shape in bench.shapes:
        for way in WAYS:
            case = {"model": shape.name, "layers": shape.layers, "way": way}
            bench.row("adalora step", case, partial(_one, bench, shape, way))


def _attached(model: Any, way: str) -> tuple[Any, Callable[[], None], Any]:
    """The adapted model, what a loop calls after its optimizer, and a handle that must live as long."""
    if way == "lora":
        return get_peft_model(model, PeftLoraConfig(r=RANK, target_modules=TARGETS)), lambda: None, None
    if way == "peft adalora":
        config = PeftAdaLoraConfig(
            init_r=RANK, target_r=8, tinit=0, tfinal=1, deltaT=1, total_step=MANY, target_modules=TARGETS
        )
        adapted, count = get_peft_model(model, config), iter(range(1, MANY))
        return adapted, lambda: adapted.base_model.update_and_allocate(next(count)), None
    phases = {"tinit": MANY - 2 if "no allocation" in way else 0, "tfinal": 1, "interval": 1, "steps": MANY}
    importance = "light" if "light" in way else "full"
    # With P at zero lambda has no gradient in the first step, so the light scores that are checked would all be zero.
    config = AdaLoraConfig(
        rank=8, initial_rank=RANK, importance=importance, paper=AdaLoraPaper(init="normal"), **phases
    )
    handle = adalora.attach(model, config)
    return handle.model, lambda: None, handle


def _one(bench: Bench, shape: Shape, way: str) -> Measured:
    model = random_llama(bench, shape)
    batch, tokens = bench.sizes((4, 512), (2, 12))
    ids = random_ids(bench, batch, tokens)
    with torch.no_grad():
        exact = in_float64(model)(input_ids=ids, labels=ids).loss.double()
    adapted, after, handle = _attached(model, way)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    adapted.train()
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-3, weight_decay=0.0)

    def read() -> Tensor:
        with torch.autocast(bench.device.type, dtype=torch.bfloat16):
            loss: Tensor = adapted(input_ids=ids, labels=ids).loss
        return loss

    def learn() -> None:
        optimizer.step()
        after()

    def step() -> None:
        optimizer.zero_grad()
        read().backward()
        learn()

    optimizer.zero_grad()
    loss = read()
    # At first an adapter changes nothing, so the loss is the base's; PEFT's AdaLoRA adds its penalty to it.
    found: Measured = {} if way == "peft adalora" else {"error": bench.check(loss.detach(), exact, 1e-2)}
    loss.backward()
    if handle is None:
        learn()
    else:
        found["scores_error"] = _scores(bench, handle, optimizer, light="light" in way)
    found |= {"waits": _waits(bench, learn), "waits_of_the_whole_step": _waits(bench, step)}
    found |= {"ms": bench.milliseconds(step), "optimizer_ms": bench.milliseconds(learn), "peak": bench.peak(step)}
    return found


def _scores(bench: Bench, handle: Any, optimizer: torch.optim.Optimizer, light: bool) -> float:
    """Scores after two steps against the paper's formula in float64 (section 3.2), for every matrix."""
    smooth: dict[str, list[tuple[Tensor, Tensor]]] = {}
    beta = handle.controller.config.beta1
    before = handle.controller._zero
    handle.controller._zero = lambda masks: None  # what is scored shall not change between the two steps
    for _ in range(2):
        optimizer.step()
        for name, matrix in handle.matrices.items():
            tensors = [matrix.singular] if light else [matrix.Q, matrix.singular, matrix.P]
            means = smooth.setdefault(
                name, [(torch.zeros_like(t).double(), torch.zeros_like(t).double()) for t in tensors]
            )
            for place, tensor in enumerate(tensors):
                one = (tensor.detach().double() * tensor.grad.double()).abs()
                mean = beta * means[place][0] + (1 - beta) * one
                doubt = beta * means[place][1] + (1 - beta) * (one - mean).abs()
                means[place] = (mean, doubt)
    handle.controller._zero = before
    found = handle.controller._importance.scores()
    exact = {}
    for name, means in smooth.items():
        parts = [mean * doubt for mean, doubt in means]
        # Q [rank, in] and lambda [rank, 1] are averaged along their rows, P [out, rank] along its columns.
        folded = [part.mean(1) for part in parts[:2]] + [part.mean(0) for part in parts[2:]]
        exact[name] = torch.stack(folded).sum(0)
    return bench.check(torch.cat([found[name] for name in exact]), torch.cat(list(exact.values())), 1e-3)


def _waits(bench: Bench, work: Callable[[], None]) -> int | None:
    """How often the host waits for the device during a call, as torch itself counts it; None in a rehearsal."""
    if bench.rehearse:
        work()
        return None
    work()
    torch.cuda.synchronize()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            work()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing CUDA operation" in str(warning.message) for warning in said)
