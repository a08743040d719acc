"""Changing an image set: what may be written where, and what can be undone.

The studio's own sets are changed as one wishes, and what is removed goes to the bin. A folder of the artist's own is
never written to before the artist allows it, and its images are only taken out of the set.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from sdlora.common.bundled import BUILTIN

from . import image_set
from .bin import Bin, Change
from .folder_notes import change_notes, read_notes
from .folders import Studio, StudioError
from .locations import images_folder


class SetEditor:
    """An image set that can be changed.

    Args:
        studio: The studio.
        images: The set as it was chosen; see `images_folder`.

    Raises:
        SdloraError: The set does not exist.
    """

    def __init__(self, studio: Studio, images: str) -> None:
        if not images:
            raise StudioError("There are no images yet. Add some first.")
        self._studio, self._bin = studio, Bin(studio)
        self.images = images
        self.folder = images_folder(studio, images)

    @property
    def needs_permission(self) -> bool:
        """Whether it is a folder of the artist's own in which nothing may be written yet."""
        owned = self._studio.owns(self.folder) or self.images.startswith(BUILTIN)
        return not owned and not read_notes(self._studio, self.folder).may_write

    @property
    def taken_out(self) -> tuple[str, ...]:
        """The images that are left out although their files are there."""
        return read_notes(self._studio, self.folder).taken_out

    @property
    def last_change(self) -> Change | None:
        """The change that can be undone next."""
        return self._bin.last(self.folder)

    def allow_writing(self) -> None:
        """Remember that captions and images may be saved in this folder."""
        change_notes(self._studio, self.folder, may_write=True)

    def writable(self) -> Path:
        """Its folder, if captions and images may be saved there.

        Raises:
            StudioError: They may not.
        """
        if self.images.startswith(BUILTIN):
            raise StudioError("Shipped sets cannot be changed. Upload your own images instead.")
        if self.needs_permission:
            raise StudioError(
                f"Nothing was saved: {self.folder} is a folder of your own. Press 'Allow saving in this folder' first, "
                "or upload the images into a set of the studio."
            )
        return self.folder

    def write_caption(self, image: str, text: str) -> None:
        """Save the caption of an image.

        Raises:
            StudioError: There is no such image, nothing may be saved here, or the caption is too long.
        """
        image_set.write_captions(self.writable(), {image: text})

    def change_captions(self, captions: Mapping[str, str], words: str) -> None:
        """Save new captions by image; `words` say what was done, for undoing it.

        Raises:
            StudioError: Nothing may be saved here.
        """
        before = image_set.captions_of(self.writable())
        image_set.write_captions(self.folder, captions)
        if captions:
            changed = {name: [before.get(name, ""), text] for name, text in captions.items()}
            self._bin.record(self.folder, words, captions=changed)

    def take_out(self, image: str) -> str:
        """Take an image out of the set; its file stays, or lies in the bin if the set is one of the studio's own.

        Returns:
            What was done.

        Raises:
            StudioError: There is no such image.
        """
        captions = image_set.caption_files(self.folder, image)
        words = f"{image} was taken out"
        if self._studio.owns(self.folder):
            self._bin.record(self.folder, words, move=[image, *captions])
        else:
            left_out = dict.fromkeys((*self.taken_out, image))
            change_notes(self._studio, self.folder, taken_out=tuple(left_out))
            self._bin.record(self.folder, words, taken_out=[image])
        return words

    def put_all_back(self) -> str:
        """Put back all images whose files stayed where they are; returns what was done."""
        number = len(self.taken_out)
        change_notes(self._studio, self.folder, taken_out=())
        return f"{number} images are back in the set."

    def undo(self, key: str) -> str:
        """Undo a change of this set; captions that were edited since keep their edits.

        Returns:
            What was done.

        Raises:
            StudioError: It is undone already, or a file cannot be put back.
        """
        change = self._bin.find(key)
        if change is None or change.folder != str(self.folder.absolute()):
            raise StudioError("This was undone already.")
        now = image_set.captions_of(self.folder)
        wanted = {name: old for name, (old, new) in change.captions.items() if now.get(name) == " ".join(new.split())}
        if wanted:
            image_set.write_captions(self.writable(), wanted)
        if change.taken_out:
            kept = tuple(name for name in self.taken_out if name not in change.taken_out)
            change_notes(self._studio, self.folder, taken_out=kept)
        self._bin.put_back(change)
        kept_edits = len(change.captions) - len(wanted)
        return f"Undone: {change.words}." + (
            f" {kept_edits} captions were edited since and stay." if kept_edits else ""
        )
