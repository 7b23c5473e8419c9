"""Workers' leases, API keys, webhooks, imported jobs; what the queue's metrics read."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    """Add columns and tables; nothing is lost."""
    for column in (
        sa.Column("queue", sa.String(16)),
        sa.Column("webhook", sa.Text),
        sa.Column("submitted_by", sa.String(100)),
        sa.Column("traceparent", sa.String(55)),
        sa.Column("num_finished", sa.Integer),
        sa.Column("num_without_answer", sa.Integer),
        sa.Column("num_forward_passes", sa.BigInteger),
        sa.Column("imported_at", sa.BigInteger),
    ):
        op.add_column("jobs", column)
    # As server.queue.queue_for said when these jobs were queued.
    jobs = sa.table("jobs", sa.column("id"), sa.column("spec", sa.JSON), sa.column("queue"))
    connection = op.get_bind()
    device = jobs.c.spec["model"]["device"].as_string()
    on_cpu = sa.func.coalesce(device, "auto") == "cpu"
    connection.execute(sa.update(jobs).values(queue=sa.case((on_cpu, "cpu"), else_="gpu")))
    op.create_index("jobs_queue", "jobs", ["queue", "end_event", "id"])
    op.add_column("workers", sa.Column("instance", sa.String(36)))
    op.create_index("events_at", "events", ["type", "at"])
    op.create_table(
        "api_keys",
        sa.Column("id", sa.String(32), primary_key=True),
        sa.Column("name", sa.String(100), nullable=False, unique=True),
        sa.Column("secret_sha256", sa.String(64), nullable=False),
        sa.Column("scope", sa.String(16), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("expires_at", sa.BigInteger),
        sa.Column("revoked_at", sa.BigInteger),
        sa.Column("last_used_at", sa.BigInteger),
    )
    op.create_table(
        "ended_views",
        sa.Column(
            "job_id",
            sa.String(64),
            sa.ForeignKey("jobs.id", ondelete="CASCADE"),
            primary_key=True,
        ),
        sa.Column("version", sa.Integer, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
    )
    op.create_table(
        "webhook_deliveries",
        sa.Column("id", sa.String(36), primary_key=True),
        sa.Column(
            "job_id",
            sa.String(64),
            sa.ForeignKey("jobs.id", ondelete="CASCADE"),
            nullable=False,
            unique=True,
        ),
        sa.Column("url", sa.Text, nullable=False),
        sa.Column("body", sa.Text, nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("num_attempts", sa.Integer, nullable=False),
        sa.Column("next_attempt_at", sa.BigInteger),
        sa.Column("delivered_at", sa.BigInteger),
        sa.Column("last_error", sa.Text),
    )
    op.create_index("webhook_deliveries_due", "webhook_deliveries", ["next_attempt_at"])
    # The first release looks here, and refuses a database that is newer than itself.
    connection.execute(sa.text("UPDATE schema_version SET version = 2"))


def downgrade() -> None:
    """Refused: what the columns hold would be lost."""
    raise NotImplementedError("restore a backup made before the upgrade instead")
