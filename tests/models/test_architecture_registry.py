"""Architectures by the name of their diffusers class."""

import pytest
from torch import nn

from tqdit.architectures import registry
from tqdit.architectures.registry import architecture, config_of, register
from tqdit.errors import InputError


@pytest.fixture(autouse=True)
def _restored(monkeypatch) -> None:
    monkeypatch.setattr(registry, "_LOCATIONS", dict(registry._LOCATIONS))


@pytest.mark.parametrize("model", ["DiTTransformer2DModel", "Transformer2DModel"])
def test_a_class_is_found_by_its_present_and_former_name(model: str) -> None:
    assert architecture(model).name == architecture({"_class_name": model}).name == "DiTTransformer2DModel"


@pytest.mark.parametrize("name", ["UNet2DModel", "", None, ["DiTTransformer2DModel"]])
def test_an_unknown_class_is_named_with_the_supported_ones(name: object) -> None:
    with pytest.raises(InputError) as error:
        architecture({"_class_name": name})
    assert str(error.value).startswith(f"architecture '{name}' is not supported; supported: DiTTransformer2DModel")


def test_an_architecture_of_your_own() -> None:
    register("MyTransformer", "tqdit.architectures.dit:DIT")
    assert architecture("MyTransformer") is architecture("DiTTransformer2DModel")
    assert "MyTransformer" in registry.supported()


@pytest.mark.parametrize("location", ["my_model", ":DIT", "my_model:", "my_model:a b"])
def test_a_location_of_another_form_is_refused(location: str) -> None:
    with pytest.raises(InputError, match=r"'MyTransformer' has location .* must be \"module:object\""):
        register("MyTransformer", location)


@pytest.mark.parametrize("location", ["no_such_module:DIT", "tqdit.architectures.dit:NONE"])
def test_what_cannot_be_loaded_is_named(location: str) -> None:
    register("MyTransformer", location)
    with pytest.raises(InputError, match=f"'MyTransformer' cannot be loaded from '{location}'"):
        architecture("MyTransformer")


def test_the_config_of_a_wrapped_model(model) -> None:
    class Wrapper(nn.Module):
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module, self.config = module, module.config

    assert config_of(Wrapper(model)) == config_of(model)
    assert next(iter(config_of(model).items())) == ("_class_name", "DiTTransformer2DModel")
    linear = nn.Linear(1, 1)
    linear.config = {}
    with pytest.raises(InputError, match="'Linear' is not supported"):
        config_of(linear)
