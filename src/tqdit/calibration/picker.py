"""Which tokens, queries and samples the search gets to see."""

import math

import torch

from tqdit.recipe import Recipe

QUERIES_PER_SAMPLE = 32


class Picker:
    """Seeded choice of tokens of every (sample, guidance half), made once, so that batching changes nothing."""

    def __init__(self, recipe: Recipe, samples: int, halves: int, tokens: int) -> None:
        generator = torch.Generator().manual_seed(recipe.seed + 2)
        self.halves = halves
        rows = min(tokens, math.ceil(recipe.rows / (samples * halves)))
        self.rows = torch.rand(samples, halves, tokens, generator=generator).argsort(-1)[..., :rows]
        queries = min(tokens, QUERIES_PER_SAMPLE)
        self.queries = torch.rand(samples, halves, tokens, generator=generator).argsort(-1)[..., :queries]
        # Attention keeps whole K and V, so only every `stride`-th sample is kept; samples are ordered by group, halves
        # alternate. An odd stride of at most the samples of a group meets both halves of every group.
        wanted = math.ceil(recipe.queries / queries)
        stride = max(1, min(samples * halves // wanted, recipe.samples))
        stride -= 1 - stride % 2
        order = torch.arange(samples * halves).reshape(samples, halves)
        self.attention = order % stride == 0

    def flat(self, table: torch.Tensor, members: slice) -> torch.Tensor:
        """The table's rows of a batch, conditional halves first as in the forward pass."""
        return table[members].transpose(0, 1).flatten(0, 1)
