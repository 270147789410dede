"""Describe an artifact site by site, as JSON values."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from tqdit.architectures.shapes import shape_name
from tqdit.artifact import folder as artifact
from tqdit.artifact.model_card import traced_shape
from tqdit.errors import InputError
from tqdit.graph import Graph
from tqdit.ops.dispatch import kernel_name
from tqdit.runtime import fitting
from tqdit.runtime.target import Target
from tqdit.sources.source import ModelSource
from tqdit.spec import Solution

SITE = ("name", "role", "bits", "grid", "groups", "granularity")


def inspection(source: ModelSource, target: Target) -> dict[str, Any]:
    """Describe an artifact, and every site of it with the kernel that `target` runs it by.

    Raises `InputError` for a float model.
    """
    if not source.quantized:
        raise InputError(f"'{source.name}' is not quantized; inspect takes an artifact")
    solution = fitting.read(source.folder, source.root)
    kernels, traced = target.kernels, solution.graph is not None
    sites = []
    for spec in solution.sites:
        row = {key: asdict(spec)[key] for key in SITE}
        params = solution.params[spec.name]
        sites.append({**row, "channels": params.channels is not None, "kernel": kernel_name(params, kernels)})
    if solution.graph is not None:
        sites = traced_sites(solution.graph, solution, sites)
    return {
        "name": source.name,
        "shape": traced_shape(solution) if traced else shape_name(solution.model_config),
        **({} if solution.graph is None else {"traced": traced_facts(solution.graph, solution)}),
        "preset": solution.provenance.preset_name,
        "bits": solution.provenance.bits,
        "size_bytes": artifact.size_bytes(source.folder),
        "float32_bytes": 4 * sum(tensor.numel() for tensor in (*solution.codes.values(), *solution.floats.values())),
        "time_groups": solution.time_groups.num_groups,
        "num_timesteps": solution.time_groups.num_timesteps,
        "timesteps": solution.time_groups.interval,
        "stream_max": solution.stream_max,
        "fits_float16": solution.fits_float16,
        "backend": kernels.NAME,
        "device": str(target.device),
        "provenance": solution.provenance.to_json(),
        "sites": sites,
    }


def traced_sites(graph: Graph, solution: Solution, sites: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the sites of a traced model with what feeds each, its rotation, and the layers that read it."""
    readers = {linear.source.name: linear for block in graph.blocks for linear in block.linears}
    owners = {weight: linear.source.feed for linear in readers.values() for weight in linear.weights}
    found = []
    for site in sites:
        name = site["name"]
        feed = readers[name].source.feed if name in readers else owners.get(name, "")
        row = {**site, "feed": feed, "layers": 1, "rotation": solution.params[name].rotation}
        if name in readers:
            weight = solution.params[readers[name].weights[0]].spec
            coded = {"weight_bits": weight.bits, "weight_granularity": str(weight.granularity)}
            row |= {"layers": len(readers[name].modules), **coded}
        found.append(row)
    return found


def traced_facts(graph: Graph, solution: Solution) -> dict[str, Any]:
    """Return what only traced models have: numbers of layers, why layers stay in float, and notes."""
    kept = [name for name in graph.float_input if f"{name}.weight" not in solution.params]
    left = Counter(graph.left.values()) + Counter({"first or last layer of the model": len(kept)})
    return {
        "timestep": graph.timestep,
        "blocks": len(graph.blocks),
        "integer_layers": sum(len(linear.modules) for block in graph.blocks for linear in block.linears),
        "weight_only_layers": len(graph.float_input) - len(kept),
        "left": dict(left),
        "left_layers": {**graph.left, **dict.fromkeys(kept, "first or last layer of the model")},
        "notes": dict(solution.notes),
    }
