"""The type checker that conftest.py applies to annotations of the package."""

import beartype
import numpy as np
from jax import export

(_OPEN_SIZE,) = export.symbolic_shape("size")

check = beartype.beartype(
    conf=beartype.BeartypeConf(
        is_pep484_tower=True,  # an int is a float too, as for type checkers of source
        # The size of an axis is an int, unless an exported program leaves it open. NumPy's integers
        # count: of a sequence only one item, drawn at random, is checked, so a test could flicker.
        hint_overrides=beartype.FrozenDict({int: int | np.integer | type(_OPEN_SIZE)}),
    )
)
