"""Pilot: `method.py` has the server's arithmetic, `private_parameters.py` the clients' side.

The router and the other parameters that stay with their client are kept by the latter; the
connector that they belong to is `llava/model/multimodal_projector/pilot.py`.
"""
