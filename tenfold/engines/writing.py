"""One batch being written: seeds, lengths and stop strings of its own for each row, and a clock."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor, StoppingCriteria

from tenfold.engines.choices import ChoiceTokens
from tenfold.engines.requests import Request, cut_at_stop
from tenfold.models.generation import up_to_end
from tenfold.models.inference import synchronize


class Sampling(LogitsProcessor):
    """Chooses tokens of each row by its own temperature and seed, so that rows do not depend on each other.

    Adding Gumbel noise to the logits and taking the largest is drawing from their softmax. The noise is drawn on the
    CPU: a seed means the same on every device.

    Args:
        requests: one for each row.
    """

    def __init__(self, requests: Sequence[Request]) -> None:
        self.drawn = [
            (row, request.temperature, torch.Generator().manual_seed(request.seed))
            for row, request in enumerate(requests)
            if request.temperature
        ]
        self.first: float | None = None
        """When the logits of the first token were there."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits ``[rows, vocabulary]`` of the next token, with noise where a row is sampled."""
        if self.first is None:
            synchronize(scores.device)
            self.first = time.perf_counter()
        if not self.drawn:
            return scores
        scores = scores.float().clone()
        for row, temperature, generator in self.drawn:
            noise = -torch.empty(scores.shape[1]).exponential_(generator=generator).log()
            scores[row] = scores[row] / temperature + noise.to(scores.device)
        return scores


class Choosing(LogitsProcessor):
    """Leaves to each row that has choices the tokens that write one of them.

    Args:
        choices: of each row; None where anything may be written.
        prompt: tokens of the padded prompts.
    """

    def __init__(self, choices: Sequence[ChoiceTokens | None], prompt: int) -> None:
        self.choices, self.prompt = choices, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """Logits ``[rows, vocabulary]`` of the next token, minus infinity where it may not come."""
        left = scores.clone()
        for row, choices in enumerate(self.choices):
            following = choices and sorted(choices.following(input_ids[row, self.prompt :].tolist()))
            if following:  # none in a row that is done and filled up
                left[row] = -torch.inf
                left[row, following] = scores[row, following]
        return left


class Ends(StoppingCriteria):
    """Ends a row at its own length, in front of its own stop strings, and once its choice is clear.

    Args:
        requests: one for each row.
        tokenizer: that reads what is written.
        prompt: tokens of the padded prompts.
        choices: of each row; None where anything may be written.
    """

    def __init__(
        self, requests: Sequence[Request], tokenizer: Any, prompt: int, choices: Sequence[ChoiceTokens | None]
    ) -> None:
        self.requests, self.tokenizer, self.prompt, self.choices = requests, tokenizer, prompt, choices
        self.ended: dict[int, int] = {}
        """Row -> tokens that it wrote."""

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        """Whether each row is done, ``[rows]``, bool."""
        written = input_ids.shape[1] - self.prompt
        for row, request in enumerate(self.requests):
            if row not in self.ended and (written >= request.max_new_tokens or self._stops(row, input_ids[row])):
                self.ended[row] = written
        done = [row in self.ended for row in range(len(self.requests))]
        return torch.tensor(done, device=input_ids.device)

    def _stops(self, row: int, ids: Tensor) -> bool:
        request, choices = self.requests[row], self.choices[row]
        if choices is not None:
            return choices.chosen(ids[self.prompt :].tolist()) is not None
        if not request.stop:
            return False
        # A token is a byte at least, and the newest one completes the string.
        reach = max(len(string.encode()) for string in request.stop) + 8
        recent = ids[max(self.prompt, len(ids) - reach) :]
        return cut_at_stop(self.tokenizer.decode(recent, skip_special_tokens=True), request.stop)[1]

    def tokens(self, ids: Tensor, row: int, ends: Sequence[int] | None) -> tuple[int, ...]:
        """What a row wrote, up to the end of its turn, which is among it.

        Args:
            ids: of the row, ``[tokens]``, the prompt included.
            row: its number.
            ends: tokens that end a turn.
        """
        new: list[int] = ids[self.prompt :].tolist()
        return tuple(up_to_end(new[: self.ended.get(row, len(new))], ends))
