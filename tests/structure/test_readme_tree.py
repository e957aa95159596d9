"""The README's tree names every module, with the phrase that the module says of itself."""

from __future__ import annotations

from tests.structure.readme_tree import CHECKOUT, FOLDERS, in_readme, tree


def test_the_tree_is_the_modules_own() -> None:
    assert in_readme() == tree(), "python -m tests.structure.readme_tree writes it anew"


def test_every_folder_is_in_it() -> None:
    package = CHECKOUT / "lora_lab"
    folders = {f"{path.parent.relative_to(CHECKOUT)}/" for path in package.rglob("*.py")}
    assert folders <= set(FOLDERS)
