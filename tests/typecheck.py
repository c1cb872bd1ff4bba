"""The run-time type checker of the suite: shapes and dtypes by jaxtyping, an int where a float is asked for as usual."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
