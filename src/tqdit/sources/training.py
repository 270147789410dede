"""What the arguments of a training say of its checkpoint, compared with the checkpoint's tensors.

A training checkpoint of DiT keeps the command line of its trainer. Most files have none: then the sizes speak alone.
"""

import argparse
import re
from collections.abc import Mapping
from typing import Any

from tqdit.architectures.shapes import shape_config, shape_names, width
from tqdit.errors import InputError

PLAIN = (str, int, float)  # values that arguments have; a file may hold tensors there
CLASSES = 1000  # of the published checkpoints, which say nothing of their training
FLOW = ("path_type", "interpolant")  # arguments that only a training by flow matching has
EPSILON = ("epsilon", "eps", "noise")  # what trainers call the prediction of DiT
DIFFUSION_ARGUMENTS: Mapping[str, tuple[Any, ...]] = {  # the process that is taken, by the arguments that change it
    "prediction": EPSILON,
    "prediction_type": EPSILON,
    "predict_xstart": (False,),
    "noise_schedule": ("linear", ""),
    "beta_schedule": ("linear", ""),
    "diffusion_steps": (1000,),
    "num_train_timesteps": (1000,),
}
NAME = re.compile(r"DiT-[A-Z]+/\d+")


def arguments_of(loaded: Any) -> dict[str, Any]:
    """The arguments of the training that a checkpoint is of; none in a file of weights alone."""
    found = loaded.get("args") if isinstance(loaded, dict) else None
    if isinstance(found, argparse.Namespace):
        found = vars(found)
    if not isinstance(found, dict):
        return {}
    return {name: value for name, value in found.items() if isinstance(value, PLAIN)}


def check_process(arguments: Mapping[str, Any]) -> None:
    """Raise `InputError` for a training by flow matching, and for a diffusion process that is not DiT's."""
    kind = str(arguments.get("model", ""))
    flow = [f"{name} {arguments[name]}" for name in FLOW if arguments.get(name) is not None]
    if arguments.get("prediction") == "velocity":
        flow.append("prediction velocity")
    if kind.startswith("SiT") or flow:
        said = ", ".join([*([f"model {kind}"] if kind else []), *flow])
        raise InputError(
            f"it was trained by flow matching, as a SiT is ({said}); supported as a file are DiTs, "
            "trained by diffusion; a model of flow matching is a diffusers folder with its scheduler"
        )
    for name, legal in DIFFUSION_ARGUMENTS.items():
        if arguments.get(name) is not None and arguments[name] not in legal:
            raise InputError(
                f"it was trained with {name} {arguments[name]!r}; supported of a checkpoint is {legal[0]!r}"
            )


def check_classes(arguments: Mapping[str, Any], rows: int) -> str:
    """Raise `InputError` unless the label table of so many rows has a null class, the last.

    Returns the assumption that was made, as a sentence; empty if the arguments say it, or the size is the published.
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
        return (
            f"nothing says how it was trained: the last of the {rows} rows is taken for the null class, and DiT's "
            "1000 linear betas for its schedule"
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
