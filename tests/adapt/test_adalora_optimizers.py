"""Optimizers that evaluate the loss themselves, wrap others, hold scaled gradients, or lose rows of their tensors.

The right values come from a twin without hooks: the loss plus gamma times the penalty, differentiated by autograd.
"""

import copy

import pytest
import torch
from torch.optim import Optimizer

from tenfold.adapt.adalora import AdaLoraConfig, attach
from tenfold.config.adalora import AdaLoraPaper
from tenfold.models.tiny import tiny_model

IDS = torch.arange(5, 53).view(4, 12)
GAMMA = 0.5
QUIET = {"steps": 40, "tinit": 30, "tfinal": 5, "interval": 1, "gamma": GAMMA}
"""Nothing is dropped in the first 30 steps."""


def adapter_of(**settings):
    torch.manual_seed(0)
    return attach(
        tiny_model("llama").model,
        AdaLoraConfig(**{"paper": AdaLoraPaper(init="normal"), "rank": 1, "initial_rank": 3, **QUIET, **settings}),
    )


def trainable(adapter):
    return [p for p in adapter.model.parameters() if p.requires_grad]


def deltas(adapter):
    return [((m.P * m.singular.T) @ m.Q).detach() for m in adapter.matrices.values()]


def tensors(adapter):
    return [tensor.detach().clone() for matrix in adapter.matrices.values() for tensor in matrix.tensors]


def norms(adapter):
    """The penalty as the published code has it: the mean of the un-squared norms."""
    grams = [g for m in adapter.matrices.values() for g in (m.P.T @ m.P, m.Q @ m.Q.T)]
    return torch.stack([(gram - torch.eye(len(gram))).norm() for gram in grams]).mean()


def loss_of(adapter, by_hand):
    loss = adapter.model(input_ids=IDS, labels=IDS).loss
    return loss + GAMMA * norms(adapter) if by_hand else loss


def close(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


class Sam(Optimizer):
    """Sharpness-aware minimisation (Foret et al. 2021) as it is usually written: it wraps what makes its last step."""

    def __init__(self, params, base, rho=0.05, **settings):
        super().__init__(params, {"rho": rho, **settings})
        self.base_optimizer = base(self.param_groups, **settings)
        self.param_groups = self.base_optimizer.param_groups

    def step(self, closure=None):
        held = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in held]).norm()
        moves = [p.grad * (0.05 / norm) for p in held]
        with torch.no_grad():
            torch._foreach_add_(held, moves)
        with torch.enable_grad():
            closure()
        with torch.no_grad():
            torch._foreach_sub_(held, moves)
        self.base_optimizer.step()


class Lookahead(Optimizer):
    """Lookahead (Zhang et al. 2019): every third step goes half the way to the fast weights."""

    def __init__(self, inner):
        super().__init__([p for group in inner.param_groups for p in group["params"]], {})
        self.inner, self.count = inner, 0
        self.slow = {p: p.detach().clone() for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure=None):
        loss = self.inner.step(closure)
        self.count += 1
        if self.count % 3 == 0:
            for p, slow in self.slow.items():
                slow.lerp_(p, 0.5)
                p.copy_(slow)
        return loss

    def state_dict(self):
        return self.inner.state_dict() | {"count": self.count, "slow": list(self.slow.values())}

    def load_state_dict(self, state):
        state = dict(state)
        self.count = state.pop("count")
        for slow, saved in zip(self.slow.values(), state.pop("slow"), strict=True):
            slow.copy_(saved)
        self.inner.load_state_dict(state)


BUILDS = {
    "lbfgs": lambda params: torch.optim.LBFGS(params, lr=0.5, max_iter=4),
    "lbfgs, line search": lambda params: torch.optim.LBFGS(params, max_iter=4, line_search_fn="strong_wolfe"),
    "sam": lambda params: Sam(params, torch.optim.AdamW, lr=1e-2, weight_decay=0.0),
    "lookahead": lambda params: Lookahead(torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0)),
    "adamw": lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.0),
}


def run(adapter, optimizer, steps, *, by_hand=False, with_closure=True):
    def closure():
        optimizer.zero_grad()
        loss = loss_of(adapter, by_hand)
        loss.backward()
        return loss

    for _ in range(steps):
        if isinstance(optimizer, Sam):  # its first gradient, which only says where to look: of the loss alone
            optimizer.zero_grad()
            loss_of(adapter, by_hand=False).backward()
        elif not with_closure:
            closure()
        optimizer.step(*([closure] if with_closure else []))


@pytest.mark.parametrize("name", BUILDS)
def test_the_penalty_acts_once_in_an_optimizer_that_evaluates_the_loss(name):
    ours, twin = adapter_of(), adapter_of()
    twin.controller.close()
    build = BUILDS[name]
    optimizer = build(trainable(ours))
    run(ours, optimizer, 4)
    run(twin, build(trainable(twin)), 4, by_hand=True)
    close(tensors(ours), tensors(twin))
    assert ours.controller.step == 4
    without = adapter_of(gamma=0.0)
    run(without, build(trainable(without)), 4)
    assert norms(ours).item() < norms(without).item() - 0.01


def test_the_value_that_a_closure_gives_back_is_that_of_loss_and_penalty():
    adapter = adapter_of()
    expected = loss_of(adapter, by_hand=True).item()
    optimizer = torch.optim.LBFGS(trainable(adapter), max_iter=1)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(adapter, by_hand=False)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == pytest.approx(expected, rel=1e-5)


def test_before_and_closure_score_the_weights_that_the_step_starts_from():
    """Lambda is 0 at the first step, and so is its sensitivity; P and Q have the penalty's gradient alone."""
    adapter = adapter_of(paper=AdaLoraPaper(init="normal", sensitivity_at="before"), importance="light")
    run(adapter, BUILDS["lbfgs"](trainable(adapter)), 1)
    assert all(not bool(score.any()) for score in adapter.controller.latest_scores().values())


@pytest.mark.parametrize("with_closure", [True, False])
def test_a_wrapped_optimizer_has_one_binding_and_a_state_that_goes_on(with_closure):
    fast = {"steps": 12, "tinit": 1, "tfinal": 4}
    whole = adapter_of(**fast)
    run(whole, BUILDS["lookahead"](trainable(whole)), 12, with_closure=with_closure)
    assert sum(whole.ranks().values()) == 14
    assert any("Lookahead" in note for note in whole.controller.notes)  # its slow weights cannot be cut
    first = adapter_of(**fast)
    optimizer = BUILDS["lookahead"](trainable(first))
    run(first, optimizer, 1, with_closure=with_closure)
    hooks = len(first.controller._hooks)
    run(first, optimizer, 4, with_closure=with_closure)
    assert len(first.controller._hooks) == hooks
    saved = copy.deepcopy((first.model.state_dict(), optimizer.state_dict()))
    assert not any(isinstance(key, str) for key in optimizer.inner.state)
    second = adapter_of(**fast)
    second.model.load_state_dict(saved[0])
    optimizer = BUILDS["lookahead"](trainable(second))
    optimizer.load_state_dict(saved[1])
    run(second, optimizer, 7, with_closure=with_closure)
    assert all(torch.equal(a, b) for a, b in zip(tensors(second), tensors(whole), strict=True))
    assert second.report()["budget"] == whole.report()["budget"]


def test_wrapping_optimizers_save_what_their_own_state_dict_shows():
    adapter = adapter_of()
    optimizer = BUILDS["sam"](trainable(adapter))
    run(adapter, optimizer, 2)
    for one in (optimizer, optimizer.base_optimizer):
        assert one.state_dict()["state"]["tenfold.adalora"]["step"] == 2
        assert "tenfold.adalora" not in one.state


@pytest.mark.parametrize("fused", [True, False])
def test_scaled_gradients_take_a_scaled_penalty(fused):
    """At the first step lambda is 0, so P and Q move by the penalty alone, whatever scales the loss."""
    adapter, twin = adapter_of(), adapter_of()
    optimizer = torch.optim.SGD(trainable(adapter), lr=0.5, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    scaler.scale(loss_of(adapter, by_hand=False)).backward()
    scaler.step(optimizer)
    loss_of(twin, by_hand=True).backward()
    for found, matrix in zip(adapter.matrices.values(), twin.matrices.values(), strict=True):
        torch.testing.assert_close(found.P, matrix.P - 0.5 * matrix.P.grad, rtol=1e-5, atol=1e-7)
        torch.testing.assert_close(found.Q, matrix.Q - 0.5 * matrix.Q.grad, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gamma", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_removing_triplets_goes_on_as_masking_them(gamma, name):
    """Dropped rows stay in the Gram matrices of the penalty; without them the updates differ by 5 to 30 %."""
    found = []
    for shrink in (True, False):
        adapter = adapter_of(gamma=gamma, shrink=shrink, steps=20, tinit=1, tfinal=10)
        build = BUILDS["adamw"] if name == "adamw" else lambda params: torch.optim.SGD(params, lr=1e-1, momentum=0.9)
        run(adapter, build(trainable(adapter)), 20, with_closure=False)
        found.append((adapter.ranks(), adapter.controller.numbers(), torch.cat([d.flatten() for d in deltas(adapter)])))
    assert found[0][:2] == (found[1][0], pytest.approx(found[1][1], rel=1e-5))
    assert float((found[0][2] - found[1][2]).norm() / found[1][2].norm()) < 1e-5


def test_what_is_dropped_stands_still_in_the_final_phase():
    adapter = adapter_of(shrink=False, steps=20, tinit=1, tfinal=10)
    optimizer = BUILDS["adamw"](trainable(adapter))
    run(adapter, optimizer, 12, with_closure=False)
    masks = adapter.controller.masks
    before = [m.P.detach()[:, ~masks[name]].clone() for name, m in adapter.matrices.items()]
    run(adapter, optimizer, 5, with_closure=False)
    after = [m.P.detach()[:, ~masks[name]] for name, m in adapter.matrices.items()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
