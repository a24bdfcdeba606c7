"""What the loss of a preference adds up beside itself, over the pairs of a batch, and what a pair is made of. Torch-free."""

from __future__ import annotations

# A reward is beta times what an answer has gained in log probability since the run began; accuracy 1 where the chosen one has gained more.
FIGURES = ("loss", "reward_chosen", "reward_rejected", "accuracy", "logp_chosen", "logp_rejected")
SIDES = ("chosen", "rejected")  # of a pair, in their order everywhere
