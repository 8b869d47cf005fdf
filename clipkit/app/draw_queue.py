"""The draw queue: one drawing at a time, its steps streamed as lines of JSON."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from torch import Tensor

from clipkit.app.limits import MAX_PICTURES, MAX_STEPS, MAX_TEXT, MAX_WAITING
from clipkit.errors import ClipkitError, UsageError
from clipkit.guidance.config import SEEDS, DrawRequest, GuidanceConfig
from clipkit.guidance.image_grid import grid
from clipkit.guidance.pipeline import Pipeline


class DrawBody(BaseModel):
    """Body of a request to draw."""

    prompt: str = Field(min_length=1, max_length=MAX_TEXT)
    negative: str = Field("", max_length=MAX_TEXT)
    n: int = Field(8, ge=1, le=MAX_PICTURES)
    steps: int = Field(25, ge=1, le=MAX_STEPS)
    scale: float | None = Field(None, ge=0, le=100)
    cfg_scale: float | None = Field(None, ge=0, le=100)
    seed: int = Field(0, ge=0, lt=SEEDS)

    @property
    def request(self) -> DrawRequest:
        """The same for the pipeline."""
        return DrawRequest(
            {self.prompt: 1.0},
            negative=[self.negative] if self.negative else [],
            n=self.n,
            steps=self.steps,
            scale=self.scale,
            seed=self.seed,
            guidance=GuidanceConfig(self.cfg_scale),
        )


class DrawQueue:
    """Draws one request at a time; at most MAX_WAITING others wait."""

    def __init__(self, pipeline: Pipeline | str) -> None:
        self.pipeline = pipeline
        self._turn = threading.Lock()
        self._present = 0

    def draw(self, body: DrawBody) -> AsyncIterator[str]:
        """Lines of JSON: the pictures after each step, then the final pictures with their scores.

        Ends early when the client is gone. Raises UsageError if the model cannot draw, HTTPException for a full queue.
        """
        if isinstance(self.pipeline, str):
            raise UsageError(self.pipeline)
        if self._present > MAX_WAITING:
            raise HTTPException(429, f"{MAX_WAITING} drawings are waiting already; try again later")
        return self._events(self.pipeline, body)

    async def _events(self, pipeline: Pipeline, body: DrawBody) -> AsyncIterator[str]:
        loop = asyncio.get_running_loop()
        events = asyncio.Queue[dict[str, Any]]()
        left = threading.Event()
        self._present += 1

        def send(event: dict[str, Any]) -> None:
            loop.call_soon_threadsafe(events.put_nowait, event)

        work = loop.run_in_executor(None, self._work, pipeline, body, send, left)
        work.add_done_callback(lambda _: self._gone())
        try:
            while True:
                event = await events.get()
                yield json.dumps(event) + "\n"
                if "step" not in event:
                    return
        finally:
            left.set()

    def _gone(self) -> None:
        self._present -= 1

    def _work(
        self, pipeline: Pipeline, body: DrawBody, send: Callable[[dict[str, Any]], None], left: threading.Event
    ) -> None:
        done = 0

        def watch(pictures: Tensor) -> None:
            nonlocal done
            done += 1
            if left.is_set():
                raise _LeftError
            send({"step": done, "of": body.steps, "picture": _data_url(pictures)})

        try:
            with self._turn:
                drawn = pipeline.draw(body.request, watch=watch)
            send({"picture": _data_url(drawn.images), "scores": drawn.scores, "about": drawn.about})
        except _LeftError:
            return
        except ClipkitError as error:
            send({"error": str(error)})
        except Exception:
            send({"error": "the drawing failed; the terminal shows why"})
            raise


class _LeftError(Exception):
    """The client is gone."""


def _data_url(pictures: Tensor) -> str:
    buffer = io.BytesIO()
    grid(pictures).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
