"""The interface of an architecture: the graph of its matmuls, its float model, and its integer model.

Calibration, search, packing and timing walk a `Graph`; none of them knows a module's name. A new architecture is one
`Architecture`, added to the registry by the name of its diffusers class.
"""

from collections.abc import Mapping
from typing import Any, Protocol, cast

import torch
from torch import nn

from tqdit.architectures.from_config import float_model
from tqdit.errors import InputError
from tqdit.graph import Attention, Block, Graph, Linear, Operand  # noqa: F401
from tqdit.sampling.guidance import Conditions, Sample

Config = Mapping[str, Any]  # a diffusers config, with its "_class_name"


class Architecture(Protocol):
    """One class of float models. A subclass keeps the methods below that have a body, unless its own differ.

    Every `config` is a diffusers config that `check` accepts.
    """

    name: str  # diffusers' class

    def check(self, config: Config) -> None:
        """Raise `InputError` that names the key if a config has an operand that is not known, or sizes too large."""

    def check_sizes(self, config: Config, shapes: Mapping[str, tuple[int, ...]]) -> None:
        """Raise `InputError` if the sizes of a config are not those of tensors with these names and shapes.

        A model of the config is built afterwards, so this bounds its memory by what a file holds. A name may be
        missing from `shapes`, or there may be others: whoever asks compares all of them later.
        """

    def model_class(self) -> type[Any]:
        """Return the class of the float models, which is diffusers' of that name; another library's has its own."""
        import diffusers

        return cast(type[Any], getattr(diffusers, self.name))

    def build(self, config: Config) -> nn.Module:
        """Make the float model with initial weights. Raise `InputError` where diffusers refuses a config."""
        return cast(nn.Module, float_model(self.model_class(), config))

    def graph(self, config: Config) -> Graph:
        """Return the graph of a config's model. No memory is taken for weights."""

    def shape_names(self) -> tuple[str, ...]:
        """The names of the published shapes, such as "DiT-XL/2"."""
        return ()

    def shape_config(self, name: str) -> dict[str, Any]:
        """Return the config of a published shape. Raise `InputError` for a name that is none, naming those that are."""
        raise InputError(f"unknown shape '{name}'; {self.name} has no published shapes")

    def shape_name(self, config: Config) -> str:
        """Return the published name of a config's shape, or its sizes."""
        return f"{self.name} {len(self.graph(config).blocks)}x{self.width(config)}"

    def shape_key(self, config: Config) -> tuple[Any, ...]:
        """Return what is equal for two configs exactly when their models cost the same."""
        return (self.name, self.tokens(config), *self.graph(config).shapes.items())

    def tokens(self, config: Config) -> int:
        """Tokens N that a block has per sample."""

    def width(self, config: Config) -> int:
        """Channels of the residual stream."""

    def input_shape(self, config: Config) -> tuple[int, ...]:
        """Shape (C, H, W) of one sample that the model denoises."""

    def image_side(self, config: Config) -> int:
        """Pixels of a side of the image that a sample is decoded to, by the decoder that its channels are for."""

    def output_channels(self, config: Config) -> int:
        """Channels of the model's output; twice those of the input with a learned variance."""

    def sample(self, config: Config) -> Sample:
        """Return what a sampling run has to know of the model."""
        channels, height, width = self.input_shape(config)
        return Sample((channels, height, width), self.output_channels(config), self.tokens(config))

    def conditions(self, config: Config) -> Conditions | None:
        """Return what the model can be asked for by itself, such as its classes; None for a model of prompts."""
        return None

    def context_tokens(self, condition: Mapping[str, Any]) -> int:
        """Tokens M of the context that a call with these conditions has; 0 for a model without cross-attention."""
        return 0

    def example(self, config: Config, batch: int, seed: int = 0) -> dict[str, torch.Tensor]:
        """Return keyword arguments of a call that condition it, for timing; the second half is unconditional.

        The sample and the timestep are not among them.
        """

    def own_settings(self, config: Config) -> dict[str, Any]:
        """Settings of a config that change what the model computes and that diffusers has no key for."""
        return {}

    def twin(self, name: str) -> str:
        """Return the first name of a parameter that diffusers copies into every block, or `name` itself."""
        return name

    def share(self, model: nn.Module) -> None:
        """Let all blocks of a float model use one instance of what diffusers copies into every block."""
        return None

    def called_apart(self, model: nn.Module) -> list[nn.Module]:
        """Return the modules inside blocks of a float model that its forward also calls outside of them."""
        return []

    def is_table(self, name: str) -> bool:
        """Say whether a parameter is a table whose rows are looked up, and not a factor of a product."""
        return False

    # The integer half.

    block: type[Any]  # the class of the integer blocks, an `IntBlock`
    forward: Any  # a function of a model and the arguments of diffusers' own forward: it calls `model.denoise`

    def check_states(self, model: Any, x: Any) -> None:
        """Raise `InputError` unless x is a batch of samples of this model."""

    def inputs(self, model: Any, x: torch.Tensor, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return what a call needs beside x, checked and on its device: "timestep" (1,) or (B,), and conditions.

        `arguments` are those of `forward` but for x. Raises `InputError` for what does not fit.
        """

    def prepare(self, model: Any, given: dict[str, Any]) -> dict[str, Any]:
        """Return the inputs of a call with what depends on a prompt alone computed, for which `model.runtime.prompt`
        keeps it. Tensors in the result are data of a CUDA graph.
        """
        return given

    def begin(self, model: Any, x: torch.Tensor, given: Mapping[str, Any]) -> Any:
        """Return the `Call` of all blocks: time groups, modulation, context."""

    def run(self, model: Any, x: torch.Tensor, call: Any) -> torch.Tensor:
        """Return the model's output for x in a call, in the dtype of x."""

    def assemble(self, parts: Any) -> None:
        """Put integer modules, made by `parts` (see `Parts`), into diffusers' empty model `parts.model`."""
