"""Configuration files: a Python file with ``get_config()``, or the JSON that a run saved."""

import os
from pathlib import Path

from simplernn_jax.config import Config, from_json
from simplernn_jax.errors import UserError, nearest_name
from simplernn_jax.files import importing, read_file
from simplernn_jax.project import ROOT

_CONFIGS = ROOT / "configs"


def config_names() -> list[str]:
    """List the names of this project's configurations."""
    return sorted(file.stem for file in _CONFIGS.glob("*.py"))


def load_config(name_or_path: str | os.PathLike[str]) -> Config:
    """Load a configuration by its path, or one of this project by its name, such as ``base``.

    Raises:
      UserError: no such file, it returns no `Config`, or it has an error, whose line is named.
    """
    given = os.fspath(name_or_path)
    path = _find(given)
    try:
        content = read_file(path)  # a regular file, which the import below reads again
    except FileNotFoundError as error:
        raise UserError(f"--config={given}: no such file{_near(path)}") from error
    except OSError as error:
        raise UserError(
            f"--config={given}: {error.strerror}; specify a file such as configs/base.py"
        ) from error
    if path.suffix == ".json":
        try:
            return from_json(content.decode("utf-8", "replace"))
        except UserError as error:
            raise UserError(f"--config={given}: {error}") from error
    with importing(path, "--config", "simplernn_config") as module:
        if not hasattr(module, "get_config"):
            raise UserError(f"--config={given}: has no get_config(); define one returning a Config")
        config = module.get_config()
    if not isinstance(config, Config):
        kind = type(config).__name__
        raise UserError(f"--config={given}: get_config() returned {kind}; return a Config")
    return config


def _find(path: str) -> Path:
    """Return the file at `path`, or else the one of this project with that path or name."""
    given = Path(os.path.expanduser(path))
    if os.path.lexists(given) and not given.is_dir():
        return given
    in_project = _CONFIGS / f"{path}.py" if path.isidentifier() else ROOT / given
    return in_project if in_project.is_file() else given


def _near(path: Path) -> str:
    """Suggest a configuration of this project in place of a missing file."""
    names = config_names()
    return nearest_name(path.stem, names) or f"; there are {', '.join(names)}"
