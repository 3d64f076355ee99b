"""The playground: small frozen parts, pictures, flags of its runs, and the studies made on it."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]  # paths in flags and plans are relative to it
