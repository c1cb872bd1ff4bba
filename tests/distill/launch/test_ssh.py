"""Lines for ssh: one for each host, quoted twice; what is no host name is refused."""

import shlex
from pathlib import Path

import pytest

from distill.errors import RecipeError
from distill.launch.ssh import lines_of


def test_lines__one_for_each_host_whose_words_survive_two_shells() -> None:
    lines = lines_of("me@gpu01,gpu02", 29500, Path("/my folder"), ["distill", "a=$(date) 'b'"])
    assert [shlex.split(line)[1] for line in lines] == ["me@gpu01", "gpu02"]
    remote = shlex.split(shlex.split(lines[1])[2])
    assert remote[:3] == ["cd", "/my folder", "&&"] and remote[-1] == "a=$(date) 'b'"
    variables = dict(word.split("=") for word in remote[3:7])
    assert variables["PET_MASTER_ADDR"] == "gpu01" and variables["PET_NODE_RANK"] == "1"


@pytest.mark.parametrize("hosts", ["", "a,,b", "a;date", "-oProxyCommand=x", "a,a"])
def test_lines__refuse_what_is_no_host(hosts: str) -> None:
    with pytest.raises(RecipeError, match="--hosts"):
        lines_of(hosts, 29500, Path("/"), ["distill"])
