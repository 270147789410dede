"""Describe an artifact site by site, as JSON values."""

from dataclasses import asdict
from typing import Any

from tqdit.architectures.shapes import shape_name
from tqdit.artifact import folder as artifact
from tqdit.errors import InputError
from tqdit.ops.dispatch import kernel_name
from tqdit.runtime import fitting
from tqdit.runtime.target import Target
from tqdit.sources.source import ModelSource

SITE = ("name", "role", "bits", "grid", "groups", "granularity")


def inspection(source: ModelSource, target: Target) -> dict[str, Any]:
    """Describe an artifact, and every site of it with the kernel that `target` runs it by.

    Raises `InputError` for a float model.
    """
    if not source.quantized:
        raise InputError(f"'{source.name}' is not quantized; inspect takes an artifact")
    solution = fitting.read(source.folder, source.root)
    kernels = target.kernels
    sites = []
    for spec in solution.sites:
        row = {key: asdict(spec)[key] for key in SITE}
        params = solution.params[spec.name]
        sites.append({**row, "channels": params.channels is not None, "kernel": kernel_name(params, kernels)})
    return {
        "name": source.name,
        "shape": shape_name(solution.model_config),
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
