from pathlib import Path

import pytest

from sdlora.common.bundled import resolve_data_folder, shipped_config, shipped_configs, shipped_sets
from sdlora.errors import ConfigError


def test_shipped_files_are_found_by_name() -> None:
    assert "quickstart" in shipped_configs()
    assert (shipped_config("quickstart") or Path()).is_file()
    assert shipped_config("nothing") is None
    assert {"zumi", "blueprint"} <= set(shipped_sets())
    for name in shipped_sets():
        assert len(list(resolve_data_folder(f"builtin:{name}").glob("*.png"))) == 24
        assert len(list(resolve_data_folder(f"builtin:{name}/holdout").glob("*.png"))) == 8


def test_other_paths_are_returned_unchanged() -> None:
    assert resolve_data_folder("some/folder") == Path("some/folder")
    assert resolve_data_folder("~/x") == Path.home() / "x"


@pytest.mark.parametrize("name", ["builtin:zumii", "builtin:zumi/../..", "builtin:../configs", "builtin:"])
def test_unknown_shipped_set_is_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="blueprint, zumi"):
        resolve_data_folder(name)
