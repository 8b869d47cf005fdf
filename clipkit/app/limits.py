"""Limits of the page: sizes, counts and rates beyond which it refuses a request."""

from __future__ import annotations

MAX_BYTES = 20_000_000
"""Bytes of one request."""
MAX_BYTES_HELD = 10 * MAX_BYTES
"""Bytes of all requests that are being answered."""
MAX_PIXELS = 16_000_000
"""Pixels of a picture that is sent, after the reduction of a large JPEG: four times a screen."""
MAX_DECODING = 2
"""Pictures that are decoded at the same time."""
MAX_PICTURES = 16
"""Pictures of one request."""
MAX_LABELS = 200
"""Labels, or texts, of one request."""
MAX_TEXT = 500
"""Characters of a label, a prompt or a query."""
MAX_STEPS = 100
"""Sampling steps of a drawing."""
MAX_WAITING = 4
"""Drawings that wait in the queue; one is made at a time."""
REQUESTS_PER_MINUTE = 240
"""Requests of one address; a page of search results takes some of them."""
