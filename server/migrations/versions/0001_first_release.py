"""The tables of the first release, which kept a version number of its own."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    """Create everything."""
    version = op.create_table("schema_version", sa.Column("version", sa.Integer))
    op.bulk_insert(version, [{"version": 1}])
    _create_jobs()
    op.create_table(
        "job_labels",
        _job_id(),
        sa.Column("key", sa.String(63), primary_key=True),
        sa.Column("value", sa.String(255), nullable=False),
    )
    op.create_index("job_labels_value", "job_labels", ["key", "value", "job_id"])
    op.create_table(
        "unit_results",
        _job_id(),
        sa.Column("unit_index", sa.Integer, primary_key=True),
        sa.Column("has_every_answer", sa.Boolean, nullable=False),
        sa.Column("num_forward_passes", sa.BigInteger, nullable=False),
        sa.Column("recorded_at", sa.BigInteger, nullable=False),
        sa.Column("result", sa.JSON, nullable=False),
    )
    op.create_table(
        "events",
        _job_id(),
        sa.Column("seq", sa.Integer, primary_key=True),
        sa.Column("type", sa.String(32), nullable=False),
        sa.Column("at", sa.BigInteger, nullable=False),
        sa.Column("data", sa.JSON, nullable=False),
    )
    op.create_table(
        "workers",
        sa.Column("name", sa.String(100), primary_key=True),
        sa.Column("last_heartbeat", sa.BigInteger, nullable=False),
        sa.Column("stopped", sa.Boolean, nullable=False),
        sa.Column("view", sa.JSON, nullable=False),
    )


def _create_jobs() -> None:
    op.create_table(
        "jobs",
        sa.Column("id", sa.String(64), primary_key=True),
        sa.Column("kind", sa.String(64), nullable=False),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("labels", sa.JSON, nullable=False),
        sa.Column("spec", sa.JSON, nullable=False),
        sa.Column("spec_sha256", sa.String(64), nullable=False),
        sa.Column("plan", sa.JSON, nullable=False),
        sa.Column("num_units", sa.Integer, nullable=False),
        sa.Column("expected_forward_passes", sa.BigInteger, nullable=False),
        sa.Column("idempotency_key", sa.Text, unique=True),
        sa.Column("body_sha256", sa.String(64), nullable=False),
        sa.Column("created_at", sa.BigInteger, nullable=False),
        sa.Column("started_at", sa.BigInteger),
        sa.Column("error_code", sa.String(64)),
        sa.Column("error_message", sa.Text),
        sa.Column("error_unit_id", sa.Text),
        sa.Column("num_events", sa.Integer, nullable=False),
        sa.Column("end_event", sa.String(32)),
        sa.Column("ended_at", sa.BigInteger),
    )
    op.create_index("jobs_kind", "jobs", ["kind", "id"])
    op.create_index("jobs_open", "jobs", ["end_event", "id"])


def _job_id() -> sa.Column[str]:
    key = sa.ForeignKey("jobs.id", ondelete="CASCADE")
    return sa.Column("job_id", sa.String(64), key, primary_key=True)


def downgrade() -> None:
    """Refused: every job would be lost."""
    raise NotImplementedError("remove the database instead")
