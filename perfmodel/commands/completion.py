"""`perfmodel completion`."""

import click

VARIABLE = "_PERFMODEL_COMPLETE"


@click.command()
@click.argument("shell", type=click.Choice(("bash", "zsh", "fish")))
def completion(shell: str) -> None:
    """Print the script that completes commands in a shell.

    \b
    bash:  perfmodel completion bash >> ~/.bashrc
    zsh:   perfmodel completion zsh >> ~/.zshrc       (after compinit)
    fish:  perfmodel completion fish > ~/.config/fish/completions/perfmodel.fish
    """
    from click.shell_completion import get_completion_class

    made = get_completion_class(shell)
    assert made is not None, shell
    click.echo(made(click.get_current_context().find_root().command, {}, "perfmodel", VARIABLE).source())
