"""Serving: a controller knows the workers, each worker has a model, the page asks through both.

All of them talk HTTP. `protocol.py` has the messages, `http_server.py` the server under controller
and workers; clients are `ui/worker_client.py` (the page's), `heartbeat.py` (a worker's, of its
controller) and `openai_client.py` (a worker's, of another server). `demo.py` starts everything.
"""
