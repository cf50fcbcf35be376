"""A stage worker: one orchestrator's session after another, and what a step computes."""
