"""A content generator: `POST /api/generate` has a text written by a slow and costly API.

The API is not one, but it takes its time and fails like one. `PUT /mode/{mode}` says how it is from now on, and
`GET /calls` how often it was called:

- `ok`: it writes.
- `down`: it refuses, and the application says so: 502.
- `crash`: the application does not expect what it says: 500.
- `hanging`: it says nothing until the mode changes.
"""

import os
import threading
import time

from flask import Flask, jsonify, request

DELAY = float(os.environ.get("DELAY", "0"))

app = Flask(__name__)
state = threading.Condition()
mode = "ok"
calls = 0


class Refused(Exception):
    pass


def ai(topic: str, tone: str) -> str:
    """Each call costs money."""
    global calls
    with state:
        calls += 1
        number = calls
        state.wait_for(lambda: mode != "hanging", timeout=30)
        now = mode
    if now == "down":
        raise Refused("the model is overloaded")
    if now == "crash":
        raise KeyError("choices")
    time.sleep(DELAY)
    return f"Draft {number}, {tone}: {topic}."


@app.put("/mode/<name>")
def set_mode(name: str):
    global mode
    with state:
        mode = name
        state.notify_all()
    return "", 204


@app.get("/calls")
def count():
    return jsonify(calls)


@app.get("/")
def page():
    return "<!doctype html><title>Write</title>"


@app.post("/api/generate")
def generate():
    asked = request.get_json(silent=True)
    if not isinstance(asked, dict) or not asked.get("topic"):
        return jsonify(error="`topic` is missing"), 400
    try:
        content = ai(asked["topic"], asked.get("tone", "plain"))
    except Refused as why:
        return jsonify(error=str(why)), 502
    return jsonify(content=content)
