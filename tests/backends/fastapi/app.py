"""The FastAPI application that the end-to-end tests put behind sidegate.

Its streams do not run by the clock: each event waits until the test asks for it with `POST /next/{stream}`,
directly at uvicorn. So a test knows, without measuring, that one event passed before the next one existed.
"""

import asyncio
import json
from collections import defaultdict
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response, WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from pydantic import BaseModel
from sse_starlette import EventSourceResponse

app = FastAPI(title="backend")


@dataclass
class Stream:
    """A stream that the test drives: `steps` holds the events it asked for, None ends it."""

    steps: asyncio.Queue = field(default_factory=asyncio.Queue)
    state: str = "not begun"
    changed: asyncio.Condition = field(default_factory=asyncio.Condition)

    async def become(self, state: str) -> None:
        async with self.changed:
            self.state = state
            self.changed.notify_all()


streams: dict[str, Stream] = defaultdict(Stream)


@app.post("/next/{stream}")
async def next_event(stream: str, request: Request) -> Response:
    """Lets the stream send the request's body as its next event; an empty body ends it."""
    text = (await request.body()).decode()
    await streams[stream].steps.put(text or None)
    return Response(status_code=204)


@app.get("/state/{stream}/{state}")
async def wait_for_state(stream: str, state: str) -> Response:
    """Answers as soon as the stream is in that state."""
    watched = streams[stream]
    async with watched.changed:
        await watched.changed.wait_for(lambda: watched.state == state)
    return Response(status_code=204)


async def events(stream: str):
    driven = streams[stream]
    await driven.become("begun")
    try:
        while (text := await driven.steps.get()) is not None:
            yield text
        await driven.become("done")
    except (asyncio.CancelledError, GeneratorExit):
        # Shielded, because every further await of a cancelled task would be cancelled as well.
        await asyncio.shield(asyncio.ensure_future(driven.become("cancelled")))
        raise


@app.get("/health")
async def health() -> dict:
    return {"status": "ok"}


class Item(BaseModel):
    name: str
    price: float


@app.post("/items/{item_id}")
async def create_item(item_id: int, item: Item) -> dict:
    return {"id": item_id, "name": item.name, "price": item.price}


@app.api_route("/echo/{rest:path}", methods=["GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"], include_in_schema=False)
async def echo(request: Request) -> dict:
    """What arrived, as raw as ASGI has it."""
    return {
        "method": request.method,
        "path": request.scope["raw_path"].decode("latin-1"),
        "query": request.scope["query_string"].decode("latin-1"),
        "headers": [[name.decode("latin-1"), value.decode("latin-1")] for name, value in request.headers.raw],
        "body": (await request.body()).decode("latin-1"),
    }


@app.get("/sse/{stream}")
async def sse(stream: str) -> EventSourceResponse:
    return EventSourceResponse(events(stream), ping=3600)


@app.get("/lines/{stream}")
async def lines(stream: str) -> StreamingResponse:
    """As `/sse`, but plain chunks without sse-starlette."""
    return StreamingResponse(events(stream), media_type="text/plain")


@app.post("/v1/chat/completions")
async def chat(request: Request):
    """OpenAI's shape; streamed ones take their tokens from the stream that `user` names."""
    asked = await request.json()
    if not asked.get("stream"):
        message = {"role": "assistant", "content": "Hello."}
        return {"object": "chat.completion", "choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}

    async def chunks():
        async for token in events(asked["user"]):
            choice = {"index": 0, "delta": {"content": token}}
            yield json.dumps({"object": "chat.completion.chunk", "choices": [choice]})
        yield "[DONE]"

    return EventSourceResponse(chunks(), ping=3600)


@app.websocket("/ws")
async def websocket_echo(websocket: WebSocket) -> None:
    """Sends every message back. The text `close CODE REASON` closes with them."""
    await websocket.accept()
    try:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                await streams["ws"].become(f"closed-{message['code']}")
                return
            text = message.get("text")
            if text is not None and text.startswith("close "):
                _, code, reason = text.split(" ", 2)
                await websocket.close(int(code), reason)
                return
            if text is not None:
                await websocket.send_text(text)
            else:
                await websocket.send_bytes(message["bytes"])
    except WebSocketDisconnect:
        pass
