"""One of several applications that serve the same, for tests that kill, hang and restart them.

`NAME` says which one it is. Every order is in the file `RECEIVED` before it is answered, so that what arrived is
known also of a process that was killed.
"""

import asyncio
import os

from fastapi import FastAPI

NAME = os.environ["NAME"]
received = os.open(os.environ["RECEIVED"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

app = FastAPI(title=NAME)


@app.get("/health")
async def health() -> dict:
    return {"status": "ok"}


@app.get("/work")
async def work() -> dict:
    return {"by": NAME}


@app.post("/orders/{order}", status_code=201)
async def order(order: str) -> dict:
    os.write(received, f"{order}\n".encode())
    # Long enough that whoever kills this process finds some of them under way.
    await asyncio.sleep(0.02)
    return {"by": NAME}
