"""Quantize a float model of any class while diffusers loads it, without calibration."""

from typing import Any

import torch
from torch import nn

from tqdit.architectures.untraced import untraced_graph
from tqdit.errors import InputError
from tqdit.integrations.config import TQDiTConfig
from tqdit.provenance import Provenance
from tqdit.recipe import Recipe
from tqdit.runtime.traced_assembly import convert_traced
from tqdit.search.direct import direct_solution
from tqdit.system.environment import versions
from tqdit.system.isolation import isolated


@isolated()
def quantize_loaded(model: nn.Module, config: TQDiTConfig, device: torch.device) -> None:
    """Make a float model of diffusers a quantized one, on `device`, each float weight freed once it is coded.

    Nothing is kept of the weights' own hash, which would take as long to compute as the weights to read.
    Raises `InputError` for a weight that is missing or has NaN or Inf, and for a config without a usable recipe.
    """
    recipe = config.recipe()
    if missing := [name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.is_meta]:
        raise InputError(f"the checkpoint of {type(model).__name__} has no '{missing[0]}'")
    graph = untraced_graph(model, left=config.modules_to_not_convert or ())
    solution = direct_solution(model, graph, recipe, _provenance(model, recipe), device)
    convert_traced(solution, "auto", device, None, into=model)


def _provenance(model: Any, recipe: Recipe) -> Provenance:
    source = str(model.config.get("_name_or_path") or type(model).__name__)
    return Provenance(recipe.label, recipe.model_dump(mode="json"), source, versions=versions())
