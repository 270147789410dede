"""Compare the training arguments of a checkpoint with the checkpoint's tensors.

A training checkpoint of DiT or SiT keeps the command line of its trainer. Most files have none: then only the sizes
speak, and a user who converts a SiT's weights has to say so.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from tqdit.architectures.shapes import shape_config, shape_names, width
from tqdit.errors import InputError

PLAIN = (str, int, float)  # the types of arguments; a file may hold tensors among them
CLASSES = 1000  # of the published checkpoints, which have no training arguments
OBJECTIVES = ("diffusion", "flow")
FLOW = ("path_type", "interpolant")  # only a training by flow matching has these arguments
# These are the words of SiT's own trainer. Another trainer, REPA, writes "linear" and "v", and counts time the other
# way: its models would be run backwards. So upper and lower case have to match.
FLOW_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {
    "path_type": ("Linear",),
    "interpolant": ("Linear",),
    "prediction": ("velocity",),
}
EPSILON = ("epsilon", "eps", "noise")  # names of DiT's prediction in trainers
DIFFUSION_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {  # the only process that is supported, by argument
    "prediction": EPSILON,
    "prediction_type": EPSILON,
    "predict_xstart": (False,),
    "noise_schedule": ("linear", ""),
    "beta_schedule": ("linear", ""),
    "diffusion_steps": (1000,),
    "num_train_timesteps": (1000,),
}
NAME = re.compile(r"[DS]iT-[A-Z]+/\d+")
SIT = re.compile(r"sit(?![a-z])", re.IGNORECASE)


def arguments_of(loaded: Any) -> dict[str, Any]:
    """Return the training arguments that a checkpoint keeps; empty for a file of weights alone."""
    found = loaded.get("args") if isinstance(loaded, dict) else None
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, PLAIN)}


def objective_of(arguments: Mapping[str, Any], name: str, given: str | None) -> str:
    """Return how a checkpoint was trained, "diffusion" or "flow".

    The training arguments decide; where they say nothing, `given` does; "diffusion" is the default. Raises `InputError`
    for a `given` objective that is unknown or that the arguments contradict. Raises it also where neither says anything
    and the file's `name` is a SiT's: SiT and DiT have the same tensors.
    """
    if given not in (None, *OBJECTIVES):
        raise InputError(f"unknown objective '{given}'; known: {', '.join(OBJECTIVES)}")
    kind = str(arguments.get("model", ""))
    flow = [f"{argument} {arguments[argument]}" for argument in FLOW if arguments.get(argument) is not None]
    if arguments.get("prediction") == "velocity":
        flow.append("prediction velocity")
    if flow or SIT.match(kind):
        said, found = ", ".join([*([f"model {kind}"] if kind else []), *flow]), "flow"
    elif NAME.match(kind):
        said, found = f"model {kind}", "diffusion"
    elif given is None and SIT.match(name) and not kind:
        raise InputError(
            "it is called a SiT, and nothing in it says how it was trained; a SiT and a DiT have the same tensors: "
            "give the objective, flow or diffusion"
        )
    else:
        return given or "diffusion"
    if given not in (None, found):
        raise InputError(f"its arguments say that it was trained by {found} ({said}); the objective given is {given}")
    return found


def check_process(arguments: Mapping[str, Any], objective: str) -> None:
    """Raise `InputError` for a diffusion process that is not DiT's, or for a path or prediction that is not SiT's."""
    legal = FLOW_ARGUMENTS if objective == "flow" else DIFFUSION_ARGUMENTS
    model = "a SiT checkpoint" if objective == "flow" else "a checkpoint"
    for name, values in legal.items():
        if arguments.get(name) is not None and arguments[name] not in values:
            raise InputError(f"it was trained with {name} {arguments[name]!r}; supported of {model} is {values[0]!r}")


def check_classes(arguments: Mapping[str, Any], rows: int, objective: str) -> str:
    """Raise `InputError` unless the label table of `rows` rows has a null class as its last row.

    Returns the assumption that was made, as a sentence; empty if the arguments say it, or if the size is the published
    one.
    """
    classes, dropout = arguments.get("num_classes"), arguments.get("class_dropout_prob")
    if classes is not None and type(classes) is not int:
        raise InputError(f"its arguments say num_classes {classes!r}, which is no whole number")
    if rows == classes or (dropout == 0 and classes is None):
        raise InputError(
            f"it was trained without a null class (the label table has {rows} rows, its arguments say num_classes "
            f"{classes}, class_dropout_prob {dropout}); guidance needs one, and diffusers' model has one"
        )
    expected = None if classes is None else classes + (dropout != 0)
    if expected is not None and rows != expected:
        raise InputError(
            f"the label table has {rows} rows, its arguments say num_classes {classes}, class_dropout_prob {dropout}, "
            f"which is {expected} rows"
        )
    if classes is None and dropout is None and rows != CLASSES + 1:
        process = "SiT's linear path" if objective == "flow" else "DiT's 1000 linear betas"
        return (
            f"nothing says how it was trained: the last of the {rows} rows is taken for the null class, and {process} "
            "for its schedule"
        )
    return ""


def check_sizes(arguments: Mapping[str, Any], config: Mapping[str, Any]) -> None:
    """Raise `InputError` for an argument that says another size than the config that the tensors imply."""
    made = config["out_channels"]
    said = arguments.get("learn_sigma")
    if isinstance(said, bool) and said != (made == 2 * config["in_channels"]):
        raise InputError(f"its arguments say learn_sigma {said}, its final layer makes {made} channels")
    side = config["sample_size"]
    image = arguments.get("image_size")
    if isinstance(image, int) and (image < side or image % side):
        raise InputError(
            f"its arguments say image_size {image}, its position table is for sides of {side}; an image's side is a "
            "multiple of its latent's"
        )
    name = NAME.match(str(arguments.get("model", "")))
    if name is not None and name[0] in shape_names():
        _check_shape(name[0], config)


def _check_shape(name: str, config: Mapping[str, Any]) -> None:
    published = shape_config(name)
    sizes = {
        "layers": (published["num_layers"], config["num_layers"]),
        "channels": (width(published), width(config)),
        "patch_size": (published["patch_size"], config["patch_size"]),
    }
    for what, (expected, found) in sizes.items():
        if expected != found:
            raise InputError(f"its arguments say model {name}, which has {what} {expected}; its tensors have {found}")
