"""Let layers take float inputs after all, where integers would cost too much of their outputs."""

from collections.abc import Mapping
from dataclasses import replace

from tqdit.graph import Graph, Linear
from tqdit.plan import plan
from tqdit.recipe import Recipe
from tqdit.spec import SiteSpec


def on_float_inputs(graph: Graph, site: str) -> Graph:
    """Return the graph with the layers that read a site among those on float inputs."""
    blocks = []
    for block in graph.blocks:
        fallen = [linear for linear in block.linears if linear.source.name == site]
        modules = tuple(name for linear in fallen for name in linear.modules)
        matmuls = tuple(matmul for matmul in block.matmuls if matmul not in fallen)
        blocks.append(replace(block, matmuls=matmuls, float_input=block.float_input + modules) if fallen else block)
    return replace(graph, blocks=tuple(blocks))


def specs(graph: Graph, linear: Linear, recipe: Recipe) -> list[SiteSpec]:
    """Return the sites of a linear's weights as those of layers on float inputs."""
    planned = plan(on_float_inputs(graph, linear.source.name), recipe)
    return [planned[name].spec for name in linear.weights]


def note(graph: Graph, site: str, sqnr: float, tokens: Mapping[str, float], recipe: Recipe) -> str:
    """Return a sentence on what it costs that the layers of a site take float inputs.

    `graph`: of the model, with the site's layers among the integer ones. `tokens`: rows of each site in a call.
    """
    work, weights = {}, 0
    for block in graph.blocks:
        for linear in block.linears:
            features, outputs = graph.features(linear)
            work[linear.source.name] = tokens.get(linear.source.name, 1.0) * features * outputs
            weights += features * outputs if linear.source.name == site else 0
    bytes_more = weights * (recipe.float_input_bits - recipe.weight_bits) / 8
    share = work[site] / sum(work.values())
    return (
        f"float inputs: integers would leave {sqnr:.1f} dB of its outputs; {bytes_more / 1e6:.1f} MB more, and "
        f"{share:.1%} of the linear layers' arithmetic in float"
    )
