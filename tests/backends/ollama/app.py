"""Plays Ollama, as far as its OpenAI-compatible endpoint goes: `POST /v1/chat/completions`, streamed or not.

It knows one model, and keeps what it was asked for `GET /asked`, and how much of it at once for `GET /peak`.
"""

import asyncio
import json

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse

MODEL = "llama3.2"
TOKENS = ["Hello", " from", " Ollama."]

app = FastAPI(title="ollama")
asked: list[dict] = []
running = peak = 0


@app.get("/api/version")
async def version() -> dict:
    return {"version": "0.5.7"}


@app.get("/asked")
async def all_asked() -> list[dict]:
    return asked


@app.get("/peak")
async def most_at_once() -> int:
    return peak


@app.post("/v1/chat/completions")
async def chat(request: Request) -> Response:
    body = await request.json()
    asked.append({"headers": dict(request.headers), "body": body})
    if body.get("model") != MODEL:
        message = f"model {json.dumps(body.get('model'))} not found, try pulling it first"
        error = {"message": message, "type": "not_found_error", "param": None, "code": None}
        return JSONResponse({"error": error}, status_code=404)
    if not body.get("stream"):
        choice = {"index": 0, "message": {"role": "assistant", "content": "".join(TOKENS)}, "finish_reason": "stop"}
        return JSONResponse({"id": "chatcmpl-1", "object": "chat.completion", "model": MODEL, "choices": [choice]})

    async def chunks():
        global running, peak
        running += 1
        peak = max(peak, running)
        try:
            async for document in documents():
                yield f"data: {json.dumps(document)}\n\n"
            yield "data: [DONE]\n\n"
        finally:
            running -= 1

    async def documents():
        for token in [*TOKENS, None]:
            await asyncio.sleep(0.005)
            delta = {"role": "assistant", "content": token or ""}
            choice = {"index": 0, "delta": delta, "finish_reason": None if token else "stop"}
            yield {"id": "chatcmpl-1", "object": "chat.completion.chunk", "model": MODEL, "choices": [choice]}

    # By hand, as Ollama writes it: without sse-starlette's line ends and comments.
    return StreamingResponse(chunks(), media_type="text/event-stream")
