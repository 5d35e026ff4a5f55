"""`perfmodel app`."""

import click

from ..errors import UserError


@click.command()
@click.option(
    "--host",
    default="127.0.0.1",
    show_default=True,
    help="Address to bind to; 0.0.0.0 lets other machines in, as on a server that is meant for them.",
)
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True, help="Port to listen on.")
@click.option("--browser", is_flag=True, help="Open a browser.")
def app(host: str, port: int, browser: bool) -> None:
    """Serve a page on which all of it is chosen with the mouse, for people who open no terminal.

    The choices are in the address, which can be shared; a dropped training config is parsed and stored nowhere.
    """
    try:
        from ..app.page import serve
    except ImportError as error:
        needs = f"the page needs the app extra ({error.name} is missing)"
        raise UserError(f"{needs}: pip install 'perfmodel[app]'") from None
    try:
        page = serve(host, port, browser=browser)
    except OSError:
        raise UserError(f"{host}:{port} cannot be listened on; give another --port or --host") from None
    click.echo(f"the page is at {page.local_url} (Ctrl-C ends it)")
    page.block_thread()
