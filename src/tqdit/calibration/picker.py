"""Pick the tokens, queries and samples that the search gets to see."""

import math

import torch

from tqdit.recipe import Recipe

QUERIES_PER_SAMPLE = 32


class Picker:
    """A seeded choice of tokens of every (sample, guidance half), made once, so that batching changes nothing.

    `rows` and `queries` (samples, halves, .) are indices of the model's own tokens, `context_rows` of those of its
    context; `context_order` are all of these, those of `context_rows` first. `attention` (samples, halves) says which
    samples keep their attention.
    """

    def __init__(self, recipe: Recipe, samples: int, halves: int, tokens: int, context: int = 0) -> None:
        """Choose for a model of `tokens` tokens.

        `context`: the number of tokens to which the model attends besides its own, 0 for none.
        """
        generator = torch.Generator().manual_seed(recipe.seed + 2)
        self.halves, self.tokens, self.context = halves, tokens, context
        wanted = math.ceil(recipe.rows / (samples * halves))

        def choose(among: int, count: int) -> torch.Tensor:
            return torch.rand(samples, halves, among, generator=generator).argsort(-1)[..., : min(among, count)]

        self.rows = choose(tokens, wanted)
        self.queries = choose(tokens, QUERIES_PER_SAMPLE)
        self.context_order = choose(context, context)
        self.context_rows = self.context_order[..., :wanted]
        queries = self.queries.shape[-1]
        # Attention keeps whole K and V, so only every `stride`-th sample is kept; samples are ordered by group, halves
        # alternate. An odd stride of at most the samples of a group meets both halves of every group.
        wanted = math.ceil(recipe.queries / queries)
        stride = max(1, min(samples * halves // wanted, recipe.samples))
        stride -= 1 - stride % 2
        order = torch.arange(samples * halves).reshape(samples, halves)
        self.attention = order % stride == 0

    def flat(self, table: torch.Tensor, members: slice) -> torch.Tensor:
        """Return the table's rows of a batch, conditional halves first as in the forward pass."""
        return table[members].transpose(0, 1).flatten(0, 1)


def masked_last(order: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """Return an order of tokens (B, M) in which those that are not `kept` (B, M) come last, all else as it was.

    Most tokens of a prompt are masked, and say nothing of the layers that read the prompt.
    """
    masked = ~kept.gather(1, order)
    return order.gather(1, masked.int().argsort(dim=1, stable=True))


def share_of_rows(rows: int, call: int, calls: int) -> int:
    """Return how many of `rows` rows a call gives, so that all calls give as many and together `rows`; at least 1."""
    return max(1, rows * (call + 1) // calls - rows * call // calls)
