"""A page on one's own machine that classifies, searches, draws and compares (`clipkit app`, the [app] extra).

Nothing that is sent is kept. The page itself is clipkit/assets/app; it calls the routes below /api.
"""

from __future__ import annotations

from clipkit.app.routes import make_app
from clipkit.app.server import listen, serve
from clipkit.app.state import AppState

__all__ = ["AppState", "listen", "make_app", "serve"]
