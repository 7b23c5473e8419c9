"""The `probe` command: one file per group of commands, `conventions` for what they share."""
