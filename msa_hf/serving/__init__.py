"""A server for a model with a store: OpenAI's chat completions, documents, health and metrics over HTTP.

Starlette and uvicorn are imported by `app` and `server` only, inside functions.
"""

from .limits import Limits
from .tokens import Access, Tokens

__all__ = ["Access", "Limits", "Tokens"]
