"""Commands that run other people's packages are not interrupted by what those warn their own users of."""

import warnings


def without_warnings_of_packages() -> None:
    """Pass over what modules of others warn of: what is deprecated, layers that peft does not know, views of FSDP's."""
    warnings.filterwarnings("ignore", module=r"(?!(perfmodel|validate)\.)")
