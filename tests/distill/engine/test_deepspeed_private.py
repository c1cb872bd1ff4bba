"""The names of DeepSpeed that are not promised to stay: the installed version has them, and another is refused by name."""

from types import SimpleNamespace

import pytest

from distill.engine.deepspeed_private import (
    OF_FLAT,
    TESTED,
    require_attributes,
    require_private_names,
)
from distill.errors import SetupError


def test_require_private_names__are_all_there() -> None:
    require_private_names()


def test_require_private_names__what_is_missing_is_named_with_both_versions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("distill.engine.deepspeed_private.version", lambda _: "0.99.0")
    monkeypatch.delattr("deepspeed.comm.comm.cdb")
    with pytest.raises(
        SetupError, match=r"deepspeed = 0\.99\.0: .* no deepspeed\.comm\.comm\.cdb"
    ) as caught:
        require_private_names()
    assert caught.value.message.endswith(f"tested with {TESTED}")
    assert caught.value.fix.endswith(f"deepspeed=={TESTED}")


def test_require_private_names__a_module_that_is_gone_is_named() -> None:
    with pytest.raises(SetupError, match=r"it has no deepspeed\.gone\.name"):
        require_private_names(["deepspeed.gone:name"])


def test_require_attributes__the_first_missing_one_is_named() -> None:
    optimizer = SimpleNamespace(**dict.fromkeys(OF_FLAT))
    require_attributes(optimizer, OF_FLAT)
    del optimizer.bit16_groups
    with pytest.raises(SetupError, match=r"no SimpleNamespace\.bit16_groups, which"):
        require_attributes(optimizer, OF_FLAT)
