"""The `cfpp` command."""
