"""Count the arithmetic of one denoiser call, which every integer runtime of the same model has to do."""

from collections.abc import Mapping
from dataclasses import dataclass

from tqdit.architectures.interface import Linear
from tqdit.architectures.registry import architecture, graph
from tqdit.spec import Role, Solution


@dataclass(frozen=True)
class Operations:
    """The operations of one call at one batch size.

    A multiplication and an addition are two operations. `integer`: int8 matmuls, each counted once. `executed`: the
    same with the second product of two-region sites. `weight_only_bytes`: int8 codes of the layers on float inputs,
    read once.
    """

    integer: int
    executed: int
    weight_only_bytes: int

    def floor_ms(self, int8_gops: float, read_gb_per_s: float) -> float:
        """Return the least milliseconds at a machine's measured peaks (10^9 operations/s, 10^9 bytes/s)."""
        return self.integer / int8_gops / 1e6 + self.weight_only_bytes / read_gb_per_s / 1e6


def count_operations(solution: Solution, batch: int, context: int = 0) -> Operations:
    """Return the operations of one call with `batch` samples, whose context has `context` tokens.

    A linear layer is 2 B N in out; Q K^T and P V are 2 B N M C each. A two-region operand (after GELU, after softmax)
    takes two products, unless its regions merge. What does not depend on the timestep is computed once a prompt and not
    counted.
    """
    config = solution.model_config
    structure, tokens = graph(config), architecture(config).tokens(config)
    once, again = 0, 0
    for block in structure.blocks:
        for matmul in block.matmuls:
            if isinstance(matmul, Linear):
                columns, outputs = structure.features(matmul)
                left, count = matmul.source, 2 * batch * tokens * columns * outputs * matmul.source.timed
            else:
                keys = context if matmul.context else tokens
                left, count = matmul.probabilities, 2 * batch * tokens * keys * matmul.width
                once += count  # Q K^T, whose operands have one region
            params = solution.params[left.name]
            once += count
            again += count * (params.spec.grid.two_region and not params.merged)
    return Operations(once, once + again, _weight_only_bytes(solution))


def _weight_only_bytes(solution: Solution) -> int:
    """Return the bytes of weights on float inputs; tensors that several sites share are counted once."""
    sizes: Mapping[int, int] = {
        solution.codes[spec.name].data_ptr(): solution.codes[spec.name].numel()
        for spec in solution.sites
        if spec.role is Role.WEIGHT_ONLY
    }
    return sum(sizes.values())
