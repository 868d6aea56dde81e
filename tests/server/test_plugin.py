from types import SimpleNamespace

from starlette.datastructures import State

from server.plugin import _reserved_names


def test_names_of_the_target_and_of_its_adapters_are_no_networks() -> None:
    paths = [SimpleNamespace(name="target"), SimpleNamespace(name="alias")]
    models = SimpleNamespace(base_model_paths=paths, lora_requests={"style": object()})
    names = _reserved_names(State({"openai_serving_models": models}))
    assert names == ("target", "alias", "style")
