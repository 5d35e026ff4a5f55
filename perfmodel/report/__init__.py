"""Ways to show a result: terminal tables (JSON needs none of this)."""
