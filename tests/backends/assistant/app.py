"""A desktop assistant's backend: `/ask` streams the tokens of a model as server-sent events, in OpenAI's form.

The model is not one, but it fails like one. `PUT /mode/{mode}` says how it is from now on:

- `ok`: it answers with four tokens.
- `loading`: 503, as until its weights are in memory.
- `out-of-memory`: 200, and the failure as the first event, because the head had been sent when it came.
- `silent`: 200, and then nothing.
- `paused`: one token, and the rest when the mode changes.
"""

import asyncio
import json

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from sse_starlette import EventSourceResponse

TOKENS = ["Hello", " from", " the", " assistant."]

app = FastAPI(title="assistant")
mode = "ok"
changed = asyncio.Condition()


@app.put("/mode/{name}")
async def set_mode(name: str) -> Response:
    global mode
    async with changed:
        mode = name
        changed.notify_all()
    return Response(status_code=204)


@app.get("/health")
async def health() -> JSONResponse:
    return JSONResponse({"model": mode}, status_code=503 if mode == "loading" else 200)


def chunk(token: str | None) -> str:
    delta = {"content": token} if token is not None else {}
    finish = None if token is not None else "stop"
    choice = {"index": 0, "delta": delta, "finish_reason": finish}
    return json.dumps({"id": "ask-1", "object": "chat.completion.chunk", "model": "large", "choices": [choice]})


async def answer():
    if mode == "out-of-memory":
        yield json.dumps({"error": {"message": "CUDA out of memory", "type": "server_error", "code": 500}})
        return
    if mode == "silent":
        await asyncio.Event().wait()
    for n, token in enumerate(TOKENS):
        yield chunk(token)
        if n == 0:
            async with changed:
                await changed.wait_for(lambda: mode != "paused")
    yield chunk(None)
    yield "[DONE]"


@app.post("/ask")
async def ask(request: Request) -> Response:
    asked = await request.json()
    if not asked.get("messages"):
        return JSONResponse({"detail": "`messages` is missing"}, status_code=422)
    if mode == "loading":
        return JSONResponse({"detail": "the model is loading"}, status_code=503)
    return EventSourceResponse(answer(), ping=3600)
