"""What the rest of the program knows of a token mixer, and the mixers by name.

A mixer is one class in one file, registered under the name that ``model.mixer`` gives it; see
docs/architecture.md for an example. Everything in `TokenMixer` except `initial_state` and
`__call__` has a default that is right for any mixer.
"""

import dataclasses
import importlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import jax
from flax import nnx

from simplernn_jax.array_types import Activations, LogicalAxes, SegmentIds
from simplernn_jax.config import ModelConfig, Scalar
from simplernn_jax.errors import UserError, nearest_name, one_line
from simplernn_jax.files import importing, sha256_hex
from simplernn_jax.ops.primitive import vary_like


class TokenMixer(nnx.Module):
    """Base class of the layers that mix the tokens of a sequence.

    A subclass is constructed with ``(config: ModelConfig, *, rngs: nnx.Rngs)``. Its parameters are
    `nnx.Param`; those of `models.layers` are sharded over a mesh, others are replicated.
    """

    starts_from_zero = False
    """Whether the initial state is zero, for which `__call__` then accepts None, too."""

    def initial_state(self, batch_size: int) -> Any:
        """Return the state before the first token: a pytree of arrays, their first axis B."""
        raise NotImplementedError

    def __call__(
        self, x: Activations, state: Any, segment_ids: SegmentIds | None = None
    ) -> tuple[Activations, Any]:
        """Mix the tokens of a sequence, causally.

        A sequence in one call or in several, each with the state of the one before, gives the same
        result up to rounding.

        Args:
          x: ``[B, T, D]``.
          state: before the first token, as `initial_state` or an earlier call returned it.
          segment_ids: ``[B, T]``; where the id changes, the state is the initial one again. `state`
            belongs to the first token's segment. None: all tokens are of one segment.

        Returns:
          ``[B, T, D]``, and the state after the last token.
        """
        raise NotImplementedError

    def mix(
        self, x: Activations, state: Any | None, segment_ids: SegmentIds | None
    ) -> tuple[Activations, Any]:
        """Call the mixer; None is the initial state."""
        if state is None and not self.starts_from_zero:
            state = jax.tree.map(lambda s: vary_like(s, x), self.initial_state(x.shape[0]))
        return self(x, state, segment_ids)

    def initialize_depth(self, layer: int, num_layers: int) -> None:
        """Adapt initial values to the layer's place, 0 to num_layers - 1; does nothing here."""

    def state_axes(self) -> Any:
        """Return the `LogicalAxes` of each array of the state, in its structure."""
        graph, params = nnx.split(self)
        state = jax.eval_shape(lambda params: nnx.merge(graph, params).initial_state(1), params)
        return jax.tree.map(lambda _: LogicalAxes("batch"), state)


MakeMixer = Callable[..., TokenMixer]
"""A subclass of `TokenMixer`, or a function that returns a mixer: ``(config, *, rngs)``."""


@dataclasses.dataclass(frozen=True)
class Registered:
    """A mixer and what is known of it before it is constructed; see `register_mixer`."""

    make: MakeMixer
    options: Mapping[str, Scalar] | None
    mesh_axes: tuple[str, ...]
    check: Callable[[ModelConfig], None]


_registry: dict[str, Registered] = {}
_Make = TypeVar("_Make", bound=MakeMixer)


def register_mixer(
    name: str,
    *,
    options: Mapping[str, Scalar] | None = None,
    mesh_axes: tuple[str, ...] = ("data", "fsdp"),
    check: Callable[[ModelConfig], None] = lambda config: None,
) -> Callable[[_Make], _Make]:
    """Register a mixer, to be chosen by ``model.mixer = name``; a decorator of its class.

    Args:
      name: a Python identifier.
      options: names and defaults of its options. ``config.mixer_options`` of the constructor holds
        a value for each of them; another name or type is rejected. None: any scalars.
      mesh_axes: axes of the device mesh that it supports. Data parallelism and FSDP need nothing
        of a mixer; over ``tensor`` it has a shard of the heads, over ``sequence`` one of the
        tokens, and over ``pipeline`` its parameters are stacked and its initial state is zero.
      check: raises `UserError` for a configuration that the mixer cannot have.

    Raises:
      ValueError: another mixer has the name.
    """

    def register(make: _Make) -> _Make:
        # A module that is imported again, or a cell that is run again, may replace its mixer.
        if name in _registry and _path_of(_registry[name].make) != _path_of(make):
            raise ValueError(f"mixer {name!r} is already registered; choose another name")
        _registry[name] = Registered(make, options, mesh_axes, check)
        return make

    return register


def _path_of(make: MakeMixer) -> tuple[str, str]:
    return make.__module__, make.__qualname__


def find_mixer(name: str) -> Registered:
    """Return a registered mixer; raises `UserError` for an unknown name."""
    if name not in _registry:
        raise UserError(
            f"config.model.mixer={name!r} is invalid: expected one of "
            f"{', '.join(sorted(_registry))}{nearest_name(name, _registry)}; name the file of "
            "a mixer of your own by --plugin (load_model: plugin)"
        )
    return _registry[name]


def load_plugin(plugin: str | os.PathLike[str]) -> None:
    """Import a user's module, which registers mixers.

    Args:
      plugin: path of a Python file, or name of a module that can be imported.

    Raises:
      UserError: it does not exist, or its code raises.
    """
    text = os.fspath(plugin)
    if text.endswith(".py") or os.sep in text:
        file = Path(text).expanduser()
        name = f"simplernn_plugin_{sha256_hex(os.path.realpath(file))[:16]}"
        with importing(file, "--plugin", name):
            return
    path = sys.path[:]
    sys.path.append(os.getcwd())
    try:
        importlib.import_module(text)
    except (Exception, SystemExit) as error:
        kind = type(error).__name__
        raise UserError(
            f"--plugin={text}: {kind}: {one_line(str(error))}; specify a Python file, or a module "
            "that can be imported"
        ) from error
    finally:
        sys.path[:] = path


def make_mixer(name: str, config: ModelConfig, *, rngs: nnx.Rngs) -> TokenMixer:
    """Construct a mixer, with a value for each of its options in ``config.mixer_options``.

    Raises:
      UserError: it is not registered, or has variables other than parameters.
    """
    mixer = find_mixer(name).make(complete_options(name, config), rngs=rngs)
    for path, variable in nnx.to_flat_state(nnx.state(mixer, nnx.Not(nnx.Param))):
        raise UserError(
            f"mixer {name!r}: {'.'.join(map(str, path))} is of type {type(variable).__name__}; "
            "keep parameters only, as nnx.Param"
        )
    return mixer


def complete_options(name: str, config: ModelConfig) -> ModelConfig:
    """Return `config` with exactly the options of a mixer, defaults where none is given."""
    options = find_mixer(name).options
    if options is None:
        return config
    given = {key: config.mixer_options[key] for key in options if key in config.mixer_options}
    return dataclasses.replace(config, mixer_options={**options, **given})


def reject_option(name: str, value: Scalar, allowed: str) -> NoReturn:
    """Raise the `UserError` for an option's value."""
    raise UserError(f"config.model.mixer_options={name}={value} is invalid: expected {allowed}")


def check_mixers(config: ModelConfig) -> None:
    """Check names and options of the mixers; raises `UserError`."""
    mixers = {name: find_mixer(name) for name in config.mixers}
    takes_any = any(mixer.options is None for mixer in mixers.values())
    known = {
        key: value for mixer in mixers.values() for key, value in (mixer.options or {}).items()
    }
    for key, value in config.mixer_options.items():
        if key not in known:
            if takes_any:
                continue
            allowed = f"an option of {' or '.join(mixers)}{nearest_name(key, sorted(known))}"
            reject_option(key, value, f"{allowed}; there are {', '.join(sorted(known)) or 'none'}")
        default = known[key]
        if type(value) is not type(default) and (type(default), type(value)) != (float, int):
            reject_option(key, value, f"a value of type {type(default).__name__}")
    for name, mixer in mixers.items():
        mixer.check(complete_options(name, config))
