"""app: a page in the browser."""

from __future__ import annotations

import click

from clipkit import DEFAULT_MODEL
from clipkit.commands.arguments import MODEL_HELP
from clipkit.errors import UsageError


@click.command()
@click.option("--model", default=DEFAULT_MODEL, show_default=True, help=MODEL_HELP)
@click.option("--images", help="A folder of pictures, or a pack, to search in.  [default: drawings]")
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen at; there is no password.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0 is any free one.")
@click.option("--device", default="auto", show_default=True, help="auto, cuda, mps or cpu.")
def app(model: str, images: str | None, host: str, port: int, device: str) -> None:
    """Classify, search, draw and compare in the browser.

    One page with four tabs. It serves this machine alone, and keeps nothing that is sent. Drawing needs a model with a
    denoiser. Needs the [app] extra.

    \b
    Examples:
      clipkit app
      clipkit app --images photos/ --model ViT-B-32/laion2b_s34b_b79k
    """
    try:
        from clipkit.app import AppState, listen, serve
    except ModuleNotFoundError as error:
        raise UsageError(f'the page needs {error.name}: pip install "clipkit[app]"') from None
    with listen(host, port) as listening:
        serve(AppState.open(model, images, device), listening, host)
