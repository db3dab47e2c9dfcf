"""The type checker of array annotations during tests."""

import beartype

# An int is a float, as for static type checkers.
check = beartype.beartype(conf=beartype.BeartypeConf(is_pep484_tower=True))
