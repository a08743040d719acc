from typing import Any

import pytest
import torch
from adapters import LINEAR_TARGETS, answers, trained

from sdlora.errors import ConfigError
from sdlora.lora.inject import inject, inject_state
from sdlora.lora.targets import find_targets, target_of


def test_named_targets_are_the_layers_users_mean(unet: Any) -> None:
    cross = find_targets(unet, ["cross_attention"])
    assert len(cross) == 4 * 4  # four projections in one down, one mid and two up blocks
    assert all(".attn2." in path for path in cross)
    assert {path.split(".attn2.")[1] for path in cross} == {"to_q", "to_k", "to_v", "to_out.0"}
    assert len(find_targets(unet, ["self_attention"])) == 16
    assert len(find_targets(unet, ["mlp"])) == 8
    together = find_targets(unet, LINEAR_TARGETS)
    assert len(together) == len(set(together)) == 40
    assert {target_of(path) for path in together} == set(LINEAR_TARGETS)


def test_a_target_that_matches_nothing_is_an_error() -> None:
    with pytest.raises(ConfigError, match="'mlp' matches no layer"):
        find_targets(torch.nn.Sequential(torch.nn.Linear(2, 2)), ["mlp"])


def test_removing_puts_the_very_modules_back(unet: Any) -> None:
    modules, before = dict(unet.named_modules()), answers(unet)
    adapter = trained(unet)
    assert not torch.equal(answers(unet), before)
    adapter.remove()
    assert {name: id(module) for name, module in unet.named_modules()} == {n: id(m) for n, m in modules.items()}
    assert torch.equal(answers(unet), before)


def test_disabled_restores_what_it_found(unet: Any) -> None:
    before = answers(unet)
    adapter = trained(unet)
    first = next(iter(adapter.layers.values()))
    first.enabled = False
    changed = answers(unet)
    with pytest.raises(RuntimeError), adapter.disabled():
        assert torch.equal(answers(unet), before)
        raise RuntimeError
    assert torch.equal(answers(unet), changed)
    assert not first.enabled
    adapter.set_strength(0.0)
    assert torch.equal(answers(unet), before)


def test_a_start_is_a_function_of_seed_and_path(unet: Any) -> None:
    paths = find_targets(unet, ["cross_attention"])
    starts = []
    for seed, chosen in ((0, paths), (0, paths[5:]), (1, paths)):
        adapter = inject(unet, chosen, 4, 4.0, seed)
        adapter.remove()
        starts.append(adapter.state())
    assert all(torch.equal(starts[0][path].down, starts[1][path].down) for path in paths[5:])
    assert not torch.equal(starts[0][paths[0]].down, starts[2][paths[0]].down)
    assert not torch.equal(starts[0][paths[0]].down, starts[0][paths[1]].down)


def test_state_is_a_copy_and_loads_back(unet: Any) -> None:
    adapter = trained(unet)
    kept, expected = adapter.state(), answers(unet)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(1.0)
    assert not torch.equal(answers(unet), expected)
    adapter.load(kept)
    assert torch.equal(answers(unet), expected)
    adapter.remove()
    assert torch.equal(answers(inject_state(unet, kept)._unet), expected)
    with pytest.raises(ConfigError):
        adapter.load(dict(list(kept.items())[1:]))
