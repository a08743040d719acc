"""The architecture as a test: a file imports only from floors below its own."""

import ast
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "sdlora"

FLOORS = {
    "errors": 0, "seeds": 0, "files": 0, "events": 0, "shipped": 0, "stores": 0, "quiet": 0,
    "stopping": 0, "locks": 0, "devices": 1, "processes": 1,
    "config": 1, "dataconfig": 1, "configfile": 1, "models.architectures": 1, "models.headers": 1,
    "data.images": 2, "data.captions": 2, "data.buckets": 2, "data.dataset": 2, "data.order": 2,
    "data.masks": 2, "data.split": 2, "data.doctor": 2, "data.thumbnails": 2,
    "diffusion": 2, "lora": 2,
    "models": 3, "pocket": 3, "pipelines": 3,
    "data.cache": 4,
    "training": 5,
    "preview": 6,
    "progress": 7, "runfolder": 7, "adapters": 7, "pictures": 7, "parts": 7, "outputs": 7, "card": 7, "run": 7,
    "advice": 7, "room": 7, "resuming": 7,
    "checkfile": 7, "push": 7, "captioning": 7, "forecast": 7, "batch": 7, "cachefill": 7,
    "cli": 8, "cli_check": 8, "cli_hub": 8, "cli_plan": 8, "cli_tools": 8, "cli_batch": 8, "cli_cache": 8,
    "cli_ui": 8, "__main__": 8,
}  # fmt: skip


def floor(module: str) -> int | None:
    parts = module.split(".")
    for length in range(len(parts), 0, -1):
        if (found := FLOORS.get(".".join(parts[:length]))) is not None:
            return found
    return None


def imports(file: Path) -> set[str]:
    found: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("sdlora"):
            base = (node.module or "").removeprefix("sdlora").lstrip(".")
            found |= {base} if base else {alias.name for alias in node.names if alias.name != "__version__"}
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("sdlora.") for a in node.names if a.name.startswith("sdlora.")}
    return found


def test_imports_run_downward() -> None:
    faults = []
    for file in sorted(PACKAGE.rglob("*.py")):
        module = ".".join(file.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        if module == "__init__" or (file.name == "__init__.py" and not imports(file)):
            continue
        own = floor(module)
        assert own is not None, f"{module} has no floor: add it to FLOORS"
        for imported in imports(file):
            other = floor(imported)
            same_room = module.split(".")[0] == imported.split(".")[0] or own in (0, 1, 7, 8)
            if other is None or other > own or (other == own and not same_room):
                faults.append(f"{module} (floor {own}) imports {imported} (floor {other})")
    assert not faults, "\n".join(faults)


def test_nothing_imports_the_studio() -> None:
    assert not [
        str(file) for file in PACKAGE.rglob("*.py") if any(name.split(".")[0] == "ui" for name in imports(file))
    ]


def test_no_file_is_two_rooms_in_one() -> None:
    files = [*PACKAGE.rglob("*.py"), *PACKAGE.parent.joinpath("ui").glob("*.py")]
    long = {str(file): count for file in files if (count := len(file.read_text().splitlines())) > 420}
    assert not long
