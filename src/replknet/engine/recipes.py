"""The configurations that come with the package, by name."""

from __future__ import annotations

from pathlib import Path

PACKAGE = Path(__file__).parents[1]


def recipe_directory() -> Path:
    """Folder of the recipes: inside an installed package, beside ``src`` in a source tree."""
    installed = PACKAGE / "recipes"
    return installed if installed.is_dir() else PACKAGE.parents[1] / "recipes"


def list_recipes() -> list[str]:
    """Names of the recipes, sorted."""
    return sorted(path.stem for path in recipe_directory().glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """File of a recipe that comes with the package, or ``name`` itself if it is a file.

    Raises:
        ValueError: there is no such file and no such recipe.
    """
    path = Path(name)
    if path.is_file():
        return path
    if name in list_recipes():
        return recipe_directory() / f"{name}.yaml"
    raise ValueError(
        f"there is no file and no recipe {name!r}; the recipes are {', '.join(list_recipes())}"
    )
