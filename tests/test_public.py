"""The public surface of the package is what it says it is."""

import tqdit


def test_dir_lists_the_public_names_alone() -> None:
    assert dir(tqdit) == sorted(tqdit.__all__)
    assert {"quantize", "load", "sample", "compare", "inspect"} <= set(dir(tqdit))
    assert all(hasattr(tqdit, name) for name in dir(tqdit))
