"""Conditions, classifier-free guidance, and the settings of a sampling run."""

import pytest
import torch
from torch import nn

from tqdit.architectures import registry
from tqdit.errors import InputError
from tqdit.sampling.guidance import ClassLabels, Sampling, arguments, predict

LABELS = torch.tensor([3, 7, 3])
CLASSES = ClassLabels(10)


class Spy(nn.Module):
    """eps = label, v = -label; keeps its inputs."""

    def forward(self, x, timestep, class_labels, return_dict):
        self.x, self.t, self.labels = x, timestep, class_labels
        plane = class_labels[:, None, None, None].float().expand(-1, 1, 4, 4)
        return (torch.cat([plane, -plane], 1),)


def test_trap_6_halves_are_paired_and_combined_per_sample() -> None:
    spy, x, t = Spy(), torch.randn(3, 1, 4, 4), torch.tensor([5, 600, 20])
    out = predict(spy, x, t, *arguments(CLASSES, LABELS, 1.5), 1.5)
    assert torch.equal(spy.x, torch.cat([x, x]))
    assert spy.t.tolist() == [5, 600, 20, 5, 600, 20]
    assert spy.labels.tolist() == [3, 7, 3, 10, 10, 10]
    expected = 10 + 1.5 * (LABELS - 10.0)
    assert torch.allclose(out[:, 0, 0, 0], expected)
    assert torch.equal(out[:, 1, 0, 0], -LABELS.float())  # v of the conditional half


def test_guidance_of_one_runs_the_conditional_half_alone() -> None:
    spy, x = Spy(), torch.randn(3, 1, 4, 4)
    out = predict(spy, x, torch.zeros(3), *arguments(CLASSES, LABELS, 1.0), 1.0)
    assert len(spy.x) == 3
    assert out[:, 0, 0, 0].tolist() == LABELS.tolist()


@pytest.mark.parametrize("guidance", [1.0, 1.5])
def test_the_output_of_a_model_is_the_first_that_it_returns(guidance: float) -> None:
    spy, x, inputs = Spy(), torch.ones(3, 1, 4, 4), arguments(CLASSES, LABELS, guidance)
    expected = predict(spy, x, torch.zeros(3), *inputs, guidance)
    forward = spy.forward
    spy.forward = lambda *args, **kwargs: (*forward(*args, **kwargs), torch.zeros(6, 2, 4, 4) + 9)
    assert torch.equal(predict(spy, x, torch.zeros(3), *inputs, guidance), expected)


def test_guidance_needs_the_unconditional_arguments() -> None:
    with pytest.raises(ValueError, match=r"guidance of 1\.5 needs"):
        predict(Spy(), torch.ones(3, 1, 4, 4), torch.zeros(3), CLASSES.rows(LABELS), None, 1.5)


class Nested(nn.Module):
    """Keeps its keyword arguments."""

    def forward(self, x, **inputs):
        self.inputs = inputs
        return (x,)


def test_nested_arguments_are_paired_and_constants_kept() -> None:
    class Text:
        count = 2

        def rows(self, indices):
            return {"embeds": indices[:, None].float(), "added": {"size": indices[:, None], "ratio": None}}

        def null(self, count, device):
            return {"embeds": torch.full((count, 1), -1.0), "added": {"size": torch.full((count, 1), 9), "ratio": None}}

    model = Nested()
    predict(model, torch.ones(2, 1, 4, 4), torch.zeros(2), *arguments(Text(), torch.tensor([1, 0]), 2.0), 2.0)
    assert model.inputs["embeds"].tolist() == [[1], [0], [-1], [-1]]
    assert model.inputs["added"]["size"].tolist() == [[1], [0], [9], [9]]
    assert model.inputs["added"]["ratio"] is None
    assert model.inputs["return_dict"] is False


def test_null_class_is_the_last_row_of_the_label_table(model) -> None:
    classes = registry.conditions(registry.config_of(model))
    name = "transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"
    assert len(model.state_dict()[name]) == classes.count + 1
    null = classes.null(2, torch.device("cpu"))["class_labels"]
    assert (null.tolist(), null.dtype) == ([classes.count] * 2, torch.int64)


def test_a_model_without_classes_needs_conditions() -> None:
    with pytest.raises(InputError, match="a PixArtTransformer2DModel is sampled under prompts"):
        registry.conditions({"_class_name": "PixArtTransformer2DModel", "num_embeds_ada_norm": 1000})


@pytest.mark.parametrize(
    "bad",
    [{"sampler": "euler"}, {"steps": 0}, {"guidance": -0.1}, {"guidance": float("inf")}, {"guidance": float("nan")}],
)
def test_bad_sampling_is_an_error(bad: dict) -> None:
    with pytest.raises(InputError, match=next(iter(bad))):
        Sampling(**bad)


def test_the_least_sampling_is_legal() -> None:
    assert Sampling("ddpm", steps=1, guidance=0).steps == 1
    assert Sampling() == Sampling("auto", 50, 1.5)
