"""Any transformer class of diffusers, whose graph is traced from a recorded call.

Its own forward runs as diffusers wrote it. Linear layers in it are replaced by layers on codes, which the graph of the
solution lists; nothing else about the class is known here.
"""

import functools
from typing import Any, cast

from torch import nn

from tqdit.architectures.from_config import empty_of, float_model
from tqdit.architectures.interface import Config
from tqdit.errors import InputError, suggestion
from tqdit.graph import Graph
from tqdit.spec import Solution


class Traced:
    """The architecture of a diffusers class of which only the name is known.

    Raises `InputError` for a name that is no model class of the installed diffusers.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.model_class()

    def model_class(self) -> type[Any]:
        """Return diffusers' class of that name."""
        import diffusers

        kind = getattr(diffusers, self.name, None)
        if not (isinstance(kind, type) and issubclass(kind, nn.Module) and issubclass(kind, diffusers.ModelMixin)):
            known = [name for name in dir(diffusers) if "Transformer" in name]
            raise InputError(
                f"diffusers {diffusers.__version__} has no model class '{self.name}'{suggestion(self.name, known)}"
            )
        return cast(type[Any], kind)

    def build(self, config: Config) -> nn.Module:
        """Make the float model with initial weights. Raise `InputError` where diffusers refuses the config."""
        return cast(nn.Module, float_model(self.model_class(), config))

    def empty(self, config: Config) -> nn.Module:
        """Make the float model with parameters on the meta device; tables that it computes for itself are real."""
        return empty_of(lambda: self.build(config))

    def check_solution(self, solution: Solution) -> None:
        """Raise `InputError` unless the layers and parameters of a solution are those of its config's model.

        Nothing but empty tensors is made of the model.
        """
        assert solution.graph is not None
        model = self.empty(solution.model_config)
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        found = {name: tuple(solution.graph.shapes[name]) for name in solution.graph.shapes}
        for name in sorted(expected.keys() | found.keys()):
            if name not in found:
                raise InputError(f"the solution has no value for parameter '{name}'")
            if name not in expected:
                raise InputError(f"the solution has '{name}', which this model has no place for")
            if expected[name] != found[name]:
                raise InputError(f"parameter '{name}' has shape {found[name]}, the model's is {expected[name]}")
        layers = dict(model.named_modules())
        for name in layer_names(solution.graph):
            if not isinstance(layers.get(name), nn.Linear):
                raise InputError(f"the graph's layer '{name}' is no linear layer of a {self.name}")


def layer_names(graph: Graph) -> list[str]:
    """Return the layers whose weights may be codes: those that read a site, then those on float inputs."""
    sites = [name for block in graph.blocks for linear in block.linears for name in linear.modules]
    return sites + [name for block in graph.blocks for name in block.float_input] + list(graph.outside)


@functools.cache
def traced(name: str) -> Traced:
    """Return the architecture of a diffusers class, one for each name."""
    return Traced(name)
