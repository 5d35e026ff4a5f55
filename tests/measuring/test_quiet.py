"""What commands that run other people's packages keep from their users, and what not."""

import warnings

from validate.quiet import without_warnings_of_packages


def test_warnings_of_packages_are_passed_over_and_no_others() -> None:
    """A division by zero in a fit must not go unseen because transformers deprecates something."""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        without_warnings_of_packages()
        for module in ("transformers.utils.generic", "validate.fitting.cpu", "perfmodel.devices.gemm"):
            warnings.warn_explicit(module, RuntimeWarning, f"{module}.py", 1, module=module)
    assert [str(w.message) for w in seen] == ["validate.fitting.cpu", "perfmodel.devices.gemm"]
