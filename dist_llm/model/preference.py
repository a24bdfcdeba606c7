"""The loss of answers that are preferred to others, out of the loss of each token (DPO, arXiv:2305.18290).

A side is one answer to a question, and a pair two sides of one: the chosen one, then the rejected one. The log probability of a
side is a sum over its trained tokens, so that the slope of a pair's loss by the logits is that of a cross-entropy in which all tokens
of a side count alike. The pair must have been judged before that slope is made, which takes the log probability of all its tokens:
where the output projection is trained its logits are made twice, a chunk at a time; where it is not, the slopes by the input are made
in the first pass and scaled afterwards. The body runs once.

Legend: T tokens of a micro-batch, N sides, P pairs, D dim, v local vocabulary rows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_llm.config.preference import FIGURES
from dist_llm.config.schema import PreferenceConfig
from dist_llm.model.loss import Slice, loss_alone, loss_and_gradients


@dataclass(frozen=True)
class Pairs:
    """The sides of a micro-batch. sides (T,): which one each token belongs to, N where to none; counts (T,): what the token counts
    in its side, 0 where it is not trained; both float64 and int64 as said. number: N.

    reference (P, 2): log probabilities of the sides before training, float64; None: the sides' own are what is asked for.
    """

    sides: Tensor
    counts: Tensor
    number: int
    reference: Tensor | None
    rule: PreferenceConfig

    @property
    def size(self) -> int:
        """Numbers that come out: FIGURES, or one for each side."""
        return self.number if self.reference is None else len(FIGURES)

    def figures(self, losses: Tensor) -> Tensor:
        """The loss of each token (T,), float64 -> FIGURES summed over the pairs; the log probability of each side where nothing refers."""
        logps = self._sums(-losses * self.counts)  # (N,)
        return logps if self.reference is None else self._judged(logps, self._sums(self.counts))

    def alone(self, x: Tensor, weight: Tensor, labels: Tensor, part: Slice) -> Tensor:
        """x (T, D), weight (v, D), labels (T,) -> `figures`."""
        each = x.new_empty(len(labels), dtype=torch.float64)
        loss_alone(x, weight, labels, part, each=each)
        return self.figures(each)

    def with_gradients(
        self,
        x: Tensor,
        weight: Tensor,
        labels: Tensor,
        part: Slice,
        *,
        trained: bool,
        slope: Tensor | None = None,
        total: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """As `alone` -> (figures; the gradient of the loss by x (T, D), this slice's part; by weight (v, D), if it is trained).

        slope and total: as `loss_and_gradients` takes them.
        """
        each = x.new_empty(len(labels), dtype=torch.float64)
        if trained:
            loss_alone(x, weight, labels, part, each=each)
            figures, counts = self._slopes(each)
            _, by_x, by_weight = loss_and_gradients(x, weight, labels, part, counts, slope=slope, total=total)
            return figures, by_x, by_weight
        _, by_x, _ = loss_and_gradients(x, weight, labels, part, trained=False, each=each)
        figures, counts = self._slopes(each)
        counts = counts if slope is None else counts * slope
        return figures, by_x.mul_(counts.to(x.dtype)[:, None]), None

    def _slopes(self, losses: Tensor) -> tuple[Tensor, Tensor]:
        """(figures; the slope of their first by the loss of each token (T,))."""
        with torch.enable_grad():
            losses = losses.detach().requires_grad_()
            figures = self.figures(losses)
            (slopes,) = torch.autograd.grad(figures[0], losses)
        return figures.detach(), slopes

    def _sums(self, values: Tensor) -> Tensor:
        """Values of tokens (T,) -> of sides (N,)."""
        return values.new_zeros(self.number + 1).index_add(0, self.sides, values)[: self.number]

    def _judged(self, logps: Tensor, lengths: Tensor) -> Tensor:
        """Log probabilities and lengths of the sides (N,) -> FIGURES, summed over the pairs."""
        rule, reference = self.rule, self.reference
        assert reference is not None
        chosen, rejected = logps.view(-1, 2).unbind(1)  # (P,)
        gains = logps.view(-1, 2) - reference
        gains = gains / lengths.view(-1, 2) if rule.length_normalised else gains
        by = gains[:, 0] - gains[:, 1]
        losses = _losses(by, rule) - rule.sft * chosen / lengths.view(-1, 2)[:, 0]
        rewards = rule.beta * gains.detach()
        accuracy = 0.5 * (1.0 + by.detach().sign())  # half of a tie
        each = (losses, rewards[:, 0], rewards[:, 1], accuracy, chosen.detach(), rejected.detach())
        return torch.stack([values.sum() for values in each])


def _losses(by: Tensor, rule: PreferenceConfig) -> Tensor:
    """By how much each chosen answer has gained over the rejected one (P,) -> the loss of each pair.

    Sigmoid with label smoothing is conservative DPO (Mitchell 2023); ipo is arXiv:2310.12036, hinge arXiv:2305.10425.
    """
    if rule.loss == "ipo":
        return (by - 0.5 / rule.beta).square()
    if rule.loss == "hinge":
        return F.relu(1.0 - rule.beta * by)
    return -(1.0 - rule.label_smoothing) * F.logsigmoid(rule.beta * by) - rule.label_smoothing * F.logsigmoid(-rule.beta * by)
