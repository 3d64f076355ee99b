"""A site of a federated run: the process that answers a driver's requests and trains here.

`python -m fed.site site.yaml`; `fed/remote/` has what both sides know.
"""
