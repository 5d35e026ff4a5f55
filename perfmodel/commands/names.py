"""What a shell offers for the value of an option: names that are known, else files."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

Items = list["CompletionItem"]


def models(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Bundled models, or paths."""
    from ..architectures import model_names

    return _names_or_files(model_names(), incomplete)


def devices(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Bundled devices, or paths of TOML files."""
    from ..devices import profile

    return _names_or_files(profile.names(), incomplete)


def hosts(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """ "default", bundled hosts, or paths of TOML files."""
    from ..devices import host

    return _names_or_files(("default", *host.names()), incomplete)


def methods(ctx: click.Context, param: click.Parameter, incomplete: str) -> Items:
    """Methods, and the options of one after its colon: `lora:r=8,ta` → `lora:r=8,targets=`."""
    from click.shell_completion import CompletionItem

    from ..methods import options, registered

    name, colon, tail = incomplete.partition(":")
    known = registered()
    if not colon:
        return [CompletionItem(m, help=known[m].what_trains) for m in known if m.startswith(name)]
    if name not in known:
        return []
    done, _, key = tail.rpartition(",")
    head = f"{name}:{done}," if done else f"{name}:"
    given = {item.partition("=")[0] for item in done.split(",")}
    found = options(known[name]).items()
    return [CompletionItem(f"{head}{k}=", help=text) for k, text in found if k.startswith(key) and k not in given]


def _names_or_files(names: Iterable[str], incomplete: str) -> Items:
    from click.shell_completion import CompletionItem

    found = [CompletionItem(name) for name in names if name.startswith(incomplete.lower())]
    return found or [CompletionItem(incomplete, type="file")]
