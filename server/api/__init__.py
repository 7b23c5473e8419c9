"""The HTTP server: thin routes over `server.store`, problem+json, SSE, charts, dashboard.

Nothing here imports torch or transformers; a test holds that.
"""
