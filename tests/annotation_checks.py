"""The type checker that conftest.py applies to annotations of the package."""

import beartype

# The tower lets an int stand for a float, as type checkers of source do.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
