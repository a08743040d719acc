from pathlib import Path

from sdlora.pocket import sets, world

DATASETS = Path(__file__).parent.parent.parent / "datasets"


def test_the_committed_sets_are_what_the_code_draws(tmp_path: Path) -> None:
    sets.write_sets(tmp_path)
    for name in ("zumi", "blueprint"):
        drawn = {p.relative_to(tmp_path): p.read_bytes() for p in (tmp_path / name).rglob("*") if p.is_file()}
        kept = {p.relative_to(DATASETS): p.read_bytes() for p in (DATASETS / name).rglob("*") if p.is_file()}
        assert drawn == kept
        assert sum(path.suffix == ".png" for path in kept) == 24 + 8


def test_every_caption_has_its_trigger_and_every_validation_image_is_new() -> None:
    for name in ("zumi", "blueprint"):
        folder = DATASETS / name
        assert all(name in path.read_text() for path in folder.rglob("*.txt"))
        training = {path.read_bytes() for path in folder.glob("*.png")}
        validation_folder = {path.read_bytes() for path in (folder / "holdout").glob("*.png")}
        assert (len(training), len(validation_folder)) == (24, 8)
        assert not training & validation_folder


def test_the_character_is_everywhere_in_every_pose() -> None:
    drawn = [sets.character_scene(index) for index in range(sets.NUM_TRAINING)]
    assert {scene.place for scene, _ in drawn} == set(world.PLACES)
    assert {scene.size for scene, _ in drawn} == set(world.SIZES)
    assert {scene.position for scene, _ in drawn} == set(world.POSITIONS)
    assert {pose.words for _, pose in drawn} == {pose.words for pose in sets.POSES}
    assert "zumi" not in world.KINDS


def test_the_style_shows_known_subjects() -> None:
    assert {sets.style_scene(index).kind for index in range(sets.NUM_TRAINING)} == set(world.KINDS)
