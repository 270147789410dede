"""How much arithmetic one denoiser call is: what no integer runtime of the same model can do without."""

from collections.abc import Mapping
from dataclasses import dataclass

from tqdit.architectures.shapes import tokens, width
from tqdit.grids.regions import is_merged
from tqdit.spec import Role, Solution


@dataclass(frozen=True)
class Operations:
    """Of one call at one batch size. A multiplication and an addition are two operations.

    `integer`: int8 matmuls, each counted once. `executed`: the same with the second product of two-region sites.
    `weight_only_bytes`: int8 codes of the layers on float inputs, read once.
    """

    integer: int
    executed: int
    weight_only_bytes: int

    def floor_ms(self, int8_gops: float, read_gb_per_s: float) -> float:
        """The least milliseconds at a machine's measured peaks (10^9 operations/s, 10^9 bytes/s)."""
        return self.integer / int8_gops / 1e6 + self.weight_only_bytes / read_gb_per_s / 1e6


def count_operations(solution: Solution, batch: int) -> Operations:
    """Operations of one call with `batch` samples.

    Linear layers are 2 B N in out; Q K^T and P V are 2 B N N C each. A two-region operand (after GELU, after softmax)
    takes two products, unless its regions merge.
    """
    config = solution.model_config
    layers, n, c = int(config["num_layers"]), tokens(config), width(config)
    linears = {"qkv": 3 * c * c, "out": c * c, "fc1": 4 * c * c, "fc2": 4 * c * c}
    per_block = 2 * batch * n * (sum(linears.values()) + 2 * n * c)
    twice = {Role.GELU: 2 * batch * n * linears["fc2"], Role.SOFTMAX: 2 * batch * n * n * c}
    again = sum(twice[p.spec.role] for p in solution.params.values() if p.spec.grid.two_region and not is_merged(p))
    return Operations(layers * per_block, layers * per_block + again, _weight_only_bytes(solution))


def _weight_only_bytes(solution: Solution) -> int:
    """Tensors that several sites share are counted once."""
    sizes: Mapping[int, int] = {
        solution.codes[spec.name].data_ptr(): solution.codes[spec.name].numel()
        for spec in solution.sites
        if spec.role is Role.WEIGHT_ONLY
    }
    return sum(sizes.values())
