"""Revisions, oldest first; alembic loads them by path."""
